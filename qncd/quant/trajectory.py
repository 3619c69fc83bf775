"""Which calls of a network follow one another on a trajectory: what quantizers of differences between time steps need to know.

A sampler moves through time in one direction. A call at another time step is the next one, a move in the other direction starts a
new trajectory. Several calls at one time step are told apart by their order: the halves of guidance, say, or the second call of
a runtime correction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qncd.quant.dynamic import DifferenceQuantizer
from qncd.quant.stepwise import TimesOf

MOST_CALLS = 256  # at one time step: the lanes of a batch, and halves of guidance; the next one starts a trajectory


def follow_trajectories(module: nn.Module, times_of: TimesOf) -> None:
    """Tell every DifferenceQuantizer of a network where on a trajectory each call is, from now on."""
    module.register_forward_pre_hook(_Follow(times_of), with_kwargs=True)
    module.register_forward_hook(_leave, always_call=True)


@contextmanager
def off_trajectory(module: nn.Module) -> Iterator[None]:
    """Within it, calls of the network belong to no trajectory, and leave the one that it is on as it is."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Follow)]
    try:
        for hook in hooks:
            hook.paused = True
        yield
    finally:
        for hook in hooks:
            hook.paused = False


class _Follow:
    """The hook in front of each call."""

    of_qncd = True

    def __init__(self, times_of: TimesOf) -> None:
        self.times_of = times_of
        self.last: float | None = None
        self.rising: bool | None = None  # unknown until the second time step
        self.call = 0
        self.paused = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        times = set() if self.paused else set(self.times_of(args, kwargs).reshape(-1).tolist())
        if len(times) == 1:  # others are not of a sampler
            fresh = self._starts(times.pop())
            _tell(module, self.call, fresh)

    def _starts(self, t: float) -> bool:
        """Move to the next call; whether a trajectory starts with it."""
        last, self.last = self.last, t
        if t == last:
            self.call += 1
            if self.call < MOST_CALLS:
                return False
            self.call, self.rising = 0, None
            return True
        self.call = 0
        rising = None if last is None else t > last
        starts = rising is None or self.rising not in (None, rising)
        self.rising = None if starts else rising
        return starts

    def __deepcopy__(self, _: Any) -> _Follow:
        return _Follow(self.times_of)  # a copy of the network starts anew


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    """The hook behind each call: what comes next of a layer's inputs is of no trajectory."""
    _tell(module, None)


def _tell(module: nn.Module, call: int | None, fresh: bool = False) -> None:
    for part in module.modules():
        if isinstance(part, DifferenceQuantizer):
            part.follow(call, fresh)
