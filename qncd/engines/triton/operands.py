"""What the kernels multiply: codes of weights, the grids of activations, and codes that were found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.quant.affine import IntegerRange


def padded_channels(channels: int) -> int:
    """Channels of stored codes: a multiple of what a kernel sums at a time."""
    step = 32 if channels <= 32 else 64
    return -(-channels // step) * step


class Packed:
    """The codes of a weight, laid out for `convolve`.

    Args:
        codes: (O, I, h, w) int8.
        scale: (O,) float32.

    Attributes:
        codes: (O, h * w * pitch) int8, input channels last and filled up with zeros to `pitch`.
        sums: (O,) int32 of each output's codes.
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        outputs, channels, *self.size = codes.shape
        self.pitch = padded_channels(channels)
        filled = codes.new_zeros(outputs, *self.size, self.pitch)
        filled[..., :channels] = codes.permute(0, 2, 3, 1)
        self.codes = filled.view(outputs, -1)
        self.sums = self.codes.sum(1, dtype=torch.int32)
        self.scale = scale.float().contiguous()


class PackedDepthwise:
    """The codes of a weight that multiplies each channel by its own, laid out for `depthwise`.

    Args:
        codes: (C, 1, h, w) int8.
        scale: (C,) float32.

    Attributes:
        codes: (h * w, pitch) int8, filled up with zeros to `pitch`.
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        channels, _, *self.size = codes.shape
        self.pitch, self.channels = padded_channels(channels), channels
        self.codes = codes.new_zeros(self.size[0] * self.size[1], self.pitch)
        self.codes[:, :channels] = codes.flatten(1).T
        self.scale = scale.float().contiguous()


class Grid:
    """The integer grid of one activation.

    Args:
        scale: (S,) float32, one or that of each time step.
        row: () int32 on the same device: which of them.
        low, high: smallest and largest code, counted from the zero point.
        zero: code that stands for 0, as it is stored.
        smoothing: (C,) float32, what the channels are divided by beside the scale, or None.
    """

    def __init__(self, scale: Tensor, row: Tensor, low: float, high: float, zero: int, smoothing: Tensor | None = None) -> None:
        self.scale, self.row, self.low, self.high, self.zero, self.smoothing = scale, row, low, high, zero, smoothing


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """How an activation is rounded whose scales are found at run time: of each token, or of each image of a convolution.

    Attributes:
        codes: what values are rounded to; the zero point of signed ones is 0.
        smoothing: (C,) float32, what the channels are divided by before the range is looked for, or None.
    """

    codes: IntegerRange
    smoothing: Tensor | None = None

    @property
    def stored(self) -> int:
        """What is added to a code where it is stored in 8 bits with a sign."""
        return -128 if self.codes.qmax > 127 else 0


@dataclass(frozen=True)
class Ranges:
    """What was found for the codes of one tensor.

    Attributes:
        scale: (G,) float32.
        zero: (G,) int32 codes that stand for 0, as they are stored.
    """

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Rounded:
    """Codes (N, H, W, pitch) int8, channels last, and what they stand for."""

    codes: Tensor
    grid: Grid | Ranges


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis.

    Attributes:
        epsilon: added to the mean square.
        weight, bias: (C,), or None.
        centered: the mean is taken off first, as in a layer norm; without, it is a root-mean-square norm.
    """

    epsilon: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    centered: bool = True
