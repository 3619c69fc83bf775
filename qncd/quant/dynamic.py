"""Activation quantizers whose scales are found at run time, of the very values that they round: per token, or per group of one.

ZeroQuant (arXiv 2206.01861) for tokens. There is nothing to calibrate, and a range never clips; an engine has to look at the
values once more before it rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qncd.granularity import PER_TENSOR, ROW, Granularity, Shape
from qncd.quant.affine import Codes, affine_qparams, fake_quantize
from qncd.quant.quantizers import HALVES, ActQuantizer, Stage, narrowed


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
        wide = x.float() if x.dtype in HALVES else x
        wide = wide if smoothing is None else wide / smoothing
        parts = [self._on_grid(part) for part in self._split(wide)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return narrowed(out, x) if x.dtype in HALVES else out

    def _on_grid(self, x: Tensor) -> Tensor:
        assert self.codes is not None
        block = self.granularity.block(x.shape, self.summed)
        scale, zero_point = (expanded(value, x.shape, block) for value in affine_qparams(*extremes(x, block), self.codes))
        return fake_quantize(x, scale, zero_point, self.codes)

    def extra_repr(self) -> str:
        return f"bits={self.codes.bits if self.codes else None}, {self.granularity}, stage={self.stage.value}"


def make_quantizer(
    codes: Codes | None,
    act_range: str,
    granularity: Granularity,
    summed: Sequence[int] = ROW,
    segments: Sequence[int] | None = None,
) -> ActQuantizer:
    """The quantizer of an activation: per tensor a calibrated one, else one whose scales are found at run time."""
    if codes is None or granularity == PER_TENSOR:
        return ActQuantizer(codes, act_range, segments)
    return DynamicActQuantizer(codes, granularity, summed, segments)


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
