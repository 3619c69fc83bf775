"""Calibration runs of a diffusers pipeline, by calling it: a hook keeps the network's calls, the scheduler shows its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from qncd.distributed import OneProcess, Processes
from qncd.models.calls import Call, Inputs
from qncd.models.network import Network, network_of
from qncd.progress import Monitor, silent
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline_calls import PROMPT_BATCH, calls_of, merged, rows_of_call
from qncd.ptq.runs import CALIBRATION_SEED_BASE, TRACKING_SEED_BASE, DiffusionRuns
from qncd.recipe import CalibrationConfig, SamplerConfig, check_int
from qncd.rng import ImageNoise
from qncd.sampling.corrector import Corrector, Predictions, Recorder, See
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.pipeline import PipelineSampler, Row, check_calibratable, denoiser_of, parameters_of, quiet, replaced
from qncd.sampling.scheduler import Guidance, PipelineCorrection, guidance_of, in_one_call
from qncd.sampling.scheduler_levels import prediction_of, process_of
from qncd.sampling.taken import StepHandler, Taken, Tap, bare_step, handled

Sampler = Diffusion | PipelineSampler  # ours for original checkpoints, and a pipeline of diffusers
Given = Conditions | Sequence[Row] | None  # what its images are conditioned on

LEAST_SIGNAL = 1e-3  # of a time step from which a clean image can be read off


class InLanes(nn.Module):
    """A denoiser that is called with parts of a batch, so that a batch of any size takes the memory of one part."""

    def __init__(self, module: nn.Module, network: Network, lane: int) -> None:
        super().__init__()
        self.module, self._network, self.lane = module, network, lane

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the denoiser."""
        call = self._network.bind(args, kwargs)
        size = len(call.x)
        parts = []
        for start in range(0, size, self.lane):
            rows = slice(start, start + self.lane)
            inputs = {name: v[rows] if v.ndim and len(v) == size else v for name, v in call.inputs.items()}
            parts.append(self._network.call(call.x[rows], call.t[rows], inputs, **call.constants))
        out = torch.cat(parts)
        return UNet2DOutput(out) if call.constants.get("return_dict", True) else (out,)


@dataclass
class PipelineRuns:
    """Runs of a pipeline; implements `qncd.ptq.pipeline.CalibrationRuns`.

    Attributes:
        pipe: with the network that will be quantized in place.
        calls: arguments of the calibration calls.
        steps: of the sampler; None for the pipeline's own number.
        config: of the calibration set; its `samples` are those that the calls make.
        monitor: is told of progress.
        guidance: scale of the calibration calls; None where it is not the same u + s (c - u) in all of them.
    """

    pipe: Any
    calls: Sequence[Mapping[str, Any]]
    config: CalibrationConfig
    steps: int | None = None
    monitor: Monitor = silent
    times: tuple[float, ...] = ()
    network_times: tuple[float, ...] = ()
    guidance: float | None = None
    diffusion: Diffusion | None = None
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        check_calibratable(self.pipe)
        self.network = network_of(denoiser_of(self.pipe)[1], prediction_of(self.pipe.scheduler))
        parameters = parameters_of(self.pipe)
        self.accepted = set(parameters)
        unknown = {name for call in self.calls for name in call} - self.accepted
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(f"calls: {type(self.pipe).__name__} takes no {', '.join(sorted(unknown))}")
        if self.steps is None:
            return
        check_int("steps", self.steps, 1)
        if "num_inference_steps" not in self.accepted:
            raise ValueError(f"steps {self.steps}: {type(self.pipe).__name__} takes no num_inference_steps")
        for call in self.calls:
            if (other := call.get("num_inference_steps", self.steps)) != self.steps:
                raise ValueError(f"steps {self.steps}: a call says num_inference_steps {other}; give one of the two")

    @property
    def samples(self) -> int:
        """Trajectories of the calibration calls."""
        return sum(rows_of_call(call) for call in self.calls)

    def calibration_set(self, recorder: Recorder | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The network's calls at evenly spread steps of a full-precision run, which `recorder` may watch."""
        kept: dict[int, list[Call]] = {}
        tap = Tap(self.network)
        inner = PipelineCorrection.of(self.network, recorder, calls_network=True) if recorder else None
        first: list[tuple[Call, Tensor, Taken]] = []
        scales: set[float | None] = set()

        def keep(taken: Taken) -> Tensor:
            calls = tap.take()
            kept.setdefault(taken.index, []).extend(_on_cpu(call) for call, _ in calls)
            if taken.index == 0:
                scales.add(guidance_of(calls, taken))
                with contextlib.suppress(ValueError):  # calls that our own sampler cannot make
                    call, output = in_one_call(calls)
                    first.append((_on_cpu(call), output.cpu(), taken))
            before = (self.times, self.network_times) if taken.index else ((), ())
            own = taken.time if tap.last is None else tap.last.t[0].item()
            self.times, self.network_times = (*before[0], taken.time), (*before[1], own)
            if inner is None:
                return taken.output
            tap.silent = True
            try:
                return inner(taken)
            finally:
                tap.silent = False

        try:
            self._run("calibration set", self.calls, keep, CALIBRATION_SEED_BASE)
        finally:
            tap.remove()
            if inner is not None:
                inner.remove()
        self.guidance = scales.pop() if len(scales) == 1 else None
        self._find_diffusion(first)
        return self._collected(kept, model_hash)

    def record(self, recorder: Corrector) -> None:
        correction = PipelineCorrection.of(self.network, recorder, calls_network=True)
        try:
            self._run("full-precision noise table", self.calls, correction, CALIBRATION_SEED_BASE)
        finally:
            correction.remove()

    def predictions(self) -> Predictions:
        kept: dict[int, list[Tensor]] = {}
        for number, call in enumerate(self.calls):
            kept[number] = []

            def keep(taken: Taken, outputs: list[Tensor] = kept[number]) -> Tensor:
                outputs.append(taken.output.cpu())
                return taken.output

            self._run("full precision", [call], keep, CALIBRATION_SEED_BASE)
        return kept

    def compare(self, exact: Predictions, see: See) -> None:
        tap = Tap(self.network)
        try:
            for number, call in enumerate(self.calls):

                def show(taken: Taken, outputs: Sequence[Tensor] = exact[number]) -> Tensor:
                    tap.take()
                    output = outputs[taken.index].to(taken.output.device)
                    shown = (taken.x, taken.output, output)
                    see(bare_step(taken), *(self.network.to_images(value, tap.last) for value in shown))
                    return output  # the run goes on as the full-precision one did

                self._run("comparing with full precision", [call], show, CALIBRATION_SEED_BASE)
        finally:
            tap.remove()

    def trajectory(self, samples: int) -> list[Tensor]:
        kept: list[Tensor] = []
        tap = Tap(self.network)

        def keep(taken: Taken) -> Tensor:
            tap.take()
            kept.append(self.network.to_images(taken.advance(taken.output), tap.last).cpu())
            return taken.output

        try:
            self._run("full-precision trajectories", [merged(self.calls, samples)], keep, TRACKING_SEED_BASE, lanes=True)
        finally:
            tap.remove()
        return kept

    def follow(self, corrector: Corrector, samples: int) -> None:
        correction = PipelineCorrection.of(self.network, corrector)
        try:
            self._run("quantized trajectories", [merged(self.calls, samples)], correction, TRACKING_SEED_BASE, lanes=True)
        finally:
            correction.remove()

    def _run(self, title: str, calls: Sequence[Mapping[str, Any]], handler: StepHandler, base: int, lanes: bool = False) -> None:
        """Call the pipeline with each of the calls, while `handler` sees every step."""
        seed, done = base + (self.config.seed << 20), 0
        own = denoiser_of(self.pipe)[1]
        inner = InLanes(own, network_of(own, self.network.prediction), 2 * PROMPT_BATCH) if lanes else own
        with (
            self.monitor(title, "call") as update,
            handled(self.pipe.scheduler, handler),
            replaced(self.pipe, inner),
            quiet(self.pipe),
        ):
            for count, call in enumerate(calls, 1):
                rows = rows_of_call(call)
                with torch.no_grad():
                    self.pipe(**self._arguments(call, range(seed + done, seed + done + rows)))
                done += rows
                update(count, len(calls))

    def _arguments(self, call: Mapping[str, Any], seeds: range) -> dict[str, Any]:
        """A call's arguments with what makes it repeatable and quick: generators, the number of steps, no decoding."""
        extra: dict[str, Any] = {}
        if self.steps is not None:
            extra["num_inference_steps"] = self.steps
        if "output_type" in self.accepted:
            extra["output_type"] = "latent"
        if "generator" in self.accepted:
            extra["generator"] = ImageNoise(seeds).generators
        # Copies of lists: Z-Image's pipeline writes into that of the prompts.
        return {**extra, **{name: list(value) if isinstance(value, list) else value for name, value in call.items()}}

    def _collected(self, kept: Mapping[int, Sequence[Call]], model_hash: str | None) -> CalibrationSet:
        steps = min(self.config.steps, len(kept))
        chosen = [sorted(kept)[(2 * i + 1) * len(kept) // (2 * steps)] for i in range(steps)]
        parts = [kept[index] for index in chosen]
        if not parts or not parts[0]:
            raise ValueError("the pipeline did not call its denoiser")
        constants = _same([call.constants for part in parts for call in part])
        inputs = [_joined([call.inputs for call in part]) for part in parts]
        same = all(part.keys() == inputs[0].keys() and all(torch.equal(part[k], inputs[0][k]) for k in part) for part in inputs)
        x, t = (torch.cat([getattr(call, name) for part in parts for call in part]) for name in ("x", "t"))
        return CalibrationSet(x.float(), t, inputs[0] if same else _joined(inputs), None, constants, model_hash)

    def _find_diffusion(self, first: Sequence[tuple[Call, Tensor, Taken]]) -> None:
        """Our own sampler of the same network at the same time steps, by what the pipeline's first step showed."""
        process = process_of(self.pipe.scheduler)
        if process is None or process.times is None or not first or any(t.x.shape[2:] != c.x.shape[2:] for c, _, t in first):
            return
        # Nothing of the sample is in a time step of pure noise.
        process = dataclasses.replace(process, times=tuple(t for t in process.times if process.at(t)[0] > LEAST_SIGNAL))
        if not all(math.isclose(self.network.time_at(t), own, rel_tol=1e-3) for t, own in self._both_times()):
            return
        (_, output, taken), channels = first[0], first[0][2].x.shape[1]
        try:
            guidance = Guidance.seen(output.to(taken.x.device), taken, nearly=True)
        except ValueError:
            return
        halves: list[list[dict[str, Tensor]]] = [[], []]
        for made, _, step in first:
            count = len(step.x) // (2 if guidance.doubled else 1)
            inputs = {**made.inputs, **({WithChannels.name: made.x[:, channels:]} if made.x.shape[1] > channels else {})}
            parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(count), slice(-count, None))]
            for half, part in zip(halves, parts if guidance.doubled else parts[::-1], strict=True):
                half.append(part)
        cond, uncond = (_joined(half) for half in halves)
        network = WithChannels(self.network) if WithChannels.name in cond else self.network
        self.diffusion = Diffusion(network, process, SamplerConfig(), tuple(taken.x.shape[1:]), lane=min(4, self.samples))
        if cond:
            guided = guidance.parts == 2 or guidance.doubled
            constants = _same([made.constants for made, _, _ in first])
            self.conditions = Conditions(cond, uncond if guided else None, guidance.scale, constants)

    def _both_times(self) -> Iterator[tuple[float, float]]:
        """Time steps as the scheduler has them and as the network gets them."""
        return zip(self.times, self.network_times, strict=True)


def runs_of(
    sampler: Sampler,
    calibration: CalibrationConfig,
    conditions: Given,
    monitor: Monitor = silent,
    processes: Processes | None = None,
) -> DiffusionRuns | PipelineRuns:
    """Calibration runs of a sampler; of a pipeline, every process makes all of them.

    Args:
        conditions: one for each of the trajectories.
    """
    if isinstance(sampler, PipelineSampler):
        calls = calls_of(sampler.call, conditions if isinstance(conditions, Sequence) else None, calibration.samples)
        return PipelineRuns(sampler.pipe, calls, calibration, monitor=monitor)
    assert conditions is None or isinstance(conditions, Conditions)
    return DiffusionRuns(sampler, calibration, conditions, monitor, processes=processes or OneProcess())


class WithChannels(Network):
    """A network whose sample has further channels that stay as they are (inpainting's mask and image), among its inputs."""

    name = "further_channels"

    def __init__(self, network: Network) -> None:
        vars(self).update(vars(network))

    def predict(self, x: Tensor, t: Tensor | int, inputs: Inputs | None = None, **constants: Any) -> Tensor:
        """As the network; where the other channels are among the inputs, of a sample without them."""
        others = dict(inputs or {})
        further = others.pop(self.name, None)
        return super().predict(x if further is None else torch.cat([x, further], 1), t, others, **constants)


def _on_cpu(call: Call) -> Call:
    constants = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in call.constants.items()}
    return Call(call.x.detach().cpu(), call.t.cpu(), {k: v.detach().cpu() for k, v in call.inputs.items()}, constants)


def _same(constants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The constants of the calls, which are the same in all of them. Raises ValueError where they are not."""
    first = {name: value for name, value in constants[0].items() if name != "return_dict"}
    for other in constants[1:]:
        for name, value in first.items():
            given = other.get(name)
            same = isinstance(given, Tensor) and torch.equal(given, value) if isinstance(value, Tensor) else given == value
            if not same:
                raise ValueError(f"{name}: differs between calibration calls, allowed is one value for all of them")
    return first


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of all parts. Raises ValueError where these are not alike."""
    for name, value in parts[0].items():
        for other in parts:
            if other.keys() != parts[0].keys() or other[name].shape[1:] != value.shape[1:]:
                found = [tuple(part[name].shape[1:]) if name in part else "none" for part in (parts[0], other)]
                raise ValueError(f"{name}: {found[0]} in one calibration call, {found[1]} in another: give prompts of one length")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
