"""Influences against leaving images out, and intervals against draws from a known distribution."""

import numpy as np
import pytest
import torch

from qncd.metrics.networks.store import FeatureWriter, Rows
from qncd.metrics.statistics.bootstrap import Interval, interval, resampled_shifts
from qncd.metrics.statistics.influence import frechet_influence, score_influence
from qncd.metrics.statistics.kernel_distance import kernel_distance, kernel_influence, squared_mmd
from qncd.metrics.statistics.manifold import precision_recall, precision_recall_influence
from qncd.metrics.statistics.moments import FeatureStatistics, features_to_statistics, frechet_distance, inception_score


@pytest.fixture
def to_rows(tmp_path):
    def write(values: torch.Tensor, name: str = "rows") -> Rows:
        writer = FeatureWriter(tmp_path, len(values))
        writer.append({name: values})
        writer.close()
        return Rows(tmp_path / f"{name}.npy")

    return write


def weighted_statistics(x: torch.Tensor, weights: torch.Tensor) -> FeatureStatistics:
    x, n = x.double(), len(x)
    mean = weights @ x / n
    sigma = ((x - mean).T * weights) @ (x - mean) / (n - 1)
    return FeatureStatistics(mean.numpy(), sigma.numpy())


@pytest.mark.parametrize(("count", "dimension"), [(200, 12), (10, 24)])
def test_frechet_influence_is_the_derivative(to_rows, count, dimension):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, dimension, generator=rng) * 1.2 + 0.3
    reference = features_to_statistics(torch.randn(300, dimension, generator=rng))
    influence = frechet_influence(to_rows(x), features_to_statistics(x), reference)
    direction = torch.randn(count, generator=rng, dtype=torch.float64)
    direction -= direction.mean()
    step = 1e-4
    ends = [frechet_distance(weighted_statistics(x, 1 + sign * step * direction), reference) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert influence @ direction.numpy() / count == pytest.approx(expected, rel=1e-3)
    assert influence.mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [4, 9])
def test_frechet_influence_against_constant_images(to_rows, count):
    """Their covariance has no rank at all: what is left is linear in the images."""
    features = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    rows, constant = to_rows(features), features_to_statistics(torch.ones(8, 6))
    found = frechet_influence(rows, features_to_statistics(features), constant)
    centred = features.double() - features.double().mean(0)
    linear = 2 * centred @ (features.double().mean(0) - 1) + centred.square().sum(1) * count / (count - 1)
    np.testing.assert_allclose(found, linear - linear.mean(), atol=1e-6)


def test_score_influence_is_the_derivative(to_rows):
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)) * 2
    parts = [np.arange(0, 30), np.arange(30, 60)]
    influence = score_influence(to_rows(logits), parts)
    # An image twice: to first order the score moves by the influence over N, less that of what it displaces.
    p = logits.double().softmax(1)

    def score(weights: torch.Tensor) -> float:
        values = []
        for part in parts:
            w = weights[part] / weights[part].sum()
            marginal = w @ p[part]
            values.append(float((w @ torch.special.xlogy(p[part], p[part] / marginal).sum(1)).exp()))
        return float(np.mean(values))

    ones = torch.ones(60, dtype=torch.float64)
    assert score(ones) == pytest.approx(inception_score(logits, 2).mean)
    for i in (0, 31, 59):
        bumped = ones.clone()
        bumped[i] += 1e-4
        assert (score(bumped) - score(ones)) / 1e-4 == pytest.approx(influence[i] / 60, rel=1e-3, abs=1e-6)


def test_kernel_influence_is_what_leaving_out_changes(to_rows):
    rng = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, 6, generator=rng) + 0.2, torch.randn(40, 6, generator=rng)
    ours, theirs = to_rows(x, "x"), to_rows(y, "y")
    influence = kernel_influence(ours, theirs)
    result = kernel_distance(ours, theirs, subsets=3, subset_size=40)
    assert result.mean == pytest.approx(squared_mmd(x.double(), y.double()))

    def unequal(x: torch.Tensor) -> float:
        within, across = ((a.double() @ b.double().T / 6 + 1) ** 3 for a, b in ((x, x), (x, y)))
        return ((within.sum() - within.trace()) / (len(x) * (len(x) - 1)) - 2 * across.mean()).item()

    left_out = np.array([unequal(torch.cat([x[:i], x[i + 1 :]])) for i in range(40)])
    jackknife = 39 * (unequal(x) - left_out)
    assert np.corrcoef(jackknife - jackknife.mean(), influence)[0, 1] > 0.999
    assert jackknife.std() == pytest.approx(influence.std(), rel=0.05)


def test_recall_influence_is_what_leaving_out_changes():
    rng = torch.Generator().manual_seed(3)
    real, synthetic = torch.randn(70, 4, generator=rng), torch.randn(50, 4, generator=rng) * 0.8
    result = precision_recall_influence(real, synthetic, block=20)
    assert (result.precision, result.recall) == precision_recall(real, synthetic)
    left_out = np.array([precision_recall(real, torch.cat([synthetic[:i], synthetic[i + 1 :]]))[1] for i in range(50)])
    expected = 49 * (result.recall - left_out)
    np.testing.assert_allclose(result.recall_influence, expected - expected.mean(), atol=1e-12)


def test_interval_of_a_mean_is_the_known_one():
    values = np.random.default_rng(0).normal(5, 2, 400)
    shifts = resampled_shifts({"mean": values - values.mean()}, 2000)["mean"]
    bounds = interval(values.mean(), shifts)
    half = 1.96 * values.std() / 20
    assert bounds.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert bounds.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bounds.excludes_zero and not Interval(-1, 1).excludes_zero and Interval(-2, -1).excludes_zero
    again = resampled_shifts({"mean": values - values.mean()}, 2000)["mean"]
    assert np.array_equal(shifts, again)


def test_an_interval_holds_the_middle_95_percent():
    """Of the shifts 0, 1, ... 1000 the middle 951 are 25 to 975; with another confidence others."""
    shifts = np.random.default_rng(0).permutation(1001).astype(np.float64)
    assert interval(-3.0, shifts) == Interval(pytest.approx(22), pytest.approx(972))
    assert interval(0.0, shifts, confidence=0.5) == Interval(pytest.approx(250), pytest.approx(750))


def test_frechet_intervals_hold_what_other_seeds_give(to_rows):
    """Not narrower than the spread of FID over new draws, and not twice as wide."""
    rng = np.random.default_rng(4)
    scale = np.exp(-np.arange(16) / 6)
    reference = FeatureStatistics(np.zeros(16), np.diag(scale**2))

    def draw() -> torch.Tensor:
        return torch.from_numpy((rng.normal(size=(400, 16)) * scale * 1.1 + 0.1).astype(np.float32))

    figures = [frechet_distance(features_to_statistics(draw()), reference) for _ in range(100)]
    x = draw()
    shifts = resampled_shifts({"fid": frechet_influence(to_rows(x), features_to_statistics(x), reference)}, 500)["fid"]
    assert 0.8 < shifts.std() / np.std(figures) < 2


def test_refusals():
    with pytest.raises(ValueError, match="expected one number, at least 2"):
        resampled_shifts({"a": np.zeros(3), "b": np.zeros(4)}, 10)
    with pytest.raises(ValueError, match="expected one number, at least 2"):
        resampled_shifts({"a": np.zeros(1)}, 10)
    assert resampled_shifts({}, 10) == {}
    with pytest.raises(ValueError, match="at least 2"):
        squared_mmd(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs at least 5"):
        precision_recall_influence(torch.zeros(9, 2), torch.zeros(4, 2))
