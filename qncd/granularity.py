"""Granularity: which values of a tensor share a scale, as values that map a tensor's shape to that of its scales.

A product sums over some axes of its operands: a linear layer over the channels of (N, T, C), a convolution over (C, H, W) of
(N, C, H, W) while its patch moves, both over the inputs n of a weight (O, n). Along all other axes scales may differ at no cost:
they multiply the result. Names and meaning are those of torchao, whose PerRow others call per token (of activations) and per
channel (of weights).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
ROW = (-1,)  # the axes that a linear layer sums over, and any layer over the rows of its weight


@dataclass(frozen=True)
class Granularity(ABC):
    """Which values of a tensor share a scale."""

    @abstractmethod
    def block(self, shape: Sequence[int], summed: Sequence[int] = ROW) -> Shape:
        """Size of the blocks that share a scale, along each axis; the last block of an axis may be smaller.

        Args:
            shape: of the tensor.
            summed: the axes that its product sums over.
        """

    def scale_shape(self, shape: Sequence[int], summed: Sequence[int] = ROW) -> Shape:
        """Shape of the scales of a tensor."""
        return tuple(-(-size // part) for size, part in zip(shape, self.block(shape, summed), strict=True))

    def sizes(self, length: int) -> list[int]:
        """Sizes of the consecutive parts of a row (length,) that have a scale each."""
        (part,) = self.block((length,))
        return [min(part, length - start) for start in range(0, length, part)]


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale: (N, T, C) -> (1, 1, 1)."""

    def block(self, shape: Sequence[int], summed: Sequence[int] = ROW) -> Shape:
        return tuple(shape)


@dataclass(frozen=True)
class PerRow(Granularity):
    """A scale for everything that is summed into one result.

    A token of a linear layer's input (N, T, C) -> (N, T, 1); a sample of a convolution's (N, C, H, W) -> (N, 1, 1, 1); an output
    channel of a weight (O, n) -> (O, 1); a token of attention's q, k and probabilities (N, heads, L, D) -> (N, heads, L, 1); a
    channel of v, which is summed over its tokens, (N, heads, L, D) -> (N, heads, 1, D).
    """

    def block(self, shape: Sequence[int], summed: Sequence[int] = ROW) -> Shape:
        axes = {axis % len(shape) for axis in summed}
        return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


@dataclass(frozen=True)
class PerGroup(PerRow):
    """A scale for `size` consecutive values along the first axis that is summed over; the last group may be smaller.

    Of a token's channels (N, T, C) -> (N, T, C / G); of a convolution's channels (N, C, H, W) -> (N, C / G, 1, 1); of the inputs
    of a weight (O, n) -> (O, n / G).
    """

    size: int

    def block(self, shape: Sequence[int], summed: Sequence[int] = ROW) -> Shape:
        first = min(axis % len(shape) for axis in summed)
        whole = super().block(shape, summed)
        return (*whole[:first], min(self.size, shape[first]), *whole[first + 1 :])


PER_TENSOR, PER_ROW = PerTensor(), PerRow()
CHANNEL, TENSOR, TOKEN = "channel", "tensor", "token"
GROUPS = {f"group{size}": PerGroup(size) for size in (16, 32, 64, 128, 256)}
WEIGHTS: dict[str, Granularity] = {CHANNEL: PER_ROW, **GROUPS}  # by the names that recipes have for them
ACTIVATIONS: dict[str, Granularity] = {TENSOR: PER_TENSOR, TOKEN: PER_ROW, **GROUPS}
