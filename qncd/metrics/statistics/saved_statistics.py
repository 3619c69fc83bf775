"""Files of statistics: mean and covariance of a reference set, in ADM's, pytorch-fid's and this package's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qncd.io.files import whole_file
from qncd.io.npz import Header, array_header, array_names, read_array
from qncd.metrics.statistics.moments import FeatureStatistics

LARGEST_DIMENSION = 4096  # twice Inception's
_LONGEST_TEXT = 4000  # bytes, 4 a letter
_KINDS = {"f": "floats", "i": "whole numbers", "u": "whole numbers without a sign", "U": "text"}


@dataclass(frozen=True, eq=False)
class SavedStatistics:
    """Statistics in a .npz file: mu and sigma under ADM's and pytorch-fid's names, mu_s and sigma_s for sFID.

    Attributes:
        path: the file.
        features: statistics for FID.
        spatial: statistics for sFID, None where the file has none.
        network: name of the feature extractor, None where the file does not say it.
        preprocessing: `Convention.preprocessing` behind the features, None where the file does not say it.
    """

    path: Path
    features: FeatureStatistics
    spatial: FeatureStatistics | None = None
    network: str | None = None
    preprocessing: str | None = None

    @property
    def count(self) -> int | None:
        return self.features.count

    @classmethod
    def open(cls, path: Path) -> SavedStatistics:
        """Read the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: arrays are missing, damaged, of another shape or dtype, or no mean and covariance.
        """
        there = set(array_names(path))
        for name in ("mu", "sigma", *(("sigma_s",) if "mu_s" in there else ()), *(("mu_s",) if "sigma_s" in there else ())):
            if name not in there:
                raise ValueError(f"{path}: statistics without the array '{name}'")
        count = None
        if "count" in there:
            _check_header(path, "count", "iu", ((), (1,)))
            count = int(read_array(path, "count").item())
            if count < 2:
                raise ValueError(f"{path}: statistics of {count} images: a covariance needs at least 2")
        features = _read_statistics(path, "mu", "sigma", count)
        spatial = _read_statistics(path, "mu_s", "sigma_s", count) if "mu_s" in there else None
        network, preprocessing = (_read_text(path, key) if key in there else None for key in ("network", "preprocessing"))
        return cls(path, features, spatial, network, preprocessing)

    def save(self, path: Path) -> None:
        """Write the statistics under the names that `open` reads."""
        arrays: dict[str, np.ndarray] = {"mu": self.features.mu, "sigma": self.features.sigma}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu, "sigma_s": self.spatial.sigma}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        for key in ("network", "preprocessing"):
            if getattr(self, key) is not None:
                arrays[key] = np.array(getattr(self, key))
        savez: Callable[..., None] = np.savez_compressed  # as typed by numpy, its own options would forbid ** of arrays
        with whole_file(path) as part, part.open("wb") as stream:  # a stream, because savez appends .npz to other names
            savez(stream, **arrays)


def _check_header(path: Path, name: str, kinds: str, shapes: Sequence[tuple[int, ...]] | None = None) -> Header:
    """The header of an array whose dtype is of these kinds, and whose shape is one of these."""
    header = array_header(path, name)
    if header.dtype.kind not in kinds or (shapes is not None and header.shape not in shapes):
        expected = f"a shape of {' or '.join(map(str, shapes))} and " if shapes is not None else ""
        words = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{path}: {name} is {header.dtype} {header.shape}, expected {expected}{words}")
    return header


def _read_statistics(path: Path, mean: str, covariance: str, count: int | None) -> FeatureStatistics:
    """Mean and covariance, whose shapes are compared before they are read."""
    shape = _check_header(path, mean, "fiu").shape
    if len(shape) != 1 or not 1 <= shape[0] <= LARGEST_DIMENSION:
        raise ValueError(f"{path}: {mean} of shape {shape}: expected (D,) with D from 1 to {LARGEST_DIMENSION}")
    _check_header(path, covariance, "fiu", (2 * shape,))
    mu, sigma = (read_array(path, name).astype(np.float64) for name in (mean, covariance))
    try:
        return FeatureStatistics(mu, sigma, count)
    except ValueError as error:
        raise ValueError(f"{path}: no usable statistics: {error} ({mean}, {covariance})") from None


def _read_text(path: Path, name: str) -> str:
    if _check_header(path, name, "U", ((),)).dtype.itemsize > _LONGEST_TEXT:
        raise ValueError(f"{path}: {name} is longer than {_LONGEST_TEXT // 4} letters")
    return str(read_array(path, name))
