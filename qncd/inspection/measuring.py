"""What a pipeline shows on the way to a quantized one: ranges of channels, noise step by step, and one layer's weights.

Everything is measured on images that nothing was calibrated with: the runs of calibration with the next seed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qncd.inspection.record import CONTROL, CORRECTED, PLAIN, Inspected, NoiseAt, Smoothed
from qncd.inspection.rounding import LayerKept, rounding_of
from qncd.progress import Monitor, silent
from qncd.ptq.observing import hooked
from qncd.ptq.pipeline import Job, quantize_network, sample_calibration
from qncd.ptq.pipeline_runs import PipelineRuns
from qncd.ptq.stages.smoothing import smoothing_factors
from qncd.quant.adapters import check_quantizable
from qncd.recipe import CorrectionConfig, Recipe
from qncd.rng import CORRECTOR_STREAM, ImageNoise
from qncd.sampling.corrector import Advance, Corrected, Corrector, Denoiser
from qncd.sampling.correctors.registry import corrector_of, kind_of
from qncd.sampling.correctors.runtime import estimate_noise
from qncd.sampling.pipeline import denoiser_of
from qncd.sampling.schedule import Step

log = logging.getLogger("qncd")
TARGET = CorrectionConfig().target  # of the estimates of the control


class ChannelRanges:
    """Largest |value| of each input channel of some layers.

    Attributes:
        largest: (C,) by the name of the layer, of all calls that were watched.
    """

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def watch(self, module: nn.Module, names: Sequence[str]) -> list[Any]:
        """Handles of hooks that look at the layers of these names."""
        return [module.get_submodule(name).register_forward_pre_hook(self._seen(name)) for name in names]

    def _seen(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            channel = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
            found = x.abs().amax([d for d in range(x.ndim) if d != channel]).float().cpu()
            self.largest[name] = torch.maximum(self.largest.get(name, found), found)

        return seen


class NoiseSums:
    """Errors of predictions, step after step, as sums: nothing is kept of the images."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def add(self, index: int, error: Tensor, signal: Tensor) -> None:
        """Take in a batch: the error, and the exact prediction, of one shape."""
        e, s = error.double().flatten(), signal.double().flatten()
        found = torch.stack([torch.ones_like(e).sum(), e.sum(), (e * e).sum(), s.sum(), (s * s).sum(), (e * s).sum()]).cpu()
        self.sums[index] = self.sums[index] + found if index in self.sums else found

    def steps(self) -> dict[int, NoiseAt]:
        """By the index of the step, 0 first."""
        return {index: self._at(sums) for index, sums in sorted(self.sums.items())}

    @staticmethod
    def _at(sums: Tensor) -> NoiseAt:
        mean, square, signal, power, product = (sums[1:] / sums[0]).tolist()
        variance, spread = max(square - mean * mean, 0.0), max(power - signal * signal, 0.0)
        product = (product - mean * signal) / (variance * spread) ** 0.5 if variance * spread > 0 else 0.0
        snr = 10 * float(torch.log10(torch.tensor(power / square))) if square > 0 else float("inf")
        return NoiseAt(snr, mean, variance**0.5, product)


class NoiseMeter:
    """A `See` that sums the error of the quantized network's predictions, and what a correction leaves of it.

    Args:
        corrector: one that does not call the network; None for none.
    """

    def __init__(self, corrector: Corrector | None) -> None:
        self.corrector, self.plain, self.corrected = corrector, NoiseSums(), NoiseSums()

    def __call__(self, step: Step, x: Tensor, rough: Tensor, exact: Tensor) -> None:
        rough, exact = (prediction[:, : x.shape[1]].float() for prediction in (rough, exact))  # without a learned variance
        self.plain.add(step.index, rough - exact, exact)
        if self.corrector is not None:
            found = self.corrector.correct(step, x.float(), rough, _not_called, _not_called).eps
            self.corrected.add(step.index, found - exact, exact)


def _not_called(*_: Any) -> Any:
    raise ValueError("this correction calls the network or takes steps on trial: it cannot be measured at given samples")


class Control:
    """A corrector that corrects nothing: it sums what the paper's estimator takes for noise of a full-precision network."""

    def __init__(self) -> None:
        self.sums = NoiseSums()

    def begin(self, seeds: Sequence[int], device: str) -> None:
        """Start a batch."""
        self.noise = ImageNoise(seeds, CORRECTOR_STREAM)

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        z = self.noise.normal(x.shape[1:], x.device)
        self.sums.add(step.index, estimate_noise(step, x, eps, denoise, advance, z, TARGET).d, eps)
        return Corrected(eps)


class Inspection:
    """A pipeline that is quantized once, and measured before and after. `look` is called once.

    Args:
        label: of what is found.
        pipe: in full precision; its network is quantized in place.
        recipe: how.
        calls: arguments of the calibration calls.
        steps: of the sampler; None for the pipeline's own number.
        layer: name of the layer to look at more closely, None for none.

    Raises:
        ValueError: a setting that does not fit the pipeline.
    """

    def __init__(
        self, label: str, pipe: Any, recipe: Recipe, calls: Sequence[Mapping[str, Any]], steps: int | None = None,
        layer: str | None = None, monitor: Monitor = silent,
    ) -> None:  # fmt: skip
        check_quantizable(denoiser_of(pipe)[1])
        recipe = recipe.decided(8)
        self.runs = PipelineRuns(pipe, calls, recipe.calibration, steps, monitor)
        self.recipe = recipe.with_calibration(samples=self.runs.samples)
        next_seed = dataclasses.replace(recipe.calibration, seed=recipe.calibration.seed + 1)
        self.held_out = PipelineRuns(pipe, calls, next_seed, steps, monitor)
        self.label, self.layer, self.job = label, layer, Job(monitor, measured=True)

    def table(self) -> Inspected:
        """Quantize, and measure the layers alone."""
        data, record = sample_calibration(self.runs, self.recipe)
        found = quantize_network(self.runs, self.recipe, data, record, self.job).layers
        assert found is not None
        return Inspected(self.label, found)

    def look(self) -> Inspected:
        """Quantize, and measure everything."""
        data, record = sample_calibration(self.runs, self.recipe)
        module, factors, ranges = self.runs.network.module, self._factors(data.inputs), ChannelRanges()
        kept = LayerKept(self.runs.network, self.layer) if self.layer else None
        with ExitStack() as stack:
            stack.enter_context(hooked(ranges.watch(module, list(factors))))
            stack.enter_context(hooked(kept.handles if kept else []))
            exact = self.held_out.predictions()
        noise = {CONTROL: self._control()}
        outcome = quantize_network(self.runs, self.recipe, data, record, self.job)
        assert outcome.layers is not None
        kind = kind_of(self.recipe)
        measurable = kind is not None and not kind.calls_network
        meter = NoiseMeter(corrector_of(self.recipe, outcome.record) if measurable else None)
        self.held_out.compare(exact, meter)
        noise = {PLAIN: meter.plain.steps(), CORRECTED: meter.corrected.steps(), **noise}
        smoothed = Smoothed(ranges.largest, factors, self.recipe.smoothing is not None) if factors else None
        layer = rounding_of(str(self.layer), kept, module.get_submodule(str(self.layer))) if kept else None
        return Inspected(self.label, outcome.layers, smoothed, {name: steps for name, steps in noise.items() if steps}, layer)

    def _factors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the embedding, none where the family knows none."""
        try:
            return smoothing_factors(self.runs.network, self.runs.network_times, self.recipe.smoothing, inputs)
        except ValueError as error:
            log.warning("no picture of smoothing: %s", error)
            return {}

    def _control(self) -> dict[int, NoiseAt]:
        """The paper's estimates on the full-precision network, none where they cannot be made."""
        control = Control()
        try:
            self.held_out.record(control)
        except ValueError as error:
            log.warning("no full-precision control: %s", error)
            return {}
        return control.sums.steps()
