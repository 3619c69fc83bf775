"""Corrections inside diffusers pipelines: they act through the scheduler's `step`, which sees the guided prediction, t and x_t.

The pipeline is called and not imitated: what it does between the network and the scheduler stays its own. A correction that
calls the network (runtime estimation) repeats the last call with another sample, and guides as the pipeline did.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qncd.models.calls import Call, in_one
from qncd.models.network import Network
from qncd.sampling.corrector import Corrector, Tentative
from qncd.sampling.process import clean_of, noise_of, slope_of
from qncd.sampling.schedule import Step
from qncd.sampling.scheduler_levels import steps_of

SCALE_DIGITS = (4, 2, 1)  # of a guidance scale: half precision leaves fewer of them
SAME = 1e-3  # largest relative difference between what a pipeline did and what is made of its parts


@dataclass
class Taken:
    """One step that a pipeline takes.

    Attributes:
        index: 0 for the first of a run.
        time: the time step that the scheduler was called with.
        x: the sample (N, ...).
        output: the guided prediction (N, ...), in what the network predicts.
        scheduler: as it was before the step.
        arguments: of the scheduler's step beside these.
        time_given: the same time step in the form that the scheduler takes it, a tensor as a rule.
    """

    index: int
    time: float
    x: Tensor
    output: Tensor
    scheduler: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    time_given: Any

    def advance(self, output: Tensor) -> Tensor:
        """The next sample, if `output` were the prediction; nothing is changed."""
        trial = copy.deepcopy(self.scheduler)
        args, kwargs = self.arguments
        kwargs = {name: copy.deepcopy(value) if name == "generator" else value for name, value in kwargs.items()}
        return earlier(type(trial).step(trial, output, self.time_given, self.x, *args, **kwargs))


def earlier(result: Any) -> Tensor:
    """The next sample in what a scheduler's step returns."""
    sample: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return sample


class StepHandler(Protocol):
    """What looks at every step of a pipeline before its scheduler takes it."""

    def __call__(self, taken: Taken) -> Tensor:
        """The prediction that the scheduler gets in the place of `taken.output`."""


class _Handled:
    """A scheduler's own step and set_timesteps with a handler in front."""

    def __init__(self, scheduler: Any, handler: StepHandler) -> None:
        self.scheduler, self.handler, self.index = scheduler, handler, 0
        kind = type(scheduler)

        @functools.wraps(kind.step.__get__(scheduler))
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            taken = Taken(self.index, float(timestep), sample, model_output, scheduler, (args, kwargs), timestep)
            self.index += 1
            return kind.step(scheduler, handler(taken), timestep, sample, *args, **kwargs)

        @functools.wraps(kind.set_timesteps.__get__(scheduler))
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.index = 0
            return kind.set_timesteps(scheduler, *args, **kwargs)

        step.of_qncd = True  # type: ignore[attr-defined]
        scheduler.step, scheduler.set_timesteps = step, set_timesteps

    def remove(self) -> None:
        """The scheduler is as it was."""
        for name in ("step", "set_timesteps"):
            self.scheduler.__dict__.pop(name, None)


@contextmanager
def handled(scheduler: Any, handler: StepHandler) -> Iterator[None]:
    """Within it, `handler` sees every step of the scheduler."""
    before = {name: scheduler.__dict__.pop(name) for name in ("step", "set_timesteps") if name in scheduler.__dict__}
    put = _Handled(scheduler, handler)
    try:
        yield
    finally:
        put.remove()
        scheduler.__dict__.update(before)


class Tap:
    """Keeps the network's calls since the last step of the scheduler: what it was called with, and what it gave.

    Attributes:
        last: the last call of all.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.last: Call | None = None
        self.calls: list[tuple[Call, Tensor]] = []
        self.silent = False  # while a correction calls the network itself
        module = network.module
        self.handles = [
            module.register_forward_pre_hook(self._bind, with_kwargs=True),
            module.register_forward_hook(self._keep, with_kwargs=True),
        ]

    def _bind(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.silent:  # before the call: a UNet takes the residuals of an adapter out of their list
            self.last = self.network.bind(args, kwargs)

    _bind.of_qncd = True  # type: ignore[attr-defined]  # stays away from tracing: it counts samples

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.silent:
            assert self.last is not None
            self.calls.append((self.last, self.network.as_prediction(self.network.output_of(output))))

    def take(self) -> list[tuple[Call, Tensor]]:
        """The calls, which are forgotten."""
        calls, self.calls = self.calls, []
        return calls

    def remove(self) -> None:
        """The network is as it was."""
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class Guidance:
    """How a pipeline made one prediction for each sample of what the network gave.

    Attributes:
        parts: of the network's batch for each sample: 1, or 2 with classifier-free guidance (without condition first).
        scale: of the guidance.
        doubled: the pipeline's samples are there twice, as DiT's are, and so are predictions: with condition first.
    """

    parts: int
    scale: float
    doubled: bool = False

    @classmethod
    def seen(cls, output: Tensor, taken: Taken, nearly: bool = False) -> Guidance:
        """From one step.

        Args:
            output: of the network.
            nearly: guidance with something more, such as a rescaled standard deviation, is taken as the nearest plain one.

        Raises:
            ValueError: it is not u + s (c - u).
        """
        parts, rest = divmod(len(output), len(taken.x))
        output, guided = output[:, : taken.x.shape[1]], taken.output[:, : taken.x.shape[1]]
        if rest == 0 and parts == 1 and _near(output, guided):
            return cls(1, 1.0)
        doubled = parts == 1 and len(output) % 2 == 0 and torch.equal(*guided.chunk(2))
        if rest == 0 and (parts == 2 or doubled):
            uncond, cond = reversed(output.chunk(2)) if doubled else output.chunk(2)
            along = (cond - uncond).double()
            length = float(along.square().sum())
            wanted = guided[: len(uncond)]
            scale = float(((wanted - uncond).double() * along).sum()) / length if length else 1.0
            for digits in SCALE_DIGITS:
                found = cls(parts, round(scale, digits), doubled)
                if nearly or _near(found(output), guided):
                    return found
        if rest == 0 and parts == 1 and nearly:
            return cls(1, 1.0)
        raise ValueError(
            "the pipeline's guidance is not e_u + s (e_c - e_u) of one network call (guidance_rescale, several calls a step?): "
            "runtime correction and bit allocation cannot repeat it; allowed are corrections that do not call the network"
        )

    def __call__(self, output: Tensor) -> Tensor:
        """(parts * N, ...) -> (N, ...)."""
        if self.doubled:
            cond, uncond = output.chunk(2)
            return torch.cat([uncond + self.scale * (cond - uncond)] * 2)
        if self.parts == 1:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self.scale * (cond - uncond)


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).double().norm()) <= SAME * max(float(b.double().norm()), 1e-12)


@dataclass
class PipelineCorrection:
    """A `StepHandler` that corrects every prediction of a pipeline; `of` makes one.

    Attributes:
        network: of the pipeline.
        corrector: what corrects.
        calls_network: the corrector calls the network too.
        times: time steps that the correction was fitted for; None where any will do.
        tap: the network's calls, where they are needed; None else.
    """

    network: Network
    corrector: Corrector
    calls_network: bool
    times: tuple[float, ...] | None = None
    tap: Tap | None = None
    steps: dict[int, Step] = field(default_factory=dict)

    @classmethod
    def of(
        cls, network: Network, corrector: Corrector, calls_network: bool = False, times: tuple[float, ...] | None = None
    ) -> PipelineCorrection:
        """One that watches the network's calls where it has to, until `remove`."""
        return cls(network, corrector, calls_network, times, Tap(network) if needs_tap(network, calls_network) else None)

    def remove(self) -> None:
        """Watch the network's calls no longer."""
        if self.tap is not None:
            self.tap.remove()

    @torch.no_grad()
    def __call__(self, taken: Taken) -> Tensor:
        self._check_time(taken)
        if taken.index == 0:
            self.corrector.begin([seed_of(x) for x in taken.x], str(taken.x.device))
        step, calls = self._step(taken), self.tap.take() if self.tap else []
        if self.calls_network and not step.alpha:
            return taken.output  # pure noise: whatever the network predicts there says nothing of its noise
        kind = self.network.prediction if self.calls_network else "epsilon"
        # What the network gets of a variance-exploding process has the levels of a variance-preserving one.
        scale = 1 / math.hypot(step.alpha, step.noise) if step.alpha == 1 else 1.0
        levels = (scale * step.alpha, scale * step.noise)
        slope = slope_of(kind, *levels) if kind != "epsilon" else 1.0
        call = self.tap.last if self.tap else None
        channels = taken.x.shape[1]
        predicted, variance = taken.output[:, :channels], taken.output[:, channels:]  # a learned variance is not corrected

        def images(samples: Tensor) -> Tensor:
            return self.network.to_images(samples, call)

        def noise(output: Tensor, x: Tensor) -> Tensor:
            return noise_of(kind, output, scale * x, *levels)

        x, eps = images(taken.x), images(noise(predicted, taken.x))

        def output(corrected: Tensor) -> Tensor:
            if kind == "epsilon":
                changed = self.network.to_samples(corrected, predicted)
            else:
                changed = predicted + self.network.to_samples(slope * (corrected - eps), predicted)
            whole = torch.cat([changed, variance], 1) if variance.numel() else changed
            return whole.to(taken.output.dtype)

        def advance(corrected: Tensor) -> Tentative:
            x_prev = images(taken.advance(output(corrected)))
            return Tentative(x_prev, clean_of(x, corrected, step.alpha, step.noise) if step.noise else x_prev)

        def denoise(x: Tensor, t: float) -> Tensor:
            if not self.calls_network:
                raise ValueError("this correction calls the network, and was not told so")
            samples = self.network.to_samples(x, taken.x)
            return images(noise(self._again(calls, taken, samples), samples))

        return output(self.corrector.correct(step, x, eps, denoise, advance).eps)

    def _check_time(self, taken: Taken) -> None:
        if self.times is None:
            return
        expected = self.times[taken.index] if taken.index < len(self.times) else None
        if expected is None or abs(expected - taken.time) > 1e-3:
            raise ValueError(
                f"step {taken.index + 1} is at time step {taken.time:g}, the correction was fitted for {len(self.times)} steps, "
                f"{'none further' if expected is None else f'with {expected:g} here'}: call the pipeline with the number of "
                "steps that it was quantized with, or quantize it for this one"
            )

    def _step(self, taken: Taken) -> Step:
        if not self.calls_network:
            return bare_step(taken)
        if taken.index == 0:
            self.steps = steps_of(taken.scheduler)
        if taken.index not in self.steps:
            raise ValueError(f"the scheduler takes more steps than its {len(self.steps)} time steps")
        return self.steps[taken.index]

    def _again(self, calls: Sequence[tuple[Call, Tensor]], taken: Taken, x: Tensor) -> Tensor:
        """The guided prediction at another sample, by the pipeline's last call of the network."""
        (call, output), channels = in_one_call(calls), taken.x.shape[1]
        guidance = Guidance.seen(output, taken)

        def network_input(sample: Tensor) -> Tensor:
            scaled = sample
            if hasattr(taken.scheduler, "scale_model_input"):  # those of rectified flow have none
                scaled = taken.scheduler.scale_model_input(sample, taken.time_given)
            return torch.cat([torch.cat([scaled] * guidance.parts), call.x[:, channels:]], 1).to(call.x.dtype)

        if not _near(network_input(taken.x), call.x):
            raise ValueError("the network gets other samples than the scheduler: runtime correction cannot repeat its calls")
        assert self.tap is not None
        self.tap.silent = True
        try:
            again = self.network.predict(network_input(x), call.t, call.inputs, **call.constants)
        finally:
            self.tap.silent = False
        return guidance(again[:, :channels]).to(taken.output.dtype)


def in_one_call(calls: Sequence[tuple[Call, Tensor]]) -> tuple[Call, Tensor]:
    """The network's calls of one step as one, and what it gave. Raises ValueError as `qncd.models.calls.in_one`."""
    made = in_one([call for call, _ in calls])
    return made, torch.cat([output for _, output in reversed(calls)])


def needs_tap(network: Network, calls_network: bool) -> bool:
    """Whether a correction needs to see the network's calls."""
    return calls_network or network.packed


def bare_step(taken: Taken) -> Step:
    """A step known by its index alone, which is all that corrections need that do not call the network."""
    return Step(taken.index, taken.time, -1, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def seed_of(x: Tensor) -> int:
    """A seed that follows from an image's own initial noise, whatever its batch."""
    digest = hashlib.sha256(x.detach().float().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:6], "big")


def handle(scheduler: Any, handler: StepHandler) -> None:
    """Let `handler` see every step of a scheduler from now on."""
    scheduler.__dict__.pop("step", None)
    _Handled(scheduler, handler)


def attach(pipe: Any, correction: PipelineCorrection) -> None:
    """Let a correction act in every run of a pipeline from now on. A scheduler put in its place is noticed at the next call."""
    handle(pipe.scheduler, correction)
    correction.network.module.register_forward_pre_hook(_WatchScheduler(pipe))


class _WatchScheduler:
    """The hook on the network that notices a scheduler without the correction."""

    of_qncd = True

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        pipe = self.pipe()
        if pipe is not None and not getattr(pipe.scheduler.step, "of_qncd", False):
            raise ValueError(
                f"the pipeline's scheduler was replaced by a {type(pipe.scheduler).__name__}, so its correction would not act: "
                "quantize with the scheduler that it will sample with, or with a recipe without correction"
            )

    def __deepcopy__(self, _: Any) -> _WatchScheduler:
        return self
