"""The images of a run, with those of full precision of the same seeds, and how far apart they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qncd.metrics.networks.text import PROMPTS_FILE, find_prompts
from qncd.metrics.report.image_files import match_channels, read_image
from qncd.metrics.report.sources import ImageFolder
from qncd.metrics.statistics.bootstrap import Interval, interval, resampled_shifts
from qncd.metrics.statistics.moments import PairedQuality, mse_to_psnr, paired_mse
from qncd.metrics.statistics.paired import LPIPS_SIZE, Lpips, lpips_obstacle

RESAMPLES = 2000  # of the intervals


@dataclass(frozen=True)
class Pairs:
    """A folder of images, and one of full precision.

    Attributes:
        folder, full: of the images, and of those of full precision.
        names: file names of the images, in their order.
        paired: those of them that full precision has too.
    """

    folder: Path
    full: Path
    names: tuple[str, ...]
    paired: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, full: Path) -> Pairs:
        """List the images of both, none where there is no folder. Raises ValueError where a file is no image."""
        names, others = _listed(folder), set(_listed(full))
        return cls(folder, full, names, tuple(name for name in names if name in others))

    def image(self, name: str) -> np.ndarray:
        """One image, uint8 (H, W, 1 or 3). Raises ValueError where it cannot be read."""
        return read_image(self.folder / name)

    def exact(self, name: str) -> np.ndarray:
        """That of full precision. Raises ValueError where it cannot be read."""
        return read_image(self.full / name)

    @functools.cached_property
    def mse(self) -> np.ndarray:
        """(P,) squared error of each pair on the scale of 0 to 255. Raises ValueError where two images differ in size."""
        return np.concatenate([paired_mse(*self.pair(name)) for name in self.paired]) if self.paired else np.empty(0)

    @property
    def psnr(self) -> np.ndarray:
        """(P,) in dB; infinite where two images are equal."""
        return mse_to_psnr(self.mse)

    @functools.cached_property
    def quality(self) -> PairedQuality | None:
        """PSNR over the pairs that differ; None where none do."""
        changed = self.mse[self.mse > 0]
        return PairedQuality.of(changed) if len(changed) else None

    @functools.cached_property
    def interval(self) -> Interval | None:
        """Of the mean PSNR, over images; None for fewer than 2 that differ."""
        psnr = self.psnr[np.isfinite(self.psnr)]
        if len(psnr) < 2:
            return None
        return interval(float(psnr.mean()), resampled_shifts({"psnr": psnr - psnr.mean()}, RESAMPLES)["psnr"])

    @functools.cached_property
    def lpips(self) -> np.ndarray | None:
        """(P,) LPIPS of each pair; None where `lpips_missing` says why."""
        if self.lpips_missing:
            return None
        network = _lpips_network()
        return np.concatenate([network(*self.pair(name)) for name in self.paired])

    @functools.cached_property
    def lpips_missing(self) -> str | None:
        """Why there is no LPIPS."""
        if not self.paired:
            return "no pairs"
        side = min(self.image(self.paired[0]).shape[:2])
        return lpips_obstacle() or (f"images of {side} pixels, it needs {LPIPS_SIZE}" if side < LPIPS_SIZE else None)

    @functools.cached_property
    def prompts(self) -> dict[str, str]:
        """Of the images by their names; empty where the run wrote none. Raises ValueError where the file is damaged."""
        if not self.names or not (self.folder.parent / PROMPTS_FILE).is_file():
            return {}
        source = ImageFolder.open(self.folder)
        return dict(zip(source.names, find_prompts(source), strict=True))

    def psnr_of(self, name: str) -> float:
        """In dB."""
        return float(self.psnr[self.paired.index(name)])

    def lpips_of(self, name: str) -> float | None:
        """Of one pair, where it can be had."""
        return None if self.lpips is None else float(self.lpips[self.paired.index(name)])

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(1, H, W, C) of full precision and of the image."""
        exact, image = self.exact(name), self.image(name)
        exact, image = (match_channels(side, max(exact.shape[2], image.shape[2]), name) for side in (exact, image))
        if exact.shape != image.shape:
            sizes = f"{exact.shape[1]}x{exact.shape[0]} and {image.shape[1]}x{image.shape[0]}"
            raise ValueError(f"{self.folder / name}: full precision and this image are {sizes} pixels")
        return exact[None], image[None]


def _listed(folder: Path) -> tuple[str, ...]:
    """Names of the images in a folder, none where there is no folder, or an empty one."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return ()
    return ImageFolder.open(folder).names


@functools.cache
def _lpips_network() -> Lpips:
    return Lpips()
