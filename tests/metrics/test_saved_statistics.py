"""Files of statistics: read back, and refused by their headers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qncd.metrics.statistics.moments import FeatureStatistics
from qncd.metrics.statistics.saved_statistics import SavedStatistics

MU, SIGMA = np.arange(3.0), np.diag([1.0, 2.0, 0.0])


def test_statistics_come_back(tmp_path: Path) -> None:
    saved = SavedStatistics(
        tmp_path, FeatureStatistics(MU, SIGMA, 9), FeatureStatistics(MU[:2], SIGMA[:2, :2], 9), "inception", "255"
    )
    saved.save(tmp_path / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    found = SavedStatistics.open(tmp_path / "a.npz")
    assert (found.count, found.network, found.preprocessing) == (9, "inception", "255")
    assert found.spatial is not None
    for ours, theirs in ((found.features, saved.features), (found.spatial, saved.spatial)):
        assert theirs is not None
        np.testing.assert_array_equal(ours.mu, theirs.mu)
        np.testing.assert_array_equal(ours.sigma, theirs.sigma)


def test_other_layouts_are_read(tmp_path: Path) -> None:
    """pytorch-fid's, in any precision, byte order and order of the indices."""
    np.savez_compressed(tmp_path / "a.npz", mu=MU.astype(np.float16), sigma=np.asfortranarray(SIGMA.astype(">f4")))
    found = SavedStatistics.open(tmp_path / "a.npz")
    assert found.count is None and found.spatial is None and found.network is None
    np.testing.assert_array_equal(found.features.sigma, SIGMA)
    assert found.features.mu.dtype == found.features.sigma.dtype == np.float64


OBJECT = np.array([{"run": "this"}], dtype=object)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "statistics without the array 'sigma'"),
        ({"mu_s": MU}, "statistics without the array 'sigma_s'"),
        ({"sigma_s": SIGMA}, "statistics without the array 'mu_s'"),
        ({"mu": np.array(1.0)}, r"mu of shape \(\): expected \(D,\) with D from 1 to 4096"),
        ({"mu": np.zeros(5000)}, r"mu of shape \(5000,\): expected \(D,\) with D from 1 to 4096"),
        ({"mu": MU.astype(complex)}, r"mu is complex128 \(3,\), expected floats"),
        ({"sigma": np.eye(2)}, r"sigma is float64 \(2, 2\), expected a shape of \(3, 3\) and floats"),
        ({"sigma": OBJECT}, r"not a file with an array sigma, or damaged \(Python objects, expected numbers or text\)"),
        ({"sigma": SIGMA + np.inf}, "no usable statistics: the statistics hold NaN or infinite values"),
        ({"sigma": -SIGMA}, "no usable statistics: sigma has a variance of -2, allowed are 0 and more"),
        ({"sigma": SIGMA + np.tri(3)}, "no usable statistics: sigma is not symmetric"),
        ({"count": np.array([1, 2])}, r"count is int64 \(2,\), expected a shape of \(\) or \(1,\) and whole numbers"),
        ({"count": np.array(1)}, "statistics of 1 images: a covariance needs at least 2"),
        ({"network": np.array(3)}, r"network is int64 \(\), expected a shape of \(\) and text"),
        ({"preprocessing": np.array("x" * 1001)}, "preprocessing is longer than 1000 letters"),
    ],
)
def test_faulty_statistics_are_one_line(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    arrays = {"mu": MU, "sigma": SIGMA, **changes}
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"a.npz: {message}") as raised:
        SavedStatistics.open(tmp_path / "a.npz")
    assert "\n" not in str(raised.value)
