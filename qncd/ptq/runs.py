"""Calibration runs of our own samplers: the calibration set, and what corrections are fitted to."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qncd.distributed import OneProcess, Processes, join_, part_of
from qncd.models.network import Network
from qncd.ptq.context import Monitor, copied, silent
from qncd.ptq.data import CalibrationCollector, CalibrationSet
from qncd.recipe import CalibrationConfig, SamplerConfig
from qncd.sampling.corrector import Corrector, Denoiser, Kept, Recorder, See
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.samplers import Callback, StepState
from qncd.sampling.scheduler import process_of

# Seeds of calibration images: far from those that users number their images with.
CALIBRATION_SEED_BASE = 1 << 40
STEPS = 20  # of a bare denoiser's scheduler, where nobody says
TRACKING_SEED_BASE = 1 << 41  # and from calibration's: what a network was fitted to says less about its errors


@dataclass
class DiffusionRuns:
    """Runs of a `Diffusion`; implements `qncd.sampling.corrector.Runs`.

    Attributes:
        diffusion: with the network that will be quantized in place.
        config: how many trajectories.
        conditions: one for each of the `config.samples` trajectories.
        monitor: is told of progress.
        reference: the full-precision network beside the quantized one; see `keep_reference`.
        processes: who shares the trajectories; every one of them gets what all of them have shown.
    """

    diffusion: Diffusion
    config: CalibrationConfig
    conditions: Conditions | None = None
    monitor: Monitor = silent
    reference: Diffusion | None = None
    processes: Processes = field(default_factory=OneProcess)

    def __post_init__(self) -> None:
        if self.conditions is not None and len(self.conditions) != self.config.samples:
            raise ValueError(f"{len(self.conditions)} conditions for {self.config.samples} calibration trajectories")

    @property
    def samples(self) -> int:
        return self.config.samples

    @property
    def network(self) -> Network:
        """The network that is quantized."""
        return self.diffusion.network

    @property
    def times(self) -> tuple[float, ...]:
        """The time steps that the sampler visits."""
        return tuple(self.diffusion.times)

    def keep_reference(self) -> None:
        """Keep the full-precision network, before it is quantized."""
        if self.reference is None:
            self.reference = dataclasses.replace(self.diffusion, network=copied(self.diffusion.network))

    def calibration_set(self, recorder: Recorder | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The set along a full-precision run, which `recorder` may watch on the way."""
        collector = CalibrationCollector(len(self.diffusion.steps), self.config.steps)
        self._run(self.diffusion, "calibration set", recorder, collector, [collector])
        conditions = self.conditions
        inputs = {} if conditions is None else {name: value.cpu() for name, value in conditions.inputs.items()}
        uncond = None
        if conditions is not None and conditions.guided and conditions.uncond is not None:
            uncond = {name: value.cpu() for name, value in conditions.uncond.items()}
        return collector.result(inputs, uncond, model_hash)

    def record(self, recorder: Recorder) -> None:
        self._run(self.diffusion, "full-precision noise table", recorder, None, [])

    def compare(self, see: See) -> None:
        quantized: list[Denoiser] = []

        def begin(part: Conditions | None) -> None:
            quantized[:] = [self.diffusion.denoiser(part)]

        def shown(state: StepState) -> None:
            see(state.step, state.x, quantized[0](state.x, state.step.t), state.eps)

        self._run(self._reference(), "comparing with full precision", None, shown, [see], begin)

    def trajectory(self, samples: int) -> list[Tensor]:
        keep = _Ends()
        config = dataclasses.replace(self.config, samples=samples)
        tracked = dataclasses.replace(self, config=config, conditions=self._repeated(samples))
        tracked._run(self._reference(), "full-precision trajectories", None, keep, [keep], base=TRACKING_SEED_BASE)
        return [torch.cat(keep.ends[step.index]) for step in self.diffusion.steps]

    def follow(self, corrector: Corrector, samples: int) -> None:
        first = TRACKING_SEED_BASE + (self.config.seed << 20)
        with self.monitor("quantized trajectories", "step") as update:
            total = len(self.diffusion.steps)

            def tell(state: StepState) -> None:
                update(state.step.index + 1, total)

            seeds = range(first, first + samples)
            self.diffusion.sample(seeds, corrector, tell, conditions=self._repeated(samples))

    def _reference(self) -> Diffusion:
        if self.reference is None:
            raise ValueError("the full-precision network was not kept before it was quantized")
        return self.reference

    def _repeated(self, samples: int) -> Conditions | None:
        """The conditions in turn, as many as there are samples."""
        if self.conditions is None:
            return None
        return self.conditions[[row % len(self.conditions) for row in range(samples)]]

    def _run(
        self,
        diffusion: Diffusion,
        title: str,
        corrector: Corrector | None,
        callback: Callback | None,
        watchers: Sequence[object],
        begin: Callable[[Conditions | None], None] | None = None,
        base: int = CALIBRATION_SEED_BASE,
    ) -> None:
        """All trajectories, lane by lane: they are the batches of any number of processes.

        Args:
            watchers: that `callback` shows something. Where they and the corrector say what they keep, the processes share the
                lanes, and all watchers have seen all of them in the end; else every process runs all.

        Raises:
            ValueError: in all processes, where something went wrong in one of several.
        """
        seers = [*watchers, *([corrector] if corrector else [])]
        shared = [seer.kept for seer in seers if isinstance(seer, Kept)]
        lane, samples = diffusion.lane, self.config.samples
        processes = self.processes if len(shared) == len(seers) else OneProcess()
        starts, error = part_of(processes, range(0, samples, lane)), None
        with self.monitor(title, "image") as update:
            try:
                for number, start in enumerate(starts, 1):
                    count = min(lane, samples - start)
                    first = base + (self.config.seed << 20) + start
                    part = self.conditions[start : start + count] if self.conditions else None
                    if begin:
                        begin(part)
                    diffusion.sample(range(first, first + count), corrector, callback, conditions=part)
                    update(samples * number // len(starts), samples)
            except (ValueError, FloatingPointError) as problem:
                if processes.world == 1:
                    raise
                error = str(problem)
        processes.agree(error)
        join_(processes, *(kept for parts in shared for kept in parts))


class _Ends:
    """A callback that keeps what each step comes to."""

    def __init__(self) -> None:
        self.ends: dict[int, list[Tensor]] = {}

    @property
    def kept(self) -> tuple[dict[int, list[Tensor]], ...]:
        return (self.ends,)

    def __call__(self, state: StepState) -> None:
        self.ends.setdefault(state.step.index, []).append(state.x_prev.cpu())


class BareRuns:
    """Runs of a bare denoiser whose inputs are given; with a scheduler, our DDIM at its time steps makes the runs.

    Implements `qncd.ptq.pipeline.CalibrationRuns`. Conditions are those of the given inputs, as far as they are one for each
    trajectory.

    Args:
        network: full precision.
        data: the calibration set.
        config: how large the batches are.
        scheduler: of diffusers; None for none.
        steps: of the scheduler; by default 20.
    """

    def __init__(
        self, network: Network, data: CalibrationSet, config: CalibrationConfig, scheduler: Any = None, steps: int | None = None
    ) -> None:
        self.network, self.data, self.samples = network, data, min(config.samples, len(data))
        self.diffusion: Diffusion | None = None
        self.conditions: Conditions | None = None
        self.times: tuple[float, ...] = tuple(dict.fromkeys(sorted(data.t.tolist(), reverse=True)))
        self._runs: DiffusionRuns | None = None
        if scheduler is None:
            return
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(steps or STEPS)
        process = process_of(scheduler)
        if process is None or process.times is None:
            raise ValueError(
                f"{type(scheduler).__name__}: says no noise levels; allowed are schedulers with alphas_cumprod or flow"
            )
        self.times = process.times
        rows = {name: value[torch.arange(self.samples) % len(value)] for name, value in data.inputs.items()}
        self.conditions = Conditions(rows) if rows else None
        lane = min(16, self.samples)
        self.diffusion = Diffusion(network, process, SamplerConfig(), tuple(data.x.shape[1:]), lane)
        size = config.batch_size or lane
        self._runs = DiffusionRuns(
            self.diffusion, dataclasses.replace(config, samples=self.samples, batch_size=size), self.conditions
        )

    def calibration_set(self, recorder: Recorder | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The given one; `recorder` watches a run."""
        if recorder is not None:
            self.record(recorder)
        return self.data

    def keep_reference(self) -> None:
        """Keep the full-precision network, before it is quantized."""
        self._made().keep_reference()

    def record(self, recorder: Recorder) -> None:
        self._made().record(recorder)

    def compare(self, see: See) -> None:
        self._made().compare(see)

    def trajectory(self, samples: int) -> list[Tensor]:
        return self._made().trajectory(samples)

    def follow(self, corrector: Corrector, samples: int) -> None:
        self._made().follow(corrector, samples)

    def _made(self) -> DiffusionRuns:
        if self._runs is None:
            raise ValueError("a bare denoiser has no sampler: give scheduler=")
        return self._runs
