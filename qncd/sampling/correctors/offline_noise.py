"""Offline noise correction, the peers of QNCD: PTQD (arXiv 2305.10657) and D2-DPM (arXiv 2501.08180).

Both compare the quantized network with the full-precision one at the same inputs, step by step along calibration
trajectories, and correct by what they saw. Symbols: e full-precision prediction, e~ the quantized network's,
d = e~ - e.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.recipe import Recipe, check_choice
from qncd.sampling.corrector import Advance, Corrected, Corrector, CorrectorKind, Denoiser, Predictions, Runs, check_record
from qncd.sampling.schedule import Step

KINDS = ("ptqd", "d2dpm")
OUTLIERS = 4.0  # D2-DPM leaves out pairs further than so many standard deviations from their mean
LARGEST_CORRELATION = 0.9999
CONSTANT = 1e-24  # of the mean square: a variance below it is that of rounding errors
FIELDS = ("slope", "bias", "residual", "mean_e", "mean_d", "std_e", "std_d", "correlation")


@dataclass(frozen=True)
class OfflineStatistics:
    """What quantization did to the noise prediction at each of S steps.

    Attributes:
        slope: (S,) least-squares slope of d - mean(d) on e - mean(e): PTQD's k, before it is cut at 0.
        bias: (S, C) channel means of d - k e with that k, cut.
        residual: (S,) standard deviation of (d - k e)/(1 + k), channel means taken out.
        mean_e, mean_d, std_e, std_d, correlation: (S,) the 2-D Gaussian of (e~, d), outliers left out.
        images: how many they were made from.
    """

    slope: Tensor
    bias: Tensor
    residual: Tensor
    mean_e: Tensor
    mean_d: Tensor
    std_e: Tensor
    std_d: Tensor
    correlation: Tensor
    images: int

    def to_tensors(self) -> tuple[dict[str, Tensor], str]:
        """The tensors by name, and the rest as JSON: what a safetensors file holds."""
        return {name: getattr(self, name).contiguous() for name in FIELDS}, json.dumps({"images": self.images})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], head: str) -> OfflineStatistics:
        """The inverse of `to_tensors`. Raises KeyError for what is missing, TypeError or ValueError for something else."""
        record = cls(**{name: tensors[name] for name in FIELDS}, images=json.loads(head)["images"])
        check_record(record, {name: ("S", "C") if name == "bias" else ("S",) for name in FIELDS}, record.images)
        if bool((record.correlation.abs() > 1).any()) or any(bool((v < 0).any()) for v in (record.std_e, record.std_d)):
            raise ValueError("a correlation beyond 1, or a negative standard deviation")
        return record

    @property
    def channels(self) -> int:
        """C of the predictions that it corrects."""
        return self.bias.shape[-1]


class OfflineRecorder:
    """Keeps pairs (e~, e) at every step of the full-precision model's trajectories: what `Runs.compare` shows.

    Args:
        keep: pixels of each image kept for the 2-D Gaussian, evenly spread, which bounds the memory.
    """

    def __init__(self, keep: int = 4096) -> None:
        self.keep = keep
        self.pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def kept(self) -> tuple[dict[int, list[tuple[Tensor, Tensor]]], ...]:
        return (self.pairs,)

    def __call__(self, step: Step, x: Tensor, rough: Tensor, exact: Tensor) -> None:
        rough, exact = rough.flatten(2), exact.flatten(2)  # (N, C, H W)
        stride = max(1, exact.shape[1] * exact.shape[2] // self.keep)
        pair = (rough[..., ::stride].cpu(), exact[..., ::stride].cpu())
        self.pairs.setdefault(step.index, []).append(pair)

    def statistics(self) -> OfflineStatistics:
        """Of everything seen. Raises ValueError where nothing was, steps are missing, or a prediction is NaN or infinite."""
        if not self.pairs or sorted(self.pairs) != list(range(len(self.pairs))):
            raise ValueError("the recorder has not seen every step")
        rows = []
        for index in range(len(self.pairs)):
            rough = torch.cat([pair[0] for pair in self.pairs[index]]).double()  # (N, C, P)
            exact = torch.cat([pair[1] for pair in self.pairs[index]]).double()
            if not bool(torch.isfinite(rough).all() and torch.isfinite(exact).all()):
                raise ValueError(f"step {index}: a noise prediction is NaN or infinite")
            rows.append(_ptqd_row(rough, exact) | _gaussian_row(rough, rough - exact))
        stacked = {name: torch.stack([row[name] for row in rows]).float() for name in FIELDS}
        if not all(bool(torch.isfinite(values).all()) for values in stacked.values()):
            raise ValueError("the statistics of the quantization noise are too large for float32")
        return OfflineStatistics(**stacked, images=sum(len(pair[0]) for pair in self.pairs[0]))


def _ptqd_row(rough: Tensor, exact: Tensor) -> dict[str, Tensor]:
    error = rough - exact
    centred = exact - exact.mean()
    energy = centred.square().sum()
    slope = (centred * (error - error.mean())).sum() / energy.clamp(min=1e-30)
    if energy <= CONSTANT * exact.square().sum():
        slope = torch.zeros_like(slope)  # what is left of a constant prediction are the rounding errors of its mean
    k = slope.clamp(min=0)
    rest = error - k * exact  # (N, C, P)
    bias = rest.mean((0, 2))
    return {"slope": slope, "bias": bias, "residual": _std((rest - bias[:, None]) / (1 + k))}


def _gaussian_row(rough: Tensor, error: Tensor) -> dict[str, Tensor]:
    e, d = rough.flatten(), error.flatten()
    inside = _inside(e) & _inside(d)
    e, d = e[inside], d[inside]
    std_e, std_d = _std(e), _std(d)
    covariance = ((e - e.mean()) * (d - d.mean())).mean()
    correlation = covariance / (std_e * std_d).clamp(min=1e-30)
    return {
        "mean_e": e.mean(), "mean_d": d.mean(), "std_e": std_e, "std_d": std_d,
        "correlation": correlation.clamp(-LARGEST_CORRELATION, LARGEST_CORRELATION),
    }  # fmt: skip


def _std(values: Tensor) -> Tensor:
    """Standard deviation, of a single value 0."""
    return values.std(correction=min(1, values.numel() - 1))


def _inside(values: Tensor) -> Tensor:
    """Which of the values are no outliers; all of those that are constant but for the rounding errors of their mean."""
    distance = (values - values.mean()).abs()
    return distance <= (OUTLIERS * _std(values)).clamp(min=CONSTANT**0.5 * float(values.abs().max()))


class OfflineCorrector:
    """Corrects every prediction by the statistics of its step; costs no network call.

    ptqd   e' = (e~ - b)/(1 + k), k = max(k, 0); the rest has the variance residual^2 (PTQD, eq. 8 to 12)
    d2dpm  e' = e~ - m, m = mu_d + rho (sd_d/sd_e)(e~ - mu_e); the rest has sd_d^2 (1 - rho^2) (D2-DPM, eq. 10)

    Args:
        kind: "ptqd" or "d2dpm".
        statistics: of the same time steps.
    """

    def __init__(self, kind: str, statistics: OfflineStatistics) -> None:
        check_choice("kind", kind, KINDS)
        self.kind, self.statistics = kind, statistics

    def begin(self, seeds: Sequence[int], device: str) -> None:
        """Nothing: the statistics hold for every image."""

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        s, i = self.statistics, step.index
        if i >= len(s.slope):
            raise ValueError(f"the offline statistics have {len(s.slope)} steps, none for step {i}: made for another sampler")
        if self.kind == "ptqd":
            k = s.slope[i].clamp(min=0).to(eps)
            return Corrected((eps - s.bias[i].to(eps).view(1, -1, 1, 1)) / (1 + k), s.residual[i].square().to(eps))
        gain = (s.correlation[i] * s.std_d[i] / s.std_e[i].clamp(min=1e-12)).to(eps)
        mean = s.mean_d[i].to(eps) + gain * (eps - s.mean_e[i].to(eps))
        return Corrected(eps - mean, (s.std_d[i].square() * (1 - s.correlation[i].square())).to(eps))


class PTQD(CorrectorKind):
    """PTQD (arXiv 2305.10657)."""

    prefix, record = "offline", OfflineStatistics
    name = "ptqd"

    def before(self, runs: Runs, recipe: Recipe) -> Predictions:
        return runs.predictions()

    def fit(self, runs: Runs, recipe: Recipe, seen: Predictions) -> OfflineStatistics:
        recorder = OfflineRecorder()
        runs.compare(seen, recorder)
        return recorder.statistics()

    def corrector(self, recipe: Recipe, record: OfflineStatistics) -> Corrector:
        return OfflineCorrector(self.name, record)


class D2DPM(PTQD):
    """D2-DPM (arXiv 2501.08180): another use of the same statistics."""

    name = "d2dpm"
