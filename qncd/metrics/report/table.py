"""The figures with their conventions: as lines of text, as JSON, and as differences of two sets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qncd.metrics.statistics.bootstrap import Interval, interval, resampled_shifts

# Every figure that there can be, in the order in which they are printed; the rest of JSON is null.
KEYS = (
    "fid", "sfid", "inception_score_mean", "inception_score_adm", "kid", "precision", "recall",
    "clip_score", "clip_iqa", "psnr", "psnr_of_mean", "psnr_p5", "poor", "ssim", "mse", "lpips",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Score:
    """One figure.

    Attributes:
        key: its name in JSON.
        label: its name in print.
        value: the figure.
        how: its convention.
        digits: format of the value.
        unit: behind the value.
        std: over splits or subsets, None where there are none.
        influence: (N,) float64 of mean 0, what each synthetic image adds; None where no interval can be had.

    Raises:
        ValueError: the figure is NaN.
    """

    key: str
    label: str
    value: float
    how: str
    digits: str = ".4f"
    unit: str = ""
    std: float | None = None
    influence: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise ValueError(f"{self.label} is NaN")


def mean_score(key: str, label: str, values: np.ndarray, how: str, digits: str = ".4f", unit: str = "") -> Score:
    """A figure that is the mean of one value an image."""
    mean = float(values.mean())
    influence = values - mean if math.isfinite(mean) else None
    return Score(key, label, mean, how, digits, unit, influence=influence)


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity: equal images have a PSNR of "inf"."""
    return ("inf" if value > 0 else "-inf") if value is not None and math.isinf(value) else value


def _bounds(bounds: Interval, score: Score) -> str:
    return f"{bounds.low:{score.digits}} to {bounds.high:{score.digits}}"


@dataclass(frozen=True, eq=False)
class Result:
    """The figures of one set of synthetic images.

    Attributes:
        network: name of the feature extractor.
        convention: network and resize in words.
        count_real, count_synthetic: images on each side, None for statistics of an unknown number.
        scores: the figures that could be had.
        splits: of the inception score over equal parts, None without one.
        pairs: image pairs behind PSNR and its like.
        names: of the synthetic images, None where they have none.
        bootstrap: resamples of the intervals, 0 for none.
        notes: one line each; why a figure is missing, what to beware of.
    """

    network: str
    convention: str
    count_real: int | None
    count_synthetic: int | None
    scores: tuple[Score, ...] = ()
    splits: int | None = None
    pairs: int = 0
    names: tuple[str, ...] | None = field(default=None, repr=False)
    bootstrap: int = 0
    notes: tuple[str, ...] = ()

    def intervals(self) -> dict[str, Interval]:
        """The 95 % interval of each figure that has one; empty without resamples."""
        influences = {s.key: s.influence for s in self.scores if s.influence is not None and len(s.influence) > 1}
        if self.bootstrap == 0:
            return {}
        shifts = resampled_shifts(influences, self.bootstrap)
        return {s.key: interval(s.value, shifts[s.key]) for s in self.scores if s.key in shifts}

    def rows(self) -> list[str]:
        """One line for each figure, with its interval where there is one."""
        intervals = self.intervals()
        rows = []
        for score in self.scores:
            text = f"{score.value:{score.digits}}" + ("" if score.std is None else f" +- {score.std:{score.digits}}") + score.unit
            if score.key in intervals:
                text = f"{text:<20} 95 %: {_bounds(intervals[score.key], score)}"
            rows.append(f"{score.label:<9} {text}")
        return rows

    def remarks(self) -> list[str]:
        """The convention of each figure, that of the features once, and the notes."""
        own = f"; {self.convention}"
        labels: dict[str, list[str]] = {}
        for score in self.scores:
            labels.setdefault(score.how.removesuffix(own), []).append(score.label)
        said = [f"{', '.join(names)}: {how}" for how, names in labels.items()]
        if any(score.how.endswith(own) for score in self.scores):
            said.append(f"features: {self.convention}")
        return said + [f"note: {note}" for note in self.notes]

    def to_json(self) -> dict[str, object]:
        """Every key of KEYS with its figure or None, `KEY_std` and the rest; an infinite PSNR is the text "inf"."""
        document: dict[str, object] = {
            "network": self.network,
            "convention": self.convention,
            "count_real": self.count_real,
            "count_synthetic": self.count_synthetic,
        }
        document |= dict.fromkeys((*KEYS, "inception_score_std", "inception_score_splits", "kid_std"))
        for score in self.scores:
            document[score.key] = _number(score.value)
            if score.std is not None:
                document[f"{score.key.removesuffix('_mean')}_std"] = score.std
        document |= {"inception_score_splits": self.splits, "pairs": self.pairs, "notes": list(self.notes)}
        document["how"] = {score.key: score.how for score in self.scores}
        document["bootstrap"] = self.bootstrap
        document["intervals"] = {key: [bounds.low, bounds.high] for key, bounds in self.intervals().items()}
        return document


@dataclass(frozen=True)
class Difference:
    """One figure of the synthetic images less that of the baseline's."""

    score: Score
    value: float
    bounds: Interval | None

    def row(self) -> str:
        sign = self.score.digits if self.score.digits.startswith("+") else f"+{self.score.digits}"
        text = f"{self.value:{sign}}{self.score.unit}"
        if self.bounds is not None:
            verdict = "differs from 0" if self.bounds.excludes_zero else "no more than noise"
            text = f"{text:<20} 95 %: {self.bounds.low:{sign}} to {self.bounds.high:{sign}}, {verdict}"
        return f"{self.score.label:<9} {text}"


def paired_by(result: Result, baseline: Result) -> str | None:
    """How the images of two sets belong together, None where they do not."""
    if result.names is not None and result.names == baseline.names:
        return "same file names"
    unnamed = result.names is None and baseline.names is None
    return "same order" if unnamed and result.count_synthetic == baseline.count_synthetic else None


def differences(result: Result, baseline: Result) -> tuple[list[Difference], str]:
    """The figures of `result` less those of `baseline`, with intervals, and how these came about.

    Images of the same seeds are drawn together, so what both sets share cancels; others are drawn independently.
    """
    theirs = {score.key: score for score in baseline.scores}
    pairs = [(score, theirs[score.key]) for score in result.scores if score.key in theirs]
    pairs = [(a, b) for a, b in pairs if math.isfinite(a.value) and math.isfinite(b.value)]
    pairing = paired_by(result, baseline)
    known = {a.key: (a.influence, b.influence) for a, b in pairs if a.influence is not None and b.influence is not None}
    shifts: dict[str, np.ndarray] = {}
    if result.bootstrap and pairing is not None:
        shifts = resampled_shifts({key: a - b for key, (a, b) in known.items()}, result.bootstrap)
    elif result.bootstrap:
        ours = resampled_shifts({key: a for key, (a, _) in known.items()}, result.bootstrap, seed=1)
        others = resampled_shifts({key: b for key, (_, b) in known.items()}, result.bootstrap, seed=2)
        shifts = {key: ours[key] - others[key] for key in known}
    how = f"paired: {pairing}" if pairing else "not paired: other file names or another number of images"
    rows = []
    for a, b in pairs:
        value = a.value - b.value
        rows.append(Difference(a, value, interval(value, shifts[a.key]) if a.key in shifts else None))
    return rows, f"SYNTH less baseline, {how}"


def differences_to_json(rows: Iterable[Difference], how: str) -> dict[str, object]:
    """Key -> value and interval of each difference."""
    figures = {
        row.score.key: {"value": row.value, "interval": None if row.bounds is None else [row.bounds.low, row.bounds.high]}
        for row in rows
    }
    return {"how": how, "figures": figures}
