"""Steps that diffusers pipelines take, seen from outside: a handler in front of a scheduler's `step`, a tap on the network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qncd.models.calls import Call
from qncd.models.network import Network
from qncd.sampling.schedule import Step

MOST_CALLS = 64  # of a network that are kept between two steps of its scheduler


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


def handle(scheduler: Any, handler: StepHandler) -> None:
    """Let `handler` see every step of a scheduler from now on."""
    scheduler.__dict__.pop("step", None)
    _Handled(scheduler, handler)


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

    Calls at another time step than the last one's belong to a run that was broken off, and are forgotten, as are all but the
    last `MOST_CALLS`.

    Attributes:
        last: the last call of all.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.last: Call | None = None
        self.bound: Call | None = None  # the one that runs; None where the hook before it stayed away
        self.calls: list[tuple[Call, Tensor]] = []
        self.silent = False  # while a correction calls the network itself
        module = network.module
        self.handles = [
            module.register_forward_pre_hook(self._bind, with_kwargs=True),
            module.register_forward_hook(self._keep, with_kwargs=True),
        ]

    def _bind(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.silent:  # before the call: a UNet takes the residuals of an adapter out of their list
            self.last = self.bound = self.network.bind(args, kwargs)

    _bind.of_qncd = True  # type: ignore[attr-defined]  # stays away from tracing: it counts samples

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, self.bound = self.bound, None
        if call is not None:
            self.calls = [kept for kept in self.calls if torch.equal(kept[0].t[:1], call.t[:1])][1 - MOST_CALLS :]
            self.calls.append((call, self.network.as_prediction(self.network.output_of(output))))

    def take(self) -> list[tuple[Call, Tensor]]:
        """The calls, which are forgotten."""
        calls, self.calls = self.calls, []
        return calls

    def remove(self) -> None:
        """The network is as it was."""
        for handle in self.handles:
            handle.remove()


def bare_step(taken: Taken) -> Step:
    """A step known by its index alone, which is all that corrections need that do not call the network."""
    return Step(taken.index, taken.time, -1, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
