"""Activation quantizers whose scales are found at run time, of the very values that they round: per token, or per group of one.

ZeroQuant (arXiv 2206.01861) for tokens. There is nothing to calibrate, and a range never clips; an engine has to look at the
values once more before it rounds them. MoDiff (arXiv 2506.22463) rounds what a value differs by from the time step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qncd.granularity import PER_TENSOR, ROW, Granularity, Shape
from qncd.quant.affine import Codes, affine_qparams, fake_quantize
from qncd.quant.quantizers import HALVES, ActQuantizer, Stage, narrowed

FIRST_BITS = 8  # at the first of a trajectory's time steps, before which there is nothing to differ from


class DynamicActQuantizer(ActQuantizer):
    """Fake quantization with the range of each block of its input, widened to hold 0.

    Args:
        codes: what values are rounded to.
        granularity: of the scales.
        summed: axes of the input that the product it enters sums over.
        segments: as for ActQuantizer: their scales are apart.

    It has no buffers: observing shows it nothing, and a checkpoint holds nothing of it.
    """

    calibrated = False

    def __init__(
        self, codes: Codes, granularity: Granularity, summed: Sequence[int] = ROW, segments: Sequence[int] | None = None
    ) -> None:
        super().__init__(codes, "max", segments)
        self.granularity, self.summed = granularity, tuple(summed)
        del self.scale, self.zero_point

    def set_stage(self, stage: Stage) -> None:
        """Enter a stage; OBSERVE is FLOAT."""
        super().set_stage(Stage.FLOAT if stage is Stage.OBSERVE else stage)

    def finish_observing(self) -> None:
        """Nothing: there are no observers."""

    def _refresh_bounds(self) -> None:
        """Nothing: each call has its own."""

    def _fake_quantize(self, x: Tensor, smoothing: Tensor | None, owned: bool, images: slice | None) -> Tensor:
        assert self.codes is not None
        return self._rounded(x, smoothing, self.codes)

    def _rounded(self, x: Tensor, smoothing: Tensor | None, codes: Codes) -> Tensor:
        """`x` divided by `smoothing`, each block of it on the grid of its own range, in the dtype of `x`."""
        wide = x.float() if x.dtype in HALVES else x
        wide = wide if smoothing is None else wide / smoothing
        parts = [self._on_grid(part, codes) for part in self._split(wide)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return narrowed(out, x) if x.dtype in HALVES else out

    def _on_grid(self, x: Tensor, codes: Codes) -> Tensor:
        block = self.granularity.block(x.shape, self.summed)
        scale, zero_point = (expanded(value, x.shape, block) for value in affine_qparams(*extremes(x, block), codes))
        return fake_quantize(x, scale, zero_point, codes)

    def extra_repr(self) -> str:
        return f"bits={self.codes.bits if self.codes else None}, {self.granularity}, stage={self.stage.value}"


class DifferenceQuantizer(DynamicActQuantizer):
    """Rounds what its input differs by from what it gave at the time step before: a^_t = a^_(t+1) + Q(a_t - a^_(t+1)).

    Errors do not add up, because the next difference holds the last one's. The product with a weight needs the codes of the
    difference alone: W a^_t = W a^_(t+1) + W Q(a_t - a^_(t+1)). At the first time step, and in calls that belong to no
    trajectory, values are rounded to FIRST_BITS. MoDiff's code leaves those of the first step in floating point.

    It holds a tensor of the size of its input for each call of a time step (`qncd.quant.trajectory`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.call: int | None = None
        self.given: dict[tuple[int, int | None], Tensor] = {}  # by the call, and the first of the images that it was for

    def follow(self, call: int | None, fresh: bool = False) -> None:
        """The next inputs are of the so many-th call of their time step, of no trajectory where it is None.

        Args:
            fresh: a trajectory starts.
        """
        self.call = call
        if fresh:
            self.given.clear()

    def _fake_quantize(self, x: Tensor, smoothing: Tensor | None, owned: bool, images: slice | None) -> Tensor:
        assert self.codes is not None
        key = None if self.call is None else (self.call, images.start if images else None)
        before = None if key is None else self.given.get(key)
        if before is None or (before.shape, before.dtype, before.device) != (x.shape, x.dtype, x.device):
            out = self._rounded(x, smoothing, self.codes.of_width(FIRST_BITS))
        else:
            difference = (x if smoothing is None else x / smoothing) - before
            out = before + self._rounded(difference, None, self.codes)
        if key is not None:
            self.given[key] = out.detach()
        return out


def make_quantizer(
    codes: Codes | None,
    act_range: str,
    granularity: Granularity,
    summed: Sequence[int] = ROW,
    segments: Sequence[int] | None = None,
    differences: bool = False,
) -> ActQuantizer:
    """The quantizer of an activation: per tensor a calibrated one, else one whose scales are found at run time.

    Args:
        differences: of these, round what the activation differs by from the time step before.
    """
    if codes is None or granularity == PER_TENSOR:
        return ActQuantizer(codes, act_range, segments)
    kind = DifferenceQuantizer if differences else DynamicActQuantizer
    return kind(codes, granularity, summed, segments)


def extremes(x: Tensor, block: Shape) -> tuple[Tensor, Tensor]:
    """Least and largest value of each block, widened to hold 0, of the shape of the scales."""
    x = _in_blocks(x, block)
    axes = tuple(range(1, x.ndim, 2))
    return x.amin(axes).clamp(max=0), x.amax(axes).clamp(min=0)


def expanded(scale: Tensor, shape: Sequence[int], block: Shape) -> Tensor:
    """Scales as they broadcast against a tensor of `shape`."""
    for axis, (size, part) in enumerate(zip(shape, block, strict=True)):
        if 1 < part < size:
            scale = scale.repeat_interleave(part, axis).narrow(axis, 0, size)
    return scale


def _in_blocks(x: Tensor, block: Shape) -> Tensor:
    """(n, ...) -> (n / b, b, ...), the last block of each axis filled up with zeros."""
    padding = [-size % part for size, part in zip(x.shape, block, strict=True)]
    if any(padding):
        x = F.pad(x, [width for after in reversed(padding) for width in (0, after)])
    return x.reshape([size for axis, part in enumerate(block) for size in (x.shape[axis] // part, part)])
