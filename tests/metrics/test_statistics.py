"""The scores against reference values of guided-diffusion, pytorch-fid and torch-fidelity, and against closed forms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qncd.metrics.statistics.manifold import neighbour_radii, precision_recall
from qncd.metrics.statistics.moments import (
    FeatureStatistics,
    PairedQuality,
    StatisticsAccumulator,
    covariance_factor,
    features_to_statistics,
    frechet_distance,
    inception_score,
    inception_score_adm,
    mse_to_psnr,
    paired_mse,
    paired_psnr,
    split_score,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(scope="module")
def features() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "metrics_features.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((GOLDEN / "metrics_results.json").read_text())


@pytest.mark.parametrize(
    ("real", "synthetic", "rows", "key", "tolerance"),
    [
        ("feat_ref", "feat_gen", None, "fid_ref_gen_guided_diffusion", 1e-7),
        ("feat_ref", "feat_gen", None, "fid_ref_gen_pytorch_fid", 1e-7),
        ("feat_ref", "feat_gen_small", None, "fid_ref_small", 1e-7),
        ("feat_ref", "feat_gen", 40, "fid_first40_guided_diffusion", 1e-3),  # fewer images than dimensions
    ],
)
def test_frechet_distance_equals_the_references(features, expected, real, synthetic, rows, key, tolerance):
    a, b = (features_to_statistics(features[name][:rows]) for name in (real, synthetic))
    assert frechet_distance(a, b) == pytest.approx(expected[key], abs=tolerance)
    assert frechet_distance(b, a) == pytest.approx(expected[key], abs=tolerance)


def test_frechet_distance_equals_torch_fidelity(features):
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = (metric_fid.fid_features_to_statistics(features[name].double()) for name in ("feat_ref", "feat_gen"))
    theirs = metric_fid.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(features_to_statistics(features["feat_ref"]), features_to_statistics(features["feat_gen"]))
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_exact():
    rng = np.random.default_rng(0)
    mu, scale = rng.normal(size=(2, 30)), rng.uniform(0, 3, (2, 30))
    scale[0, :10] = 0  # singular
    scale[1, 5:15] = 0
    a, b = (FeatureStatistics(mu[i], np.diag(scale[i] ** 2)) for i in (0, 1))
    assert frechet_distance(a, b) == pytest.approx(((mu[0] - mu[1]) ** 2 + (scale[0] - scale[1]) ** 2).sum(), rel=1e-12)


def test_frechet_distance_is_zero_on_equal_singular_sets(features):
    few = features_to_statistics(features["feat_ref"][:20])
    assert 0 <= frechet_distance(few, few) < 1e-9
    constant = features_to_statistics(torch.ones(5, 8))
    assert frechet_distance(constant, constant) == 0
    # Against a point the distance is |difference of means|^2 + trace.
    difference = few.mu - 1
    point = FeatureStatistics(np.ones_like(few.mu), np.zeros_like(few.sigma))
    assert frechet_distance(few, point) == pytest.approx(difference @ difference + np.trace(few.sigma), rel=1e-12)


@pytest.mark.parametrize("rank", [40, 64])
def test_frechet_distance_equals_the_square_root_of_a_matrix(rank):
    """To 1e-6 relative, by whatever way the covariances are factored."""
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(rank)
    mix = rng.normal(size=(2, rank, 64))
    rows = [torch.from_numpy(rng.normal(size=(400, rank)) @ mix[i]) for i in (0, 1)]
    a, b = (features_to_statistics(part) for part in rows)
    root = scipy_linalg.sqrtm(a.sigma @ b.sigma + (1e-12 * np.eye(64) if rank < 64 else 0))
    difference = a.mu - b.mu
    expected = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_factors_give_the_covariance_back(features):
    few = features_to_statistics(features["feat_ref"][:20])
    many = features_to_statistics(features["feat_ref"])
    flat = features_to_statistics(torch.cat([features["feat_ref"], torch.zeros(500, 3)], 1))  # regular but for 3 dimensions
    assert few.factor is not None and many.factor is None
    unknown = FeatureStatistics(few.mu, few.sigma)
    for statistics, rank in ((few, 20), (many, 64), (flat, 64), (unknown, 19)):
        factor = covariance_factor(statistics)
        assert factor.shape[1] == rank
        np.testing.assert_allclose(factor @ factor.T, statistics.sigma, atol=1e-10)
    # With and without the factors at hand.
    other = features_to_statistics(features["feat_gen"][:30])
    plain = FeatureStatistics(other.mu, other.sigma, other.count)
    for first, second in ((few, other), (few, plain), (unknown, plain)):
        assert frechet_distance(first, second) == pytest.approx(frechet_distance(few, other), rel=1e-6)


def test_the_set_of_fewer_images_is_factored():
    """A singular covariance without its factor: the other way round the rounding noise of its zeros would count, 1e-8 each."""
    rng = np.random.default_rng(5)
    many, few = (features_to_statistics(torch.from_numpy(rng.normal(size=(count, 64)) + 0.1)) for count in (200, 10))
    plain = FeatureStatistics(few.mu, few.sigma, few.count)
    root = np.linalg.svd(few.factor.T @ np.linalg.cholesky(many.sigma), compute_uv=False).sum()
    expected = ((few.mu - many.mu) ** 2).sum() + np.trace(few.sigma) + np.trace(many.sigma) - 2 * root
    for first, second in ((plain, many), (many, plain)):
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_refuses_other_dimensions():
    a, b = (FeatureStatistics(np.zeros(d), np.eye(d)) for d in (3, 4))
    with pytest.raises(ValueError, match="statistics of 3 and of 4 dimensions cannot be compared"):
        frechet_distance(a, b)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_accumulator_equals_numpy_for_any_batch_size(features, batch_size):
    rows = features["feat_ref"].double() + 1e4  # a large mean, where sums of squares would lose digits
    accumulator = StatisticsAccumulator()
    for batch in rows.split(batch_size):
        accumulator.update(batch)
    statistics = accumulator.finish()
    assert statistics.count == len(rows)
    np.testing.assert_allclose(statistics.mu, rows.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.sigma, np.cov(rows.numpy(), rowvar=False), rtol=1e-10, atol=1e-11)


def test_accumulator_refuses_nan_one_image_and_other_dimensions():
    accumulator = StatisticsAccumulator()
    accumulator.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="1 image: a covariance needs at least 2"):
        accumulator.finish()
    with pytest.raises(ValueError, match="features of 5 dimensions after features of 4"):
        accumulator.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="NaN"):
        accumulator.update(torch.full((2, 4), math.nan))


def test_statistics_refuse_nan_and_shapes():
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics(np.array([math.nan]), np.eye(1))
    with pytest.raises(ValueError, match=r"expected \(D,\) and \(D, D\)"):
        FeatureStatistics(np.zeros(3), np.eye(4))


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.diag([1.0, -1e-9]), "sigma has a variance of -1e-09, allowed are 0 and more"),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), "sigma is not symmetric"),
    ],
)
def test_statistics_refuse_what_is_no_covariance(sigma, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics(np.zeros(2), sigma)
    FeatureStatistics(np.zeros(2), np.array([[1.0, 0.5], [0.5 + 1e-5, 1.0]]))  # rounding


@pytest.mark.parametrize("swap", [False, True])
def test_frechet_distance_refuses_what_has_no_square_root(swap):
    good, bad = FeatureStatistics(np.zeros(2), np.eye(2)), FeatureStatistics(np.zeros(2), np.array([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(ValueError, match=r"sigma has a negative eigenvalue \(-2, the largest is 4\): no covariance"):
        frechet_distance(*((bad, good) if swap else (good, bad)))
    for large in (FeatureStatistics(np.full(2, 1e200), np.eye(2)), FeatureStatistics(np.zeros(2), 1e308 * np.eye(2))):
        with pytest.raises(ValueError, match=r"the distance is (inf|nan): the statistics are too large for float64"):
            frechet_distance(large, large if large.mu[0] == 0 else good)


def test_rounding_of_a_singular_covariance_is_no_negative_eigenvalue(features):
    """Fewer images than dimensions, saved in half precision: near the distance of the exact statistics."""
    exact = features_to_statistics(features["feat_ref"][:20])
    other = features_to_statistics(features["feat_gen"])
    half = FeatureStatistics(exact.mu, exact.sigma.astype(np.float16).astype(np.float64))
    assert np.linalg.eigvalsh(half.sigma)[0] < 0
    assert frechet_distance(half, other) == pytest.approx(frechet_distance(exact, other), rel=1e-2)


def test_constant_sets():
    """All images the same: the distance of the means, and balls of radius 0."""
    a, b = (features_to_statistics(torch.full((count, 3), value)) for count, value in ((2, 1.0), (7, 3.0)))
    assert frechet_distance(a, b) == frechet_distance(b, a) == pytest.approx(12)
    assert frechet_distance(a, a) == frechet_distance(b, b) == 0
    same, other = torch.full((9, 5), 0.1), torch.full((9, 5), 0.2)
    assert precision_recall(same, same) == (1, 1) and precision_recall(same, other) == (0, 0)


def test_inception_score_equals_the_references(features, expected):
    logits = features["is_logits"]
    score = inception_score(logits, 10)
    assert [score.mean, score.std] == pytest.approx(expected["is_10_splits_mean_std_noshuffle"], rel=1e-9)
    # guided-diffusion computes in float32.
    assert inception_score_adm(logits).mean == pytest.approx(expected["is_guided_diffusion_split5000_on_1000"], rel=1e-6)
    assert inception_score_adm(logits, 300).mean == pytest.approx(expected["is_guided_diffusion_split300_on_1000"], rel=1e-6)
    isc = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric(logits, splits=7, shuffle=False)
    score = inception_score(logits, 7)
    assert score.mean == pytest.approx(isc["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(isc["inception_score_std"], rel=1e-9)


def test_inception_score_in_blocks_is_the_same(features):
    logits = features["is_logits"]
    assert split_score(logits.split(77)) == pytest.approx(split_score([logits]), rel=1e-12)


def test_inception_score_in_closed_form():
    certain = torch.log(torch.eye(5).repeat(4, 1))  # log(0) = -inf: probabilities 0 add nothing
    assert inception_score(certain, 1).mean == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5), 2) == inception_score_adm(torch.zeros(20, 5), 10)
    assert inception_score(torch.zeros(20, 5), 2).mean == pytest.approx(1)


def test_inception_score_refuses():
    with pytest.raises(ValueError, match="3 images in 10 splits"):
        inception_score(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="0 images"):
        inception_score_adm(torch.zeros(0, 5))
    with pytest.raises(ValueError, match="NaN"):
        inception_score(torch.full((20, 5), math.nan))


@pytest.mark.parametrize(("synthetic", "key"), [("feat_gen", "ref_gen"), ("feat_gen_small", "ref_small")])
def test_precision_recall_equals_the_references(features, expected, synthetic, key):
    pair = precision_recall(features["feat_ref"], features[synthetic], 3, block=170)
    assert pair == pytest.approx(expected[f"precision_recall_k3_{key}_f64"], abs=1e-12)
    radii = neighbour_radii(features["feat_ref"], 3).float()
    torch.testing.assert_close(radii, features[f"radii_sq_first_{key}_f64"], rtol=1e-5, atol=0)


def test_precision_recall_needs_more_samples_than_neighbours():
    with pytest.raises(ValueError, match="3 images: the neighbour number 3 needs at least 4"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_paired_figures():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    b = a.copy()
    b[1] ^= 1  # every value off by one
    b[2, 0, 0, 0] = a[2, 0, 0, 0] ^ 255
    off = (255 - 2.0 * min(a[2, 0, 0, 0], b[2, 0, 0, 0])) ** 2 / 192
    np.testing.assert_allclose(paired_mse(a, b), [0, 1, off])
    np.testing.assert_allclose(paired_psnr(a, b), [math.inf, 20 * math.log10(255), 10 * math.log10(255**2 / off)])
    assert mse_to_psnr(np.array([255.0**2])) == pytest.approx(0)
    with pytest.raises(ValueError, match="one shape"):
        paired_mse(a, b[:, :4])


def test_poor_images_show_beside_the_mean_of_psnr() -> None:
    """19 images at 40 dB and one at 10 dB."""
    mse = np.array([6.5025] * 19 + [6502.5])
    found = PairedQuality.of(mse)
    assert found.psnr == pytest.approx((19 * 40 + 10) / 20) and found.psnr_p5 == pytest.approx(10) and found.poor == 5
    assert found.psnr_of_mean == pytest.approx(10 * math.log10(255**2 / mse.mean())) and found.psnr_of_mean < 23
    assert PairedQuality.of(np.zeros(3)) == PairedQuality(math.inf, math.inf, math.inf, 0.0)


def test_spatial_statistics_and_unbiased_logits_of_inception(expected):
    values = expected["inception"]
    with np.load(GOLDEN / "metrics_inception.npz") as file:
        spatial = file["spatial_mixed6_first7_NCHW"].transpose(0, 2, 3, 1).reshape(64, -1)[:, ::17]
        logits = torch.from_numpy(file["logits_unbiased"])
    a, b = (features_to_statistics(torch.from_numpy(part)) for part in (spatial[:32], spatial[32:]))
    assert frechet_distance(a, b) == pytest.approx(values["sfid_slice17_first32_vs_last32"], abs=1e-3)
    score = inception_score(logits)
    assert [score.mean, score.std] == pytest.approx(values["is_10_splits_logits_unbiased"], rel=1e-9)
    assert inception_score_adm(logits).mean == pytest.approx(values["is_gd_logits_unbiased"], rel=1e-6)
