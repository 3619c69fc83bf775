"""Inter noise: runtime noise estimation (QNCD, arXiv 2403.19140, section 3.3), relative to a full-precision control.

Symbols: x_t sample, e the quantized network's prediction, p the step after t, z fresh standard normal noise,
x^_t the re-noised sample, e^ the prediction there, d = e^ - (what e^ should be).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.recipe import TARGETS, CorrectionConfig, OptionError, Recipe, check_choice, check_int
from qncd.rng import CORRECTOR_STREAM, ImageNoise
from qncd.sampling.corrector import Advance, Corrected, Corrector, CorrectorKind, Denoiser, check_record
from qncd.sampling.schedule import Step

SHRINK_SPREADS = 3.0  # an estimate within so many standard deviations of the estimator corrects nothing
TABLE_TENSORS = ("coefficients", "spread", "coefficients_all", "spread_all", "variance")
_SHAPES = (("S", "C", 3), ("S", "C"), ("S", 3), ("S",), ("S",))


def is_due(index: int, interval: int) -> bool:
    """Whether step `index` (0 first) makes a new estimate: the released code's rule (l-2) % n == n // 2, l = index + 1."""
    return (index - 1) % interval == interval // 2 % interval


@dataclass(frozen=True)
class Estimate:
    """One estimate d = e^ - target (N, C, H, W) and the two inputs whose means it moves with: x^_t and z."""

    d: Tensor
    renoised: Tensor
    z: Tensor

    def predictors(self) -> Tensor:
        """(N, C, 3): 1, mean(x^_t), mean(z) of every image and channel."""
        means = [v.mean((2, 3)) for v in (self.renoised, self.z)]
        return torch.stack([torch.ones_like(means[0]), *means], 2)


def estimate_noise(step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance, z: Tensor, target: str) -> Estimate:
    """Re-noise the trial step and predict again.

    x^_t = r x_p + sqrt(sigma_t^2 - r^2 sigma_p^2) z with r = alpha_t/alpha_p. Targets: "paper" z, the noise of this one step;
    "consistent" n = (x^_t - alpha_t x0-hat) / sigma_t, all noise that x0-hat says is in x^_t.
    """
    tentative = advance(eps)
    renoised = step.kept * tentative.x_prev + step.renoise * z
    predicted = denoise(renoised, step.t)
    if target == "paper":
        return Estimate(predicted - z, renoised, z)
    n = (renoised - step.alpha * tentative.x0) / step.noise
    return Estimate(predicted - n, renoised, z)


@dataclass(frozen=True)
class NoiseTable:
    """The full-precision model's own estimates: what the estimator reports where there is no quantization noise.

    An image's mean(d) differs from the next one's because the images differ. Most of that follows from the means of
    x^_t and z, which are known while sampling, so the table holds a regression on them at each step.

    Attributes:
        indices: the S steps at which estimates are made.
        coefficients: (S, C, 3) of 1, mean(x^_t) and mean(z), for the mean over one channel.
        spread: (S, C) standard deviation of what the regression leaves.
        coefficients_all: (S, 3), spread_all: (S,): the same for the mean over all channels.
        variance: (S,) mean over images of var(d).
        images: how many the table was made from.
        target: what d was compared with.
    """

    indices: tuple[int, ...]
    coefficients: Tensor
    spread: Tensor
    coefficients_all: Tensor
    spread_all: Tensor
    variance: Tensor
    images: int
    target: str

    def to_tensors(self) -> tuple[dict[str, Tensor], str]:
        """The tensors by name, and the rest as JSON: what a safetensors file holds."""
        tensors = {name: getattr(self, name).contiguous() for name in TABLE_TENSORS}
        return tensors, json.dumps({"indices": self.indices, "images": self.images, "target": self.target})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], head: str) -> NoiseTable:
        """The inverse of `to_tensors`. Raises KeyError for what is missing, TypeError or ValueError for something else."""
        plain = json.loads(head)
        named = {name: tensors[name] for name in TABLE_TENSORS}
        table = cls(indices=tuple(plain["indices"]), images=plain["images"], target=plain["target"], **named)
        check_record(table, dict(zip(TABLE_TENSORS, _SHAPES, strict=True)), table.images)
        check_choice("target", table.target, TARGETS)
        for index in table.indices:
            check_int("indices", index, 0)
        if len(set(table.indices)) != len(table.spread):
            raise ValueError(f"indices of {len(table.indices)} steps for a table of {len(table.spread)}")
        return table

    @property
    def channels(self) -> int:
        """C of the predictions that it corrects."""
        return self.spread.shape[-1]

    def at(self, index: int) -> int:
        """Row of step `index`. Raises ValueError where the table has none."""
        if index not in self.indices:
            raise ValueError(f"the noise table has no step {index}: it was made for other time steps or another interval")
        return self.indices.index(index)


def _regress(predictors: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of means (N,) on predictors (N, 3): coefficients (3,) and the standard deviation of the rest."""
    # Exactly constant or equal predictors leave coefficients undetermined: gelsd picks the smallest ones.
    solution = torch.linalg.lstsq(predictors.double(), means.double()[:, None], driver="gelsd").solution
    rest = means.double() - (predictors.double() @ solution)[:, 0]
    return solution[:, 0].float(), (rest.square().sum() / max(1, len(means) - 3)).sqrt().float()


def _variance(d: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    """Over some dimensions, which are kept; of a single value 0."""
    count = math.prod(d.shape[dimension] for dimension in dimensions)
    return d.var(dimensions, correction=min(1, count - 1), keepdim=True)


def check_table_images(images: int) -> None:
    """Raise ValueError for fewer images than the regression of a noise table has a use for."""
    if images < 4:
        raise ValueError(f"the full-precision noise table needs 4 images or more, not {images}")


def check_interval(interval: int, steps: int) -> None:
    """Raise OptionError where none of a sampler's steps makes an estimate."""
    if not any(is_due(index, interval) for index in range(steps)):
        raise OptionError("interval", f"interval {interval}: none of the {steps} steps would make an estimate")


class NoiseRecorder:
    """A corrector that corrects nothing and records the estimates of the model it watches, for a NoiseTable."""

    def __init__(self, config: CorrectionConfig, images: int | None = None) -> None:
        """`images`: how many will be recorded, where known. Raises ValueError at once if they are too few."""
        if images is not None:
            check_table_images(images)
        self.config = config
        self.means: dict[int, list[Tensor]] = {}
        self.predictors: dict[int, list[Tensor]] = {}
        self.variances: dict[int, list[Tensor]] = {}

    @property
    def kept(self) -> tuple[dict[int, list[Tensor]], ...]:
        return self.means, self.predictors, self.variances

    def begin(self, seeds: Sequence[int], device: str) -> None:
        self.noise = ImageNoise(seeds, CORRECTOR_STREAM)

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        if is_due(step.index, self.config.interval):
            z = self.noise.normal(x.shape[1:], x.device)
            estimate = estimate_noise(step, x, eps, denoise, advance, z, self.config.target)
            if not bool(torch.isfinite(estimate.d).all()):
                raise ValueError(f"step {step.index}: an estimate of the noise is NaN or infinite")
            self.means.setdefault(step.index, []).append(estimate.d.mean((2, 3)).cpu())  # (N, C)
            self.predictors.setdefault(step.index, []).append(estimate.predictors().cpu())  # (N, C, 3)
            self.variances.setdefault(step.index, []).append(_variance(estimate.d, (1, 2, 3)).flatten().cpu())  # (N,)
        return Corrected(eps)

    def table(self) -> NoiseTable:
        """The table of everything recorded. Raises ValueError where nothing was, or from fewer than 4 images."""
        indices = tuple(sorted(self.means))
        if not indices:
            raise ValueError(f"interval {self.config.interval}: no step makes an estimate; allowed are intervals below the steps")
        means = [torch.cat(self.means[i]) for i in indices]  # S x (N, C)
        predictors = [torch.cat(self.predictors[i]) for i in indices]  # S x (N, C, 3)
        check_table_images(len(means[0]))
        channels = range(means[0].shape[1])
        single = [[_regress(p[:, c], m[:, c]) for c in channels] for p, m in zip(predictors, means, strict=True)]
        pooled = [_regress(p.mean(1), m.mean(1)) for p, m in zip(predictors, means, strict=True)]
        return NoiseTable(
            indices=indices,
            coefficients=torch.stack([torch.stack([c[0] for c in row]) for row in single]),
            spread=torch.stack([torch.stack([c[1] for c in row]) for row in single]),
            coefficients_all=torch.stack([c[0] for c in pooled]),
            spread_all=torch.stack([c[1] for c in pooled]),
            variance=torch.stack([torch.cat(self.variances[i]).mean() for i in indices]),
            images=len(means[0]),
            target=self.config.target,
        )


class RuntimeNoiseCorrector:
    """Estimates the mean and variance of the quantization noise while sampling, and takes them out.

    Args:
        config: how; with `control` what the full-precision model would report is subtracted from every estimate.
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
            self._update(step, estimate_noise(step, x, eps, denoise, advance, z, self.config.target))
        return Corrected(eps - self.mean, self.variance)

    def _update(self, step: Step, estimate: Estimate) -> None:
        statistics, table = self.config.statistics, self.reference
        mean = estimate.d.mean((2, 3))  # (N, C)
        variance = _variance(estimate.d, {"batch": (0, 1, 2, 3), "sample": (1, 2, 3), "channel": (2, 3)}[statistics])
        if statistics != "channel":
            mean = mean.mean(1, keepdim=True)  # (N, 1)
        spread = torch.zeros(1)
        if table is not None:
            row = table.at(step.index)
            if statistics == "channel":
                coefficients, predictors, spread = table.coefficients[row], estimate.predictors(), table.spread[row]
            else:
                coefficients, predictors = table.coefficients_all[row], estimate.predictors().mean(1, keepdim=True)
                spread = table.spread_all[row]
            if self.config.control:
                mean = mean - (predictors * coefficients.to(predictors)).sum(2)
                variance = (variance - table.variance[row].to(variance)).clamp(min=0)
        if statistics == "batch":
            mean = mean.mean(0, keepdim=True)
        if table is not None and self.config.shrink:
            # The estimate's own variance: of the images it averages, and of the table.
            averaged = len(estimate.d) if statistics == "batch" else 1
            noise = spread.to(mean).square() * (1 / averaged + 3 / table.images)
            mean = mean * (1 - SHRINK_SPREADS**2 * noise / mean.square().clamp(min=1e-20)).clamp(min=0)
        self.mean = mean[:, :, None, None]
        self.variance = variance if self.config.correct_variance else None


class RuntimeNoise(CorrectorKind):
    """Runtime noise estimation, relative to the full-precision model's own estimates where `control` or `shrink` ask for them."""

    prefix, record = "noise_table", NoiseTable
    calls_network = True

    def needs_record(self, recipe: Recipe) -> bool:
        return bool(recipe.controlled)

    def recorder(self, recipe: Recipe) -> NoiseRecorder | None:
        return NoiseRecorder(recipe.controlled, recipe.calibration.samples) if recipe.controlled else None

    def corrector(self, recipe: Recipe, record: NoiseTable | None) -> Corrector:
        assert recipe.correction is not None
        return RuntimeNoiseCorrector(recipe.correction, record if recipe.controlled else None)
