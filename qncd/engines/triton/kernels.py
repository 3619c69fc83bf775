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

import torch
import triton
from torch import Tensor

from qncd.engines.triton import triton_kernels

FULL = 1024  # programs that fill a GPU


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

    def same_as(self, other: Grid) -> bool:
        """Whether both give the same codes."""
        numbers = [(grid.low, grid.high, grid.zero, grid.row.data_ptr()) for grid in (self, other)]
        if numbers[0] != numbers[1] or not torch.equal(self.scale, other.scale):
            return False
        if self.smoothing is None or other.smoothing is None:
            return self.smoothing is other.smoothing
        return torch.equal(self.smoothing, other.smoothing)


def padded_channels(channels: int) -> int:
    """Channels of stored codes: a multiple of what a kernel sums at a time."""
    step = 32 if channels <= 32 else 64
    return -(-channels // step) * step


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
    silu: bool = False,
    gated: bool = False,
    up: bool = False,
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    part: slice | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """What stands between two products, in one pass.

    Args:
        x: (N, H, W, C), contiguous.
        grid: round to it; None leaves floats.
        affine: factor and term (N, C) that `group_norm` gave.
        silu: x * sigmoid(x).
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
    smoothing = grid.smoothing if grid else None
    tiles = (images, -(-out_height * out_width // block_p), -(-out_pitch // block_c))
    triton_kernels.pointwise_kernel[tiles](
        x, out, factor, term, x if smoothing is None else smoothing, grid.scale if grid else x, grid.row if grid else x,
        float(grid.zero) if grid and dtype == torch.int8 else 0.0, grid.low if grid else 0.0, grid.high if grid else 0.0,
        height, width, pitch, first, channels, out_height, out_width, out_pitch, top, left,
        NORM=affine is not None, SILU=silu, GATED=gated, SMOOTH=smoothing is not None, QUANTIZE=grid is not None, UP=times,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out


def layer_norm_codes(x: Tensor, grid: Grid, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Codes (N, H, W, pitch) int8 of the layer norm of x (N, H, W, C), contiguous."""
    channels, rows = x.shape[-1], x.shape[:-1].numel()
    pitch = padded_channels(channels)
    out = x.new_empty(*x.shape[:-1], pitch, dtype=torch.int8)
    block_c = triton.next_power_of_2(pitch)
    block_r = max(1, 4096 // block_c)
    triton_kernels.layer_norm_codes_kernel[(-(-rows // block_r),)](
        x, out, weight, bias, x if grid.smoothing is None else grid.smoothing, grid.scale, grid.row, float(grid.zero),
        grid.low, grid.high, rows, channels, pitch, epsilon,
        SMOOTH=grid.smoothing is not None, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out


def convolve(
    codes: Tensor,
    weight: Packed,
    grid: Grid,
    dtype: torch.dtype,
    stride: int = 1,
    bias: Tensor | None = None,
    embedding: Tensor | None = None,
    residual: Tensor | None = None,
    out_grid: Grid | None = None,
) -> Tensor:
    """The convolution of codes (N, H, W, pitch) int8, padded already: floats (N, H', W', O).

    Args:
        grid: of the codes.
        dtype: of the result.
        bias: (O,).
        embedding: (N, O) to add to every pixel.
        residual: (N, H', W', O) to add.
        out_grid: round to it; the result then is float16, codes less the zero point.
    """
    images, height, width, pitch = codes.shape
    assert pitch == weight.pitch
    out_height, out_width = ((size - k) // stride + 1 for size, k in zip((height, width), weight.size, strict=True))
    outputs, rows = len(weight.codes), images * out_height * out_width
    out = codes.new_empty(images, out_height, out_width, outputs, dtype=torch.float16 if out_grid else dtype)
    last = out_grid or grid
    block_m, block_n, block_k, warps, stages = blocks(rows, outputs, pitch)
    triton_kernels.convolve_kernel[(-(-rows // block_m) * -(-outputs // block_n),)](
        codes, weight.codes, out, weight.scale, weight.sums, grid.scale, grid.row, grid.zero,
        out if bias is None else bias, out if embedding is None else embedding, out if residual is None else residual,
        last.scale, last.row, last.low, last.high,
        rows, outputs, pitch, height, width, out_height, out_width, stride, weight.size[1], weight.size[0] * weight.size[1],
        BIAS=bias is not None, EMBEDDING=embedding is not None, RESIDUAL=residual is not None,
        ROUND_OUT=out_grid is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


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
