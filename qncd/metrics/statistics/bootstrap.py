"""Percentile intervals from per-image influences: one figure, or the difference of two sets of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """Bounds between which the middle 95 % of the resamples lie."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def resampled_shifts(influences: Mapping[str, np.ndarray], resamples: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """How far each figure moves when the images are drawn again with replacement, (resamples,) float64.

    All figures see the same draws, so they may be subtracted from one another.

    Args:
        influences: figure -> (N,) of mean 0, for the same N images.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        ValueError: different numbers of images, or fewer than 2.
    """
    names = list(influences)
    if not names:
        return {}
    counts = {len(values) for values in influences.values()}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(f"influences of {sorted(counts)} images: expected one number, at least 2")
    stacked = np.stack([influences[name] for name in names], 1)  # (N, figures)
    count = len(stacked)
    rng = np.random.default_rng(seed)
    shifts = np.empty((resamples, len(names)))
    for i in range(resamples):
        times = np.bincount(rng.integers(0, count, count), minlength=count)
        shifts[i] = times @ stacked / count
    return {name: shifts[:, i] for i, name in enumerate(names)}


def interval(value: float, shifts: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The figure with the percentiles of its shifts around it."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(shifts, [tail, 1 - tail])
    return Interval(value + float(low), value + float(high))
