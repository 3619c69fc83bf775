"""What the numbers in a Q-Diffusion file say of the flags that it was made with, against the flags that it is read with.

A file holds scales and zero points but no bit widths. Yet a zero point is the share of the range below 0, in steps,

    z = round(-low / delta),  delta = (high - low) / (2^b - 1),   so that   z / (2^b - 1) = -low / (high - low),

whatever part of the range a search has clipped, and the range of a channel of weights can be seen from the weights.
Activations are not in the file, but the first layer's input is known: noisy images of mean 0 and standard deviation about 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.quant.affine import IntegerRange
from qncd.recipe import QuantConfig

_STRADDLING = (0.1, 0.9)  # shares of the range below 0 that tell the number of steps
_WIDTHS = range(2, 9)
_LARGEST_INPUT = 4.5  # of the first layer, about: the largest of some thousand standard normal numbers
_PROBABILITIES = (0.005, 2.0)  # what the largest quantized softmax output of all attention layers lies between, at the least


@dataclass(frozen=True)
class Part:
    """One half of a layer's quantizer, or all of it."""

    delta: Tensor
    zero_point: Tensor
    alpha: Tensor | None = None


def check_part(name: str, part: Part, piece: Tensor | None = None) -> None:
    """Raise ValueError unless the numbers of a quantizer are finite, positive, whole and of their shapes.

    Args:
        piece: the weights that it quantizes, one scale for each output channel; None for an activation with a single scale.
    """
    for key, value in (("delta", part.delta), ("zero_point", part.zero_point)):
        if piece is not None and tuple(value.shape) != (len(piece), *[1] * (piece.ndim - 1)):
            raise ValueError(f"{name}.{key}: shape {tuple(value.shape)}, expected {(len(piece), *[1] * (piece.ndim - 1))}")
        if piece is None and value.numel() != 1:
            raise ValueError(f"{name}.{key}: shape {tuple(value.shape)}, expected one number")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}.{key}: holds NaN or infinity")
    if not bool((part.delta > 0).all()):
        raise ValueError(f"{name}.delta: holds {float(part.delta.min()):g}, allowed are numbers above 0")
    if bool((part.zero_point != part.zero_point.round()).any()):
        raise ValueError(f"{name}.zero_point: holds numbers that are not whole")
    if piece is not None and part.alpha is not None:
        if part.alpha.shape != piece.shape:
            raise ValueError(f"{name}.alpha: shape {tuple(part.alpha.shape)}, expected {tuple(piece.shape)}")
        if not bool(torch.isfinite(part.alpha).all()):
            raise ValueError(f"{name}.alpha: holds NaN or infinity")


def check_weight_bits(name: str, part: Part, piece: Tensor, bits: int) -> None:
    """Raise ValueError where the zero points of a layer's weights are those of another number of bits."""
    rows = piece.flatten(1).float()
    low, high = rows.amin(1), rows.amax(1)
    share = -low / (high - low)
    telling = (share > _STRADDLING[0]) & (share < _STRADDLING[1])
    shares = float(share[telling].sum())
    if shares < 1:
        return
    steps = float(part.zero_point.flatten()[telling].sum()) / shares
    if steps <= 0:
        raise ValueError(f"{name}: zero points of symmetric weights, which are not read: Q-Diffusion's are asymmetric")
    if (found := _nearest(steps)) != bits:
        raise ValueError(f"--weight_bit {bits}: {name} was quantized to {found} bits, as its zero points and weights say")


def check_act_flags(first: Sequence[Part], others: Iterable[Part], config: QuantConfig) -> None:
    """Raise ValueError where activations were quantized with another symmetry or number of bits than the config's.

    Args:
        first: quantizers of the first layer's input, where there are any.
        others: all others but those of softmax outputs.
    """
    bits = config.act_bits
    assert bits is not None
    zeros = [float(part.zero_point) for part in [*first, *others]]
    if not zeros:
        return
    reached = max(zeros, key=abs)
    if config.act_symmetric and reached:
        raise ValueError(f"--a_sym: the file's activations have zero points up to {reached:g}: they are asymmetric")
    if not config.act_symmetric and not reached:
        raise ValueError("the file's activations have no zero points, they are symmetric: give --a_sym")
    levels = 2**bits - 1
    if reached > levels:
        raise ValueError(f"--act_bit {bits}: the file's activations have zero points up to {reached:g}, {levels} is the largest")
    if not first:
        return
    if not config.act_symmetric:
        found, far = math.log2(max(1.0, 2 * float(first[0].zero_point)) + 1), 0.5
    else:  # clipped ranges are smaller
        found, far = math.log2(_LARGEST_INPUT / float(first[0].delta)) + 1, 1.5
    if abs(found - bits) > far:
        number = "zero point" if not config.act_symmetric else "scale"
        raise ValueError(f"--act_bit {bits}: the {number} of the first layer's input is one of {max(2, round(found))} bits")


def check_softmax_bits(parts: Iterable[Part], codes: IntegerRange) -> None:
    """Raise ValueError where softmax outputs, which are at most 1, were quantized to another number of bits than `codes`."""
    deltas = [float(part.delta) for part in parts]
    largest = max(deltas, default=0) * codes.qmax
    if deltas and not _PROBABILITIES[0] <= largest <= _PROBABILITIES[1]:
        found = min(16, max(2, round(math.log2(1 / max(deltas))) + codes.signed))
        raise ValueError(
            f"--sm_abit {codes.bits}: with the file's scales softmax outputs would reach {largest:.2g}: about {found} bits"
        )


def _nearest(steps: float) -> int:
    """The width whose number of steps is nearest by ratio."""
    return min(_WIDTHS, key=lambda bits: abs(math.log(steps / (2**bits - 1))))
