"""Activation ranges that depend on the time step: a table with a row for each of S steps, looked up when the UNet is called.

What a layer sees shrinks and grows along the trajectory; one range for all steps wastes codes at most of them (PTQ4DM,
arXiv 2211.15736; TFMQ-DM, arXiv 2311.16503, for the layers of the time embedding).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qncd.quant.affine import Codes, fake_quantize, shared_zero_qparams
from qncd.quant.quantizers import ActQuantizer, Stage


class StepwiseActQuantizer(ActQuantizer):
    """Fake quantization with a range for each of S time steps (and each of K segments).

    Which step each row belongs to is told by `select`, which a hook on the UNet calls (`select_steps_on_call`).

    Args:
        codes: what values are rounded to.
        times: (S,) int64, the time steps that have a range.
        act_range, segments: as for ActQuantizer.
        reach: steps on each side of one whose ranges its own covers too.

    Buffers:
        times (S,) int64, scale and zero_point (S, K) float32.
    """

    times: Tensor

    def __init__(
        self, codes: Codes, times: Tensor, act_range: str = "max", segments: Sequence[int] | None = None, reach: int = 0
    ) -> None:
        super().__init__(codes, act_range, segments)
        self.reach = reach
        shape = (len(times), len(self.scale))
        self.register_buffer("times", times.clone())
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))
        self.fixed = False  # the ranges are known from elsewhere: observing changes nothing
        self.rows: int | Tensor | None = None
        self._refresh_bounds()

    @classmethod
    def from_values(cls, codes: Codes, times: Tensor, values: Tensor) -> StepwiseActQuantizer:
        """With the ranges of `values` (S, C), one row a step: all that the layer will ever see; one zero point for all steps."""
        quantizer, values = cls(codes, times).to(values.device), values.float()
        quantizer.set_qparams(*shared_zero_qparams(values.amin(1, keepdim=True), values.amax(1, keepdim=True), codes))
        quantizer.fixed = True
        return quantizer

    def select(self, rows: int | Tensor) -> None:
        """Which of the steps the inputs of the next call belong to: one for all, or one each (N,) int64."""
        self.rows = rows

    def set_stage(self, stage: Stage) -> None:
        """Enter a stage; fixed ranges are not observed: in OBSERVE they stay in floating point."""
        super().set_stage(Stage.FLOAT if self.fixed and stage is Stage.OBSERVE else stage)

    def finish_observing(self) -> None:
        """Turn what the observers saw into a range for each step; a step without data gets one between its neighbours'. Then
        every range covers those of `reach` steps on each side.

        The steps share a zero point (`shared_zero_qparams`), so that the codes of all of them fit one integer kernel.

        Raises:
            ValueError: they saw nothing at all.
        """
        if self.fixed or self.codes is None:
            return
        count, segments = self.scale.shape
        seen = [row for row in range(count) if self.observers[row * segments].seen]
        if not seen:
            raise ValueError("an activation quantizer saw no calibration data")
        lows, highs = torch.empty(2, len(seen), segments)
        for index, row in enumerate(seen):
            for segment in range(segments):
                scale, zero = self.observers[row * segments + segment].qparams(self.codes)
                lows[index, segment], highs[index, segment] = (self.codes.qmin - zero) * scale, (self.codes.qmax - zero) * scale
        low, high = (interpolated(self.known, [self.known[row] for row in seen], ends) for ends in (lows, highs))
        around = [slice(max(row - self.reach, 0), row + self.reach + 1) for row in range(count)]
        low, high = torch.stack([low[rows].amin(0) for rows in around]), torch.stack([high[rows].amax(0) for rows in around])
        self.set_qparams(*shared_zero_qparams(low, high, self.codes))
        self.observers = []

    def _refresh_bounds(self) -> None:
        if self.zero_point.is_meta:
            return
        self.known = tuple(getattr(self, "times", torch.empty(0)).tolist())  # the base class asks before there are any
        if self.codes is not None:
            low, high = self.codes.qmin, self.codes.qmax
            self._step_bounds = [[(low - z, high - z) for z in row] for row in self.zero_point.view(len(self.known), -1).tolist()]

    def _selected(self, count: int, images: slice | None) -> int | Tensor:
        if self.rows is None:
            raise ValueError("a range for each step needs the time steps: call select_steps_on_call on the network")
        if isinstance(self.rows, int):
            return self.rows
        rows, whole = self.rows, count if images is None else self.whole or len(self.rows)
        if whole % len(rows) == 0:  # tokens of all samples, one after another
            rows = rows.repeat_interleave(whole // len(rows))
        rows = rows if images is None else rows[images]
        if len(rows) != count:
            raise ValueError(f"{count} inputs where the network was called with {len(self.rows)} time steps")
        return rows

    def _observe(self, x: Tensor, more: bool, images: slice | None) -> None:
        for row, part in _parts(x, self._selected(len(x), images)):
            segments = self.scale.shape[1]
            for observer, values in zip(self.observers[row * segments : (row + 1) * segments], self._split(part), strict=True):
                observer.observe(values, more)

    def _fake_quantize(self, x: Tensor, smoothing: Tensor | None, owned: bool, images: slice | None) -> Tensor:
        rows = self._selected(len(x), images)
        if isinstance(rows, int):
            return self._to_grid(x, smoothing, owned, self.scale[rows], self._step_bounds[rows])
        assert self.codes is not None
        x = x if smoothing is None else x / smoothing
        parts, rows = [], rows.to(x.device)
        for segment, values in enumerate(self._split(x)):
            scale, zero = (v[rows, segment].view(-1, *[1] * (x.ndim - 1)) for v in (self.scale, self.zero_point))
            parts.append(fake_quantize(values, scale, zero, self.codes))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _parts(x: Tensor, rows: int | Tensor) -> Iterator[tuple[int, Tensor]]:
    """The inputs of each step."""
    if isinstance(rows, int):
        yield rows, x
        return
    for row in rows.unique().tolist():
        yield row, x[(rows == row).to(x.device)]


def interpolated(times: Sequence[int], known: Sequence[int], values: Tensor) -> Tensor:
    """Values (S, K) at `times`, linear between those (M, K) at `known`, constant before the first and after the last."""
    columns = [np.interp(times, known, column) for column in values.double().T.numpy()]
    return torch.tensor(np.stack(columns, 1), dtype=values.dtype)


def nearest_steps(known: Sequence[int], timesteps: Tensor) -> int | Tensor:
    """Index of the nearest known step for the time steps (N,) or () of a call: one number where all are the same."""
    times = timesteps.reshape(-1).tolist()
    rows = [min(range(len(known)), key=lambda i: abs(known[i] - t)) for t in times[:1] if len(set(times)) == 1]
    if rows:
        return rows[0]
    return (timesteps.reshape(-1, 1).cpu() - torch.tensor(known)).abs().argmin(1)


TimesOf = Callable[[Sequence[Any], Mapping[str, Any]], Tensor]  # arguments of a network's call -> its time steps


def select_steps_on_call(module: nn.Module, times_of: TimesOf) -> None:
    """Tell every StepwiseActQuantizer of a network the time steps of each call, from now on. A second call changes nothing."""
    if not _hooks(module):
        module.register_forward_pre_hook(_TellSteps(times_of), with_kwargs=True)


@contextlib.contextmanager
def steps_not_selected(module: nn.Module) -> Iterator[None]:
    """Within it, calls of the network tell nobody their time steps: for tracing, whose time steps have no values.

    Checks of this package that hooks make at each call stay away too.
    """
    ours = [key for key, hook in module._forward_pre_hooks.items() if getattr(hook, "of_qncd", False)]
    hooks = {key: module._forward_pre_hooks.pop(key) for key in ours}
    try:
        yield
    finally:
        module._forward_pre_hooks.update(hooks)


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _TellSteps)]


class _TellSteps:
    """The hook: a class, by which it is found again."""

    of_qncd = True

    def __init__(self, times_of: TimesOf) -> None:
        self.times_of = times_of

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        select_steps(module, self.times_of(args, kwargs))

    def __deepcopy__(self, _: Any) -> _TellSteps:
        return self  # reads arguments, and knows no module


def select_steps(module: nn.Module, timesteps: Tensor) -> None:
    """Tell every StepwiseActQuantizer inside a module the time steps (N,) or () of its next inputs."""
    found: dict[tuple[int, ...], int | Tensor] = {}
    for part in module.modules():
        if isinstance(part, StepwiseActQuantizer):
            if part.known not in found:
                found[part.known] = nearest_steps(part.known, timesteps)
            part.select(found[part.known])


def make_stepwise(quantizer: ActQuantizer, times: Tensor, window: float = 0.0) -> ActQuantizer:
    """A quantizer of the same codes, search and segments with a range for each of `times` (S,).

    Args:
        window: the share of the steps, on each side of one, whose ranges its own covers too.
    """
    if quantizer.codes is None or isinstance(quantizer, StepwiseActQuantizer):
        return quantizer
    reach = round(window * len(times))
    own = StepwiseActQuantizer(quantizer.codes, times, quantizer.act_range, quantizer.segments, reach)
    return own.to(quantizer.scale.device)
