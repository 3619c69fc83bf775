"""Files of statistics: mean and covariance of a reference set, in ADM's, pytorch-fid's and this package's layout."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qncd.metrics.statistics.moments import FeatureStatistics

ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError)


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
            ValueError: arrays are missing, do not belong together, or hold NaN.
        """
        try:
            with np.load(path) as file:
                wanted = ("mu", "sigma", "mu_s", "sigma_s", "count", "network", "preprocessing")
                arrays = {name: file[name] for name in wanted if name in file.files}
            count = int(arrays["count"]) if "count" in arrays else None
            features = FeatureStatistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64), count)
            spatial = None
            if "mu_s" in arrays:
                spatial = FeatureStatistics(arrays["mu_s"].astype(np.float64), arrays["sigma_s"].astype(np.float64), count)
        except KeyError as error:
            raise ValueError(f"{path}: statistics without the array {error}") from None
        except (ValueError, TypeError, *ARCHIVE_ERRORS) as error:
            raise ValueError(f"{path}: no usable statistics: {error}") from None
        network, preprocessing = (str(arrays[key]) if key in arrays else None for key in ("network", "preprocessing"))
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
        with path.open("wb") as stream:  # a stream, because savez appends .npz to other names
            savez(stream, **arrays)
