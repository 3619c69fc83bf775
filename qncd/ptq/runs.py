"""Calibration runs of our own samplers: the calibration set, and what corrections are fitted to."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qncd.distributed import OneProcess, Processes, join_, part_of
from qncd.models.network import Network
from qncd.progress import Monitor, silent
from qncd.ptq.data import CalibrationCollector, CalibrationSet
from qncd.recipe import CalibrationConfig, SamplerConfig
from qncd.sampling.corrector import Corrector, Denoiser, Kept, Predictions, Recorder, See
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.samplers import Callback, StepState
from qncd.sampling.scheduler_levels import process_of

# Seeds of calibration images: far from those that users number their images with.
CALIBRATION_SEED_BASE = 1 << 40
STEPS = 20  # of a bare denoiser's scheduler, where nobody says
TRACKING_SEED_BASE = 1 << 41  # and from calibration's: what a network was fitted to says less about its errors
Wrap = Callable[[Denoiser], Denoiser]


@dataclass
class DiffusionRuns:
    """Runs of a `Diffusion`; implements `qncd.sampling.corrector.Runs`.

    Attributes:
        diffusion: with the network that will be quantized in place.
        config: how many trajectories.
        conditions: one for each of the `config.samples` trajectories.
        monitor: is told of progress.
        processes: who shares the trajectories; every one of them gets what all of them have shown.
    """

    diffusion: Diffusion
    config: CalibrationConfig
    conditions: Conditions | None = None
    monitor: Monitor = silent
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

    @property
    def network_times(self) -> tuple[float, ...]:
        """The same as the network gets them."""
        return tuple(self.network.time_at(t) for t in self.times)

    def calibration_set(self, recorder: Recorder | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The set along a full-precision run, which `recorder` may watch on the way."""
        collector = CalibrationCollector(len(self.diffusion.steps), self.config.steps)
        self._run("calibration set", recorder, collector, [collector])
        conditions = self.conditions
        inputs = {} if conditions is None else {name: value.cpu() for name, value in conditions.inputs.items()}
        uncond = None
        if conditions is not None and conditions.guided and conditions.uncond is not None:
            uncond = {name: value.cpu() for name, value in conditions.uncond.items()}
        return collector.result(inputs, uncond, model_hash)

    def record(self, recorder: Recorder) -> None:
        self._run("full-precision noise table", recorder, None, [])

    def predictions(self) -> Predictions:
        keep = _Outputs()
        self._run("full precision", None, None, [keep], keep.begin)
        return keep.calls

    def compare(self, exact: Predictions, see: See) -> None:
        quantized: list[Denoiser] = []

        def begin(lane: int, part: Conditions | None) -> Wrap:
            quantized[:] = [self.diffusion.denoiser(part)]
            calls = itertools.count()
            return lambda _: lambda x, t: exact[next(calls)][lane].to(x.device)  # the run goes on as the full-precision one did

        def shown(state: StepState) -> None:
            see(state.step, state.x, quantized[0](state.x, state.step.t), state.eps)

        self._run("comparing with full precision", None, shown, [see], begin)

    def trajectory(self, samples: int) -> list[Tensor]:
        keep = _Ends()
        config = dataclasses.replace(self.config, samples=samples)
        tracked = dataclasses.replace(self, config=config, conditions=self._repeated(samples))
        tracked._run("full-precision trajectories", None, keep, [keep], base=TRACKING_SEED_BASE)
        return [torch.cat(keep.ends[step.index]) for step in self.diffusion.steps]

    def follow(self, corrector: Corrector, samples: int) -> None:
        first = TRACKING_SEED_BASE + (self.config.seed << 20)
        with self.monitor("quantized trajectories", "step") as update:
            total = len(self.diffusion.steps)

            def tell(state: StepState) -> None:
                update(state.step.index + 1, total)

            seeds = range(first, first + samples)
            self.diffusion.sample(seeds, corrector, tell, conditions=self._repeated(samples))

    def _repeated(self, samples: int) -> Conditions | None:
        """The conditions in turn, as many as there are samples."""
        if self.conditions is None:
            return None
        return self.conditions[[row % len(self.conditions) for row in range(samples)]]

    def _run(
        self,
        title: str,
        corrector: Corrector | None,
        callback: Callback | None,
        watchers: Sequence[object],
        begin: Callable[[int, Conditions | None], Wrap] | None = None,
        base: int = CALIBRATION_SEED_BASE,
    ) -> None:
        """All trajectories, lane by lane: they are the batches of any number of processes.

        Args:
            watchers: that `callback` or `begin` shows something. Where they and the corrector say what they keep, the processes
                share the lanes, and all watchers have seen all of them in the end; else every process runs all.
            begin: what to put around the network's calls of a lane, by its number and its conditions.

        Raises:
            ValueError: in all processes, where something went wrong in one of several.
        """
        seers = [*watchers, *([corrector] if corrector else [])]
        shared = [seer.kept for seer in seers if isinstance(seer, Kept)]
        lane, samples = self.diffusion.lane, self.config.samples
        processes = self.processes if len(shared) == len(seers) else OneProcess()
        starts, error = part_of(processes, range(0, samples, lane)), None
        with self.monitor(title, "image") as update:
            try:
                for number, start in enumerate(starts, 1):
                    count = min(lane, samples - start)
                    first = base + (self.config.seed << 20) + start
                    part = self.conditions[start : start + count] if self.conditions else None
                    wrap = begin(start // lane, part) if begin else None
                    self.diffusion.sample(range(first, first + count), corrector, callback, wrap, part)
                    update(samples * number // len(starts), samples)
            except (ValueError, FloatingPointError) as problem:
                if processes.world == 1:
                    raise
                error = str(problem)
        processes.agree(error)
        join_(processes, *(kept for parts in shared for kept in parts))


class _Outputs:
    """Keeps what the network gives at each call of a lane, lane after lane."""

    def __init__(self) -> None:
        self.calls: dict[int, list[Tensor]] = {}

    @property
    def kept(self) -> tuple[dict[int, list[Tensor]], ...]:
        return (self.calls,)

    def begin(self, _: int, __: Conditions | None) -> Wrap:
        """What keeps the calls of the next lane."""
        calls = itertools.count()

        def wrap(denoise: Denoiser) -> Denoiser:
            def kept(x: Tensor, t: float) -> Tensor:
                out = denoise(x, t)
                self.calls.setdefault(next(calls), []).append(out.cpu())
                return out

            return kept

        return wrap


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
        self.network_times = self.times
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
        self.times, self.network_times = process.times, tuple(network.time_at(t) for t in process.times)
        rows = {name: value[torch.arange(self.samples) % len(value)] for name, value in data.inputs.items()}
        self.conditions = Conditions(rows, constants=data.constants) if rows else None
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

    def record(self, recorder: Recorder) -> None:
        self._made().record(recorder)

    def predictions(self) -> Predictions:
        return self._made().predictions()

    def compare(self, exact: Predictions, see: See) -> None:
        self._made().compare(exact, see)

    def trajectory(self, samples: int) -> list[Tensor]:
        return self._made().trajectory(samples)

    def follow(self, corrector: Corrector, samples: int) -> None:
        self._made().follow(corrector, samples)

    def _made(self) -> DiffusionRuns:
        if self._runs is None:
            raise ValueError("a bare denoiser has no sampler: give scheduler=")
        return self._runs
