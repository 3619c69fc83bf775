"""The same weights file and the same images through torch-fidelity, pytorch-fid and clean-fid.

Only what the packages would download is replaced: the weights, and clean-fid's TorchScript network by pytorch-fid's
network without resize and scaling. Newer scipy no longer takes the arguments with which two of them call sqrtm.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import evaluator
from qncd.metrics.networks.extraction import extract
from qncd.metrics.networks.features import InceptionFeatures
from qncd.metrics.networks.store import FeatureCache, Rows, default_cache
from qncd.metrics.report.conventions import CONVENTIONS
from qncd.metrics.report.sources import open_source
from qncd.metrics.statistics.kernel_distance import kernel_distance
from qncd.metrics.statistics.moments import features_to_statistics, frechet_distance

COUNT = 10
DIMENSIONS = 192  # of those that the packages' own formulas are given: their square roots take half a minute at 2048
TOLERANCE = 1e-3
KERNEL_ROUNDING = 1e-5  # of means of kernels near 2.8 in float32, whose difference is the distance of about 0.001


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_images) -> tuple[Path, Path]:
    """Two folders of 37x45 images in colour."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "real", COUNT, 1, (37, 45, 3), smooth=True)
    make_images(root / "synth", COUNT, 2, (37, 45, 3), smooth=True)
    return root / "real", root / "synth"


@pytest.fixture
def old_sqrtm(monkeypatch):
    """scipy.linalg.sqrtm as it was until 1.17: (root, error) with disp=False."""
    root = scipy.linalg.sqrtm

    def sqrtm(matrix, disp=True, **options):
        return root(matrix, **options) if disp else (root(matrix, **options), 0.0)

    monkeypatch.setattr(scipy.linalg, "sqrtm", sqrtm)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(shared_cache, monkeypatch) -> Path:
    """One cache for this file: the features of the same images and convention are computed once."""
    monkeypatch.setenv("QNCD_CACHE", str(shared_cache))
    return shared_cache


def our_rows(folder: Path, weights: Path, convention: str) -> Rows:
    extractor = InceptionFeatures(weights, convention=CONVENTIONS[convention])
    return extract(open_source(folder), extractor, FeatureCache(default_cache()), 4).layers["features"]


def our_features(folder: Path, weights: Path, convention: str) -> torch.Tensor:
    return our_rows(folder, weights, convention).read()


def scores(capsys, *arguments: object) -> dict:
    evaluator.main([*map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Features of one image against those of the same image: relative to how much images differ."""
    assert np.abs(ours - theirs).max() < TOLERANCE * theirs.std(0).mean()


def test_torch_fidelity_end_to_end(folders, inception_weights, capsys):
    torch_fidelity = pytest.importorskip("torch_fidelity")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[1]), input2=str(folders[0]), fid=True, isc=True, kid=True, cuda=False, batch_size=5, cache=False,
        feature_extractor_weights_path=str(inception_weights), kid_subset_size=7, kid_subsets=20, isc_splits=3, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    options = ["--weights", inception_weights, "--convention", "torch-fidelity", "--is_splits", 3]
    ours = scores(capsys, *folders, *options)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=TOLERANCE)
    assert ours["inception_score_mean"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=TOLERANCE)
    assert ours["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=TOLERANCE)
    kid = kernel_distance(*(our_rows(folder, inception_weights, "torch-fidelity") for folder in folders[::-1]), 20, 7)
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=KERNEL_ROUNDING)
    assert kid.std == pytest.approx(theirs["kernel_inception_distance_std"], abs=KERNEL_ROUNDING)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_pytorch_fid(folders, inception_weights, monkeypatch, old_sqrtm, capsys):
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    from pytorch_fid import inception

    state = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    network = inception.InceptionV3([3])
    theirs = [fid_score.get_activations(sorted(folder.iterdir()), network, 5) for folder in folders]
    ours = [our_features(folder, inception_weights, "pytorch-fid").numpy() for folder in folders]
    for mine, reference in zip(ours, theirs, strict=True):
        close(mine, reference)
    parts = [features[:, :DIMENSIONS] for features in theirs]
    moments = [part for features in parts for part in (features.mean(0), np.cov(features, rowvar=False))]
    expected = fid_score.calculate_frechet_distance(*moments)
    statistics = [features_to_statistics(torch.from_numpy(features[:, :DIMENSIONS])) for features in ours]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=TOLERANCE)
    # The command on the same images, and on pytorch-fid's own file of statistics.
    whole = [features_to_statistics(torch.from_numpy(features)) for features in theirs]
    options = ["--weights", inception_weights, "--convention", "pytorch-fid"]
    from_images = scores(capsys, *folders, *options)
    assert from_images["fid"] == pytest.approx(frechet_distance(*whole), rel=TOLERANCE)
    assert from_images["sfid"] is None and from_images["inception_score_mean"] is None
    np.savez_compressed(folders[0].parent / "statistics.npz", mu=theirs[0].mean(0), sigma=np.cov(theirs[0], rowvar=False))
    from_statistics = scores(capsys, folders[0].parent / "statistics.npz", folders[1], *options)
    assert from_statistics["fid"] == pytest.approx(from_images["fid"], rel=TOLERANCE)
    assert any("convention pytorch-fid is taken for granted" in note for note in from_statistics["notes"])


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_clean_fid(folders, inception_weights, monkeypatch, old_sqrtm, capsys):
    fid = pytest.importorskip("cleanfid.fid")
    inception = pytest.importorskip("pytorch_fid.inception")
    from cleanfid import inception_torchscript

    state = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)

    class Script(nn.Module):
        """What clean-fid unpacks from its file: `layers` takes images of 299x299 that are scaled already."""

        def __init__(self) -> None:
            super().__init__()
            self.network = inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
            self.layers = lambda x: self.network(x)[0]
            self.layers.forward = self.layers

    class Wrapper(inception_torchscript.InceptionV3W):
        def __init__(self, *_: object, **__: object) -> None:
            nn.Module.__init__(self)
            self.base, self.resize_inside = Script(), False
            self.layers = self.base.layers

    network = Wrapper()
    get = dict(model=network, num_workers=0, batch_size=5, device=torch.device("cpu"), mode="clean", verbose=False)
    theirs = [fid.get_folder_features(str(folder), **get) for folder in folders]
    ours = [our_features(folder, inception_weights, "clean-fid").numpy() for folder in folders]
    for mine, reference in zip(ours, theirs, strict=True):
        close(mine, reference)
    expected = fid.fid_from_feats(*(features[:, :DIMENSIONS] for features in theirs))
    statistics = [features_to_statistics(torch.from_numpy(features[:, :DIMENSIONS])) for features in ours]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=TOLERANCE)
    options = ["--weights", inception_weights, "--convention", "clean-fid"]
    result = scores(capsys, *folders, *options)
    whole = [features_to_statistics(torch.from_numpy(features)) for features in theirs]
    assert result["fid"] == pytest.approx(frechet_distance(*whole), rel=TOLERANCE)
    # With as many images as a subset takes, all subsets are the whole set. Theirs in float64: in float32 its rounding
    # alone is a thousandth of these images' distance.
    doubles = [features.astype(np.float64) for features in theirs]
    assert result["kid"] == pytest.approx(fid.kernel_distance(*doubles, num_subsets=2), rel=TOLERANCE)


def test_the_conventions_differ(folders, inception_weights):
    features = {name: our_features(folders[0], inception_weights, name) for name in ("adm", "pytorch-fid", "clean-fid")}
    for first, second in (("adm", "pytorch-fid"), ("adm", "clean-fid"), ("pytorch-fid", "clean-fid")):
        spread = features[first].std(0).mean()
        assert (features[first] - features[second]).abs().max() > 10 * TOLERANCE * spread


def test_clean_fid_takes_images_of_several_sizes(folders, inception_weights, make_images, tmp_path, capsys):
    """Each is resized by itself, so the features are those of the folders with one size."""
    images = make_images(tmp_path / "a", 3, 3, (37, 45, 3), smooth=True)
    more = make_images(tmp_path / "b", 3, 4, (50, 30, 3), smooth=True)
    assert len(images) == len(more) == 3
    (tmp_path / "mixed" / "b").mkdir(parents=True)
    for folder, target in (("a", "mixed"), ("b", "mixed/b")):
        for path in (tmp_path / folder).iterdir():
            path.rename(tmp_path / target / path.name)
    mixed = our_features(tmp_path / "mixed", inception_weights, "clean-fid")
    single = our_features(tmp_path / "mixed" / "b", inception_weights, "clean-fid")
    torch.testing.assert_close(mixed[3:], single, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        evaluator.main([str(tmp_path / "mixed"), str(folders[0]), "--weights", str(inception_weights)])
    message = capsys.readouterr().err
    assert "images of more than one size: 000000_seed1234.png is 45x37, b/000000_seed1234.png is 30x50" in message
    assert "clean-fid" in message
