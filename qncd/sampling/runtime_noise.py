"""Inter noise: runtime noise estimation (QNCD, arXiv 2403.19140, section 3.3), relative to a full-precision control.

Symbols: x_t sample, e the quantized network's prediction, p the step after t, z fresh standard normal noise,
x^_t the re-noised sample, e^ the prediction there, d = e^ - (what e^ should be).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.config import CorrectionConfig
from qncd.rng import CORRECTOR_STREAM, ImageNoise
from qncd.sampling.correctors import Advance, Corrected, Denoiser
from qncd.sampling.schedule import Step


def is_due(index: int, interval: int) -> bool:
    """Whether step `index` (0 first) makes a new estimate: the released code's rule (l-2) % n == n // 2, l = index + 1."""
    return (index - 1) % interval == interval // 2 % interval


def estimate_difference(
    step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance, z: Tensor, target: str
) -> Tensor:
    """d = e^ - target at the re-noised sample, (N, C, H, W).

    x^_t = r x_p + sqrt(1-r^2) z with r = sqrt(abar_t/abar_p). Targets: "paper" z, the noise of this one step;
    "consistent" n = (x^_t - sqrt(abar_t) x0-hat) / sqrt(1-abar_t), all noise known to be in x^_t.
    """
    tentative = advance(eps)
    r = math.sqrt(step.abar / step.abar_prev)
    renoised = r * tentative.x_prev + math.sqrt(max(0.0, 1 - r * r)) * z
    predicted = denoise(renoised, step.t)
    if target == "paper":
        return predicted - z
    return predicted - (renoised - math.sqrt(step.abar) * tentative.x0) / math.sqrt(1 - step.abar)


@dataclass(frozen=True)
class NoiseTable:
    """The full-precision model's own estimates: what the estimator reports where there is no quantization noise.

    Attributes:
        indices: the S steps at which estimates are made.
        mean: (S, C) mean over images of each channel's mean(d).
        spread: (S, C) standard deviation over images of each channel's mean(d).
        spread_all: (S,) the same of the mean over all channels.
        variance: (S,) mean over images of var(d).
        target: what d was compared with.
    """

    indices: tuple[int, ...]
    mean: Tensor
    spread: Tensor
    spread_all: Tensor
    variance: Tensor
    target: str

    def at(self, index: int) -> int:
        """Row of step `index`. Raises ValueError where the table has none."""
        if index not in self.indices:
            raise ValueError(f"the noise table has no step {index}: it was made for other time steps or another interval")
        return self.indices.index(index)


class NoiseRecorder:
    """A corrector that corrects nothing and records the estimates of the model it watches, for a NoiseTable."""

    def __init__(self, config: CorrectionConfig) -> None:
        self.config = config
        self.means: dict[int, list[Tensor]] = {}
        self.variances: dict[int, list[Tensor]] = {}

    def begin(self, seeds: Sequence[int], device: str) -> None:
        self.noise = ImageNoise(seeds, CORRECTOR_STREAM)

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        if is_due(step.index, self.config.interval):
            z = self.noise.normal(x.shape[1:], x.device)
            d = estimate_difference(step, x, eps, denoise, advance, z, self.config.target)
            self.means.setdefault(step.index, []).append(d.mean((2, 3)).cpu())  # (N, C)
            self.variances.setdefault(step.index, []).append(d.var((1, 2, 3)).cpu())  # (N,)
        return Corrected(eps)

    def table(self) -> NoiseTable:
        """The table of everything recorded. Raises ValueError where nothing was, or from a single image."""
        indices = tuple(sorted(self.means))
        if not indices:
            raise ValueError(f"interval {self.config.interval}: no step makes an estimate; allowed are intervals below the steps")
        means = [torch.cat(self.means[i]) for i in indices]  # S x (N, C)
        if len(means[0]) < 2:
            raise ValueError("the full-precision noise table needs 2 images or more")
        return NoiseTable(
            indices=indices,
            mean=torch.stack([m.mean(0) for m in means]),
            spread=torch.stack([m.std(0) for m in means]),
            spread_all=torch.stack([m.mean(1).std() for m in means]),
            variance=torch.stack([torch.cat(self.variances[i]).mean() for i in indices]),
            target=self.config.target,
        )


class RuntimeNoiseCorrector:
    """Estimates the mean and variance of the quantization noise while sampling, and takes them out.

    Args:
        config: how; with `control` the full-precision table is subtracted from every estimate.
        table: needed for `control` and `shrink`.

    Raises:
        ValueError: no table where one is needed, or one for another target.
    """

    def __init__(self, config: CorrectionConfig, table: NoiseTable | None = None) -> None:
        if (config.control or config.shrink) and table is None:
            raise ValueError("control and shrink need the full-precision model's noise table")
        if table is not None and table.target != config.target:
            raise ValueError(f"the noise table was made for target {table.target!r}, not {config.target!r}")
        self.config = config
        self.reference = table

    def begin(self, seeds: Sequence[int], device: str) -> None:
        self.noise = ImageNoise(seeds, CORRECTOR_STREAM)
        self.mean: Tensor | float = 0.0
        self.variance: Tensor | None = None

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        if is_due(step.index, self.config.interval):
            z = self.noise.normal(x.shape[1:], x.device)
            self._update(step, estimate_difference(step, x, eps, denoise, advance, z, self.config.target))
        return Corrected(eps - self.mean, self.variance)

    def _update(self, step: Step, d: Tensor) -> None:
        statistics, table = self.config.statistics, self.reference
        dims = {"batch": (0, 1, 2, 3), "sample": (1, 2, 3), "channel": (2, 3)}[statistics]
        mean = d.mean(dims, keepdim=True)
        variance = d.var(dims, keepdim=True)
        if table is not None:
            row = table.at(step.index)
            if self.config.control:
                known = table.mean[row].to(d)
                mean = mean - (known.view(1, -1, 1, 1) if statistics == "channel" else known.mean())
                variance = (variance - table.variance[row].to(d)).clamp(min=0)
            if self.config.shrink:
                spread = table.spread[row].view(1, -1, 1, 1) if statistics == "channel" else table.spread_all[row]
                noise = spread.to(d).square() / (len(d) if statistics == "batch" else 1)
                mean = mean * (1 - noise / mean.square().clamp(min=1e-20)).clamp(min=0)
        self.mean = mean
        self.variance = variance if self.config.correct_variance else None
