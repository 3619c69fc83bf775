"""Uniform affine quantization as pure arithmetic: codes, scales, zero points and range search.

Symbols: x real value, s scale, z zero point, q integer code. q = clamp(round(x/s) + z, qmin, qmax), x^ = (q - z)*s.
Rounding is half to even. Zero is always exactly representable, so that zero padding stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qncd.quant.float8 import Float8Codes

# Q-Diffusion's range search: 80 clip ratios 1.00, 0.99, ... 0.21, error |x - x^|^2.4.
SEARCH_RATIOS = tuple(1.0 - 0.01 * i for i in range(80))
SEARCH_NORM = 2.4
SMALLEST_SCALE = 1e-8  # of a range of zeros, as in Q-Diffusion
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_ORDINARY = 2.0**-40, 2.0**40  # magnitudes whose search errors, raised to SEARCH_NORM and summed, stay within float32


@dataclass(frozen=True)
class IntegerRange:
    """Integer codes of one width: signed [-2^(b-1), 2^(b-1)-1] or unsigned [0, 2^b-1]."""

    bits: int
    signed: bool
    file_dtype: ClassVar[torch.dtype] = torch.int8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits {self.bits}: allowed are 2 to 16")

    def of_width(self, bits: int) -> IntegerRange:
        """Codes of the same kind, `bits` wide."""
        return IntegerRange(bits, self.signed)

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def ceiling(self) -> int:
        """A power of two that no code exceeds in magnitude."""
        return 2 ** (self.bits - self.signed)

    def round_(self, steps: Tensor) -> Tensor:
        """The nearest whole numbers, in place, of any size."""
        return steps.round_()

    def pack(self, values: Tensor) -> Tensor:
        """Codes of at most 8 bits as int8, of the same shape."""
        return values.to(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, float32."""
        return packed.to(torch.float32)


Codes = IntegerRange | Float8Codes  # what x / scale is rounded to


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, codes: Codes) -> Tensor:
    """Integer codes of `x`, as floats, same shape; `scale` and `zero_point` broadcast against `x`."""
    return torch.clamp(codes.round_(x / scale) + zero_point, codes.qmin, codes.qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of codes `q`: (q - z) * s."""
    return (q - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, codes: Codes) -> Tensor:
    """`x` rounded to the grid of its codes: dequantize(quantize(x))."""
    return dequantize(quantize(x, scale, zero_point, codes), scale, zero_point)


def _usable(scale: Tensor, codes: Codes) -> Tensor:
    """Scales by which every value can be divided, and with which every code stands for a finite one.

    0, of a range of zeros, becomes SMALLEST_SCALE; what float32 holds with few digits its smallest normal number.
    """
    scale = torch.where(scale == 0, SMALLEST_SCALE, scale)
    return scale.clamp(min=_TINY, max=_HUGE / codes.ceiling)


def ordinary_factor(largest: Tensor) -> Tensor:
    """Powers of two that bring magnitudes near 1 where float32 would not hold their powers; 1 for all others."""
    _, exponent = torch.frexp(largest)
    extreme = (largest > 0) & ((largest < _ORDINARY[0]) | (largest > _ORDINARY[1]))
    return torch.where(extreme, torch.ldexp(torch.ones_like(largest), (-exponent).clamp(-126, 126)), 1.0)


def symmetric_scale(largest: Tensor, codes: Codes) -> Tensor:
    """Scale that maps the largest magnitude to the largest code: max|x| / qmax."""
    return _usable(largest / codes.qmax, codes)


def affine_qparams(low: Tensor, high: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high], widened to hold 0.

    Signed codes get a symmetric range and zero point 0; unsigned ones s = (high-low)/(2^b-1), z = round(-low/s).
    """
    low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    if codes.signed:
        scale = symmetric_scale(torch.maximum(-low, high), codes)
        return scale, torch.zeros_like(scale)
    levels = codes.qmax - codes.qmin
    width = high - low
    scale = _usable(torch.where(width.isfinite(), width / levels, high / levels - low / levels), codes)
    return scale, torch.round(-low / scale).clamp(codes.qmin, codes.qmax)


def shared_zero_qparams(low: Tensor, high: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Scales of S ranges each, with one zero point for all: what an integer kernel needs, whose padding is that code.

    The zero point is the one with the least product of scales; each scale is the smallest that covers its range.

    Args:
        low, high: (S, K) ends of the ranges, widened to hold 0.

    Returns:
        scales (S, K), and zero points (S, K) that are the same in each column.
    """
    low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    if codes.signed:
        return affine_qparams(low, high, codes)
    zeros = torch.arange(codes.qmin, codes.qmax + 1, dtype=low.dtype, device=low.device)
    below, above = -low / (zeros - codes.qmin).view(-1, 1, 1), high / (codes.qmax - zeros).view(-1, 1, 1)  # (Z, S, K)
    # No code below 0 is fine where nothing is below 0 (0/0), and no scale is enough where there is something (x/0).
    scales = torch.maximum(below.nan_to_num(0.0, posinf=torch.inf), above.nan_to_num(0.0, posinf=torch.inf))
    scales = torch.where(scales.isfinite(), _usable(scales, codes), scales)  # infinite: no zero point to choose
    best = scales.double().log().sum(1).argmin(0)  # (K,)
    return scales.gather(0, best.expand(1, *low.shape))[0], zeros[best].expand_as(low).clone()


def weight_error(rows: Tensor, scale: Tensor, codes: Codes) -> Tensor:
    """What the range search compares: the mean L2.4 error (O, 1) of rows (O, K) that are rounded with scales (O, 1)."""
    error = codes.round_(rows / scale).clamp_(codes.qmin, codes.qmax).mul_(scale).sub_(rows)
    return error.abs_().pow_(SEARCH_NORM).mean(1, keepdim=True)


def search_weight_scale(weight: Tensor, codes: Codes, chunk_elements: int = 1 << 18) -> Tensor:
    """The clip ratio of each output channel that minimises the L2.4 error of symmetric quantization.

    Args:
        weight: (O, K): one row an output channel.
        codes: signed codes.

    Returns:
        scales (O, 1). All channels of a chunk are searched at once; the first of equal ratios wins.
    """
    largest = weight.abs().amax(1, keepdim=True)  # (O, 1)
    factor = ordinary_factor(largest)
    best_scale = torch.empty_like(largest)
    rows = max(1, chunk_elements // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        near_one = factor[start : start + rows]
        part, peak = weight[start : start + rows] * near_one, largest[start : start + rows] * near_one
        best_error = torch.full_like(peak, torch.inf)
        scale = torch.empty_like(peak)
        for ratio in SEARCH_RATIOS:
            candidate = symmetric_scale(peak * ratio, codes)
            error = weight_error(part, candidate, codes)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            scale = torch.where(better, candidate, scale)
        best_scale[start : start + rows] = scale / near_one
    return _usable(best_scale, codes)


def float16_scale(scale: Tensor) -> Tensor:
    """Scales as a file keeps them that has 16 bits for each: the nearest float16 number that is neither 0 nor infinite."""
    numbers = torch.finfo(torch.float16)
    magnitude = scale.abs().clamp(numbers.smallest_normal * numbers.eps, numbers.max)  # from the smallest float16 on
    return torch.copysign(magnitude, scale).half().to(scale.dtype)


def group_scale(weight: Tensor, codes: Codes, clip: bool) -> Tensor:
    """The scale of each group of a row, a float16 number of either sign.

    The smallest code has no counterpart above 0: the sign puts the weight of largest magnitude on its side, which takes 12% off
    the squared error of normal weights at 4 bits.

    Args:
        weight: (O, G, N): G groups of N inputs in each row.
        codes: signed codes.
        clip: take the clip ratio of least error, as `search_weight_scale`, instead of the scale at which the weight of largest
            magnitude has the smallest code, as ggml's quantizer of q4_0.

    Returns:
        (O, G).
    """
    rows = weight.flatten(0, 1)  # (O * G, N)
    widest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # (O * G, 1)
    sign = torch.where(widest > 0, -1.0, 1.0)
    scale = search_weight_scale(rows * sign, codes) if clip else widest.abs() / -codes.qmin
    return float16_scale(scale * sign).view(weight.shape[:2])


def search_qparams(
    values: Tensor, counts: Tensor | None, low: Tensor, high: Tensor, codes: Codes, chunk_elements: int = 1 << 18
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the clip ratio that minimises the L2.4 error over weighted values.

    Args:
        values: (M,) real values: a tensor itself, or the centres of a histogram's bins.
        counts: (M,) how often each occurs, or None for once each.
        low, high: the extremes, 0-dim; the candidates are ratio * [low, high].
        chunk_elements: values times candidates that are tried at once.

    Returns:
        scale and zero point, 0-dim. The first of equal candidates wins, as in Q-Diffusion.
    """
    factor = ordinary_factor(torch.maximum(-low, high))
    errors, scales, zero_points = searched_errors(values * factor, counts, low * factor, high * factor, codes, chunk_elements)
    best = int(errors.cpu().numpy().argmin())  # torch's own does not say which of equal ones it gives
    return _usable(scales[best] / factor, codes), zero_points[best]


def searched_errors(
    values: Tensor, counts: Tensor | None, low: Tensor, high: Tensor, codes: Codes, chunk_elements: int = 1 << 18
) -> tuple[Tensor, Tensor, Tensor]:
    """What `search_qparams` compares: the L2.4 error of each of SEARCH_RATIOS, float64, with its scale and zero point.

    Arguments as there, of ordinary magnitudes. Errors are means over the values, or with `counts` sums.
    """
    ratios = torch.tensor(SEARCH_RATIOS, dtype=low.dtype, device=low.device)
    scales, zero_points = affine_qparams(low * ratios, high * ratios, codes)
    errors = []
    at_once = max(1, chunk_elements // len(values))
    for scale, zero in zip(scales.split(at_once), zero_points.split(at_once), strict=True):
        scale, zero = scale.view(-1, 1), zero.view(-1, 1)
        error = (fake_quantize(values, scale, zero, codes) - values).abs_().pow_(SEARCH_NORM).double()
        errors.append(error.mean(1) if counts is None else error.mul_(counts).sum(1))
    return torch.cat(errors), scales, zero_points
