"""Kernels of a quantized network on a GPU: group norms, quantizing, integer convolutions and attention, on channels-last tensors.

A tensor here is (N, H, W, C) in memory, or (N, 1, L, C) for tokens. Codes are int8. Those of 8 bits are stored 128 below our
unsigned ones, with a zero point; those of fewer are stored less the zero point, which leaves none. Products are summed in
int32 and leave the kernel as floats, with bias, time embedding and residual added. Everything that a time step chooses is
read on the device, so a call can be recorded as a CUDA graph.

With TRITON_INTERPRET=1, set before Triton is imported, the same kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from qncd.engines.triton import triton_kernels
from qncd.engines.triton.operands import Grid, Norm, Packed, PackedDepthwise, Ranges, Rounded, TokenGrid, padded_channels
from qncd.quant.affine import affine_qparams, quantize
from qncd.quant.dynamic import extremes

FULL = 1024  # programs that fill a GPU
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh")  # by the number that kernels know them by


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(factor, term) of a group norm of x (N, H, W, C): (N, C) float32 each, so that norm(x) = x * factor + term."""
    images, height, width, channels = x.shape
    pixels, size = height * width, channels // groups
    block_c = min(triton.next_power_of_2(channels), 64)
    tiles = images * -(-channels // block_c)  # of one chunk
    block_p = next((size for size in (128, 64, 32) if tiles * (pixels // size) >= FULL), 16)
    chunks = -(-pixels // block_p)
    means, squares = x.new_empty(2, images, chunks, channels, dtype=torch.float32)
    triton_kernels.group_norm_sums_kernel[(images, chunks, -(-channels // block_c))](
        x, means, squares, pixels, channels, chunks, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4
    )
    factor, term = x.new_empty(2, images, channels, dtype=torch.float32)
    triton_kernels.group_norm_affine_kernel[(images, groups)](
        means, squares, weight, bias, factor, term, pixels, channels, chunks, size, epsilon, block_p,
        CHUNKS=triton.next_power_of_2(chunks), SIZE=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return factor, term


def pointwise(
    x: Tensor,
    grid: Grid | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    act: str = "",
    gated: bool = False,
    up: bool = False,
    pads: Sequence[int] = (0, 0, 0, 0),
    part: slice | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """What stands between two products, in one pass.

    Args:
        x: (N, H, W, C), contiguous.
        grid: round to it; None leaves floats.
        affine: factor and term (N, C), as `group_norm` gives them.
        act: one of ACTIVATIONS.
        gated: the first half of the channels times GELU of the second.
        up: every pixel becomes two by two.
        pads: pixels of zeros on top, left, bottom and right.
        part: channels that are wanted.
        dtype: of the result: int8 codes, or float16 codes less the zero point, or any float without a grid.

    Returns:
        (N, H', W', C'); of int8, C' is the next `padded_channels`.
    """
    images, height, width, pitch = x.shape
    assert x.is_contiguous()
    whole = pitch // 2 if gated else pitch
    first, channels = (0, whole) if part is None else (part.start, part.stop - part.start)
    times, (top, left, bottom, right) = 2 if up else 1, pads
    out_height, out_width = height * times + top + bottom, width * times + left + right
    out_pitch = padded_channels(channels) if dtype == torch.int8 else channels
    out = x.new_empty(images, out_height, out_width, out_pitch, dtype=dtype)
    block_c = min(triton.next_power_of_2(out_pitch), 128)
    block_p = min(triton.next_power_of_2(out_height * out_width), 4096 // block_c)
    factor, term = affine or (x, x)
    smoothing, rounding = _rounding(grid, dtype, x)
    tiles = (images, -(-out_height * out_width // block_p), -(-out_pitch // block_c))
    triton_kernels.pointwise_kernel[tiles](
        x, out, factor, term, x if smoothing is None else smoothing, *rounding,
        height, width, pitch, first, channels, out_height, out_width, out_pitch, top, left, factor.stride(0), term.stride(0),
        NORM=affine is not None, ACT=ACTIVATIONS.index(act), GATED=gated, SMOOTH=smoothing is not None,
        QUANTIZE=grid is not None, UP=times, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out


def _rounding(grid: Grid | None, dtype: torch.dtype, nothing: Tensor) -> tuple[Tensor | None, tuple[Any, ...]]:
    """What kernels get of a grid: its smoothing, then scale, row, zero point of what is stored in a dtype, low and high."""
    if grid is None:
        return None, (nothing, nothing, 0.0, 0.0, 0.0)
    return grid.smoothing, (grid.scale, grid.row, float(grid.zero) if dtype == torch.int8 else 0.0, grid.low, grid.high)


def normed(
    x: Tensor,
    norm: Norm,
    grid: Grid | None = None,
    factor: Tensor | None = None,
    term: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """norm(x) * factor + term, rounded.

    Args:
        x: (N, H, W, C), contiguous.
        grid: round to it; None leaves floats.
        factor, term: (N, C) with neighbouring channels side by side, or None.
        dtype: of the result without a grid.

    Returns:
        Codes (N, H, W, pitch) int8, or floats (N, H, W, C).
    """
    channels, dtype = (padded_channels(x.shape[-1]), torch.int8) if grid else (x.shape[-1], dtype)
    out, (smoothing, rounding) = x.new_empty(*x.shape[:-1], channels, dtype=dtype), _rounding(grid, dtype, x)
    _on_rows(x, out, norm, factor, term, "", smoothing, rounding, QUANTIZE=grid is not None, TOKENS=False, SIGNED=False)
    return out


def token_codes(
    x: Tensor,
    grid: TokenGrid,
    norm: Norm | None = None,
    factor: Tensor | None = None,
    term: Tensor | None = None,
    act: str = "",
) -> Rounded:
    """act(norm(x) * factor + term) of x (N, H, W, C), contiguous, each row of channels on the grid of its own range."""
    out = x.new_empty(*x.shape[:-1], padded_channels(x.shape[-1]), dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    zero = torch.empty_like(scale, dtype=torch.int32)
    rounding, signed = (x, x, float(grid.stored), float(grid.codes.qmin), float(grid.codes.qmax)), grid.codes.signed
    _on_rows(x, out, norm, factor, term, act, grid.smoothing, rounding, scale, zero, QUANTIZE=False, TOKENS=True, SIGNED=signed)
    return Rounded(out, Ranges(scale, zero))


def image_codes(x: Tensor, grid: TokenGrid, pads: Sequence[int] = (0, 0, 0, 0)) -> Rounded:
    """x (N, H, W, C), each image on the grid of its own range, with pixels of zeros on top, left, bottom and right."""
    x = x.float() if grid.smoothing is None else x.float() / grid.smoothing
    scale, zero = affine_qparams(*extremes(x, (1, *x.shape[1:])), grid.codes)  # (N, 1, 1, 1)
    top, left, bottom, right = pads
    images, height, width, channels = x.shape
    stored = (zero + grid.stored).to(torch.int8)
    out = stored.expand(images, height + top + bottom, width + left + right, padded_channels(channels)).contiguous()
    inner = out[:, top : top + height, left : left + width, :channels]
    inner.copy_(quantize(x, scale, zero, grid.codes) + grid.stored)
    return Rounded(out, Ranges(scale.flatten(), stored.flatten().int()))


def _on_rows(
    x: Tensor,
    out: Tensor,
    norm: Norm | None,
    factor: Tensor | None,
    term: Tensor | None,
    act: str,
    smoothing: Tensor | None,
    rounding: tuple[Any, ...],
    *found: Tensor,
    **kinds: bool,
) -> None:
    """Start rows_kernel; `rounding` is scale, row, zero, low and high, `found` what the ranges of rows go to."""
    rows, block_c = x.shape[:-1].numel(), triton.next_power_of_2(out.shape[-1])
    block_r = max(1, 4096 // block_c)
    norm_ = norm or Norm(0.0)
    given = (norm_.weight, norm_.bias, factor, term, smoothing)
    weight, bias, factors, terms, smoothings = (x if value is None else value for value in given)
    triton_kernels.rows_kernel[(-(-rows // block_r),)](
        x, out, weight, bias, factors, terms, smoothings, *rounding, *(found or (x, x)),
        rows, x.shape[1] * x.shape[2], x.shape[-1], out.shape[-1], norm_.epsilon, factors.stride(0), terms.stride(0),
        NORM=0 if norm is None else 1 + norm.centered, WEIGHT=norm_.weight is not None, BIAS=norm_.bias is not None,
        FACTOR=factor is not None, TERM=term is not None, ACT=ACTIVATIONS.index(act), SMOOTH=smoothing is not None, **kinds,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def convolve(
    rounded: Rounded,
    weight: Packed,
    dtype: torch.dtype,
    stride: int = 1,
    bias: Tensor | None = None,
    embedding: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "",
    out_grid: Grid | None = None,
) -> Tensor:
    """The convolution of codes that are padded already: (N, H', W', O), act((sums + embedding) * gate + residual).

    Args:
        dtype: of the result; with `out_grid`, float16 for codes less the zero point, or int8 for codes as they are stored.
        bias: (O,).
        embedding: (N, O) to add to every pixel.
        gate: (N, O) to multiply every pixel by, with neighbouring channels side by side.
        residual: (N, H', W', O) to add.
        act: one of ACTIVATIONS.
        out_grid: round to it; stored codes need as many outputs as `padded_channels` gives.
    """
    codes, (scale, row, zero) = rounded.codes, _scales(rounded.grid)
    images, height, width, pitch = codes.shape
    assert pitch == weight.pitch
    out_height, out_width = out_sizes((height, width), weight.size, stride)
    outputs, rows = len(weight.codes), images * out_height * out_width
    out = codes.new_empty(images, out_height, out_width, outputs, dtype=dtype)
    smoothing, (out_scale, out_row, *ends) = _rounding(out_grid, dtype, out)
    embeddings, gates, residuals, smoothings = (out if v is None else v for v in (embedding, gate, residual, smoothing))
    block_m, block_n, block_k, warps, stages = blocks(rows, outputs, pitch)
    tokens = isinstance(rounded.grid, Ranges)
    triton_kernels.convolve_kernel[(-(-rows // block_m) * -(-outputs // block_n),)](
        codes, weight.codes, out, weight.scale, weight.sums, scale, row, zero, rows // len(scale) if tokens else 1,
        out if bias is None else bias, embeddings, gates, residuals, out_scale, out_row, smoothings, *ends,
        rows, outputs, pitch, height, width, out_height, out_width, stride, weight.size[1], weight.size[0] * weight.size[1],
        gates.stride(0),
        BIAS=bias is not None, EMBEDDING=embedding is not None, GATE=gate is not None, RESIDUAL=residual is not None,
        ACT=ACTIVATIONS.index(act), ROUND_OUT=out_grid is not None, SMOOTH=smoothing is not None,
        TOKENS=tokens, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _scales(grid: Grid | Ranges) -> tuple[Tensor, Tensor, int]:
    """What kernels get of it: scales, which of them or their zero points, and the zero point of all."""
    return (grid.scale, grid.zero, 0) if isinstance(grid, Ranges) else (grid.scale, grid.row, grid.zero)


def depthwise(
    rounded: Rounded, weight: PackedDepthwise, dtype: torch.dtype, stride: int = 1, bias: Tensor | None = None
) -> Tensor:
    """The convolution of codes that are padded already, channel by channel: floats (N, H', W', C)."""
    codes, (scale, row, zero) = rounded.codes, _scales(rounded.grid)
    images, height, width, pitch = codes.shape
    assert pitch == weight.pitch
    out_height, out_width = out_sizes((height, width), weight.size, stride)
    out = codes.new_empty(images, out_height, out_width, weight.channels, dtype=dtype)
    block_c = min(triton.next_power_of_2(weight.channels), 64)
    block_p = min(triton.next_power_of_2(out_height * out_width), 2048 // block_c)
    tiles = (images, -(-out_height * out_width // block_p), -(-weight.channels // block_c))
    triton_kernels.depthwise_kernel[tiles](
        codes, weight.codes, out, weight.scale, scale, row, zero, out if bias is None else bias,
        height, width, weight.channels, pitch, out_height, out_width, stride, weight.size[1],
        BIAS=bias is not None, TAPS=weight.size[0] * weight.size[1], TOKENS=isinstance(rounded.grid, Ranges),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out


def out_sizes(sizes: Sequence[int], kernel: Sequence[int], stride: int) -> list[int]:
    """Height and width of a convolution of what is padded already."""
    return [(size - k) // stride + 1 for size, k in zip(sizes, kernel, strict=True)]


def blocks(rows: int, outputs: int, pitch: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of `convolve`: the largest block of which there are enough, timed on an H200."""
    deep = next(size for size in (128, 64, 32) if pitch % size == 0)
    if rows <= 16:
        return 16, 64, deep, 4, 4
    for block_m, block_n, stages, enough in ((128, 128, 4, 120), (128, 64, 4, 120), (64, 64, 6, 120), (64, 32, 6, 64)):
        if -(-rows // block_m) * -(-outputs // block_n) >= enough:
            return block_m, block_n, min(deep, 64) if block_n == 128 else deep, 4, stages
    return 32, 32, deep, 4, 6


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[Grid],
    softmax: Grid,
    heads: int,
    gain: float,
    dtype: torch.dtype,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(gain q k^T + mask) v with the softmax rounded to its grid.

    Args:
        q, k, v: (N, L, heads * D), (N, L2, heads * D) twice: codes less their zero points, float16.
        grids: of q, k and v.
        softmax: its grid, with a zero point of 0.
        gain: above 0.
        dtype: of the result.
        mask: what broadcasts to (N, heads, L, L2), or None.

    Returns:
        (N, L, heads * D).
    """
    images, length, width = q.shape
    depth, keys = width // heads, k.shape[1]
    block_d, unit = max(16, triton.next_power_of_2(depth)), math.gcd(depth, 16)
    block_m, block_n, warps, stages = attention_blocks(images * heads, length, keys, block_d)
    out = q.new_empty(q.shape, dtype=dtype)
    tables = [table for grid in (*grids[:2], softmax, grids[2]) for table in (grid.scale, grid.row)]
    masked = q.new_empty(()) if mask is None else mask
    strides = masked.expand(images, heads, length, keys).stride()
    triton_kernels.attend_kernel[(-(-length // block_m), images * heads)](
        q, k, v, out, *tables, gain, softmax.high, heads, length, keys, depth // unit, masked, *strides,
        UNIT=unit, WIDE=softmax.high > 255, EVEN=keys % block_n == 0, MASKED=mask is not None, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=block_d, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def attention_blocks(count: int, length: int, keys: int, block_d: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) of `attend` for `count` heads of all images, as timed on an H200."""
    if keys <= 128:
        return 64, 32, 4, 3
    if block_d <= 128:
        return 128 if block_d <= 64 else 64, 64, 4, 3
    return (128, 64, 8, 2) if -(-length // 128) * count >= 128 else (64, 32, 4, 3)
