"""Block-diagonal Hadamard rotations of channels: what is wide in a few channels is spread over all of a block.

R = I (x) H / sqrt(b) with H of b rows of +1 and -1, H H^T = b I. With y = W x = (W R)(R^T x) both sides can be rounded where no
channel stands out. H is symmetric here, so R is its own inverse.

Sylvester's H has a row of ones, which gathers the mean of all channels in one. A regular H, all of whose rows have the same sum,
leaves it as wide as it is in every channel (ConvRot, arXiv 2512.03673, section 3). There is one for 4, 16, 64 and 256 rows, the
powers of the one for 4; for 2, 8, 32 and 128 there is none, and the product with Sylvester's of 2 rows comes nearest: half of its
rows have sqrt(2) times that sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST, SMALLEST = 256, 8  # rows of a block
_TWO = ((1, 1), (1, -1))
_FOUR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def block_of(sizes: Sequence[int]) -> int | None:
    """The largest block, a power of two from SMALLEST to LARGEST, that divides all these numbers of channels; None for none."""
    common = math.gcd(*sizes, LARGEST)
    return common if common >= SMALLEST else None


def check_block(block: int, sizes: Sequence[int]) -> None:
    """Raise ValueError for a block that is no power of two or does not divide these numbers of channels."""
    if block < 2 or block & (block - 1) or any(size % block for size in sizes):
        raise ValueError(f"rotations of {block} channels: allowed are powers of two that divide {' and '.join(map(str, sizes))}")


@functools.lru_cache(32)
def hadamard(size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """H / sqrt(size), (size, size), symmetric and its own inverse; size is a power of two."""
    with torch.inference_mode(False):  # it is kept, and gradients flow through products with it
        matrix = torch.tensor(_TWO if size.bit_length() % 2 == 0 else ((1,),), dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.kron(matrix, torch.tensor(_FOUR, dtype=torch.float64))
        return (matrix / size**0.5).to(device, dtype)


def rotate(x: Tensor, block: int, dim: int) -> Tensor:
    """`x` with its channels, along `dim`, rotated in blocks; twice gives `x` back up to rounding."""
    matrix, dim = hadamard(block, x.dtype, x.device), dim % x.ndim
    blocks = x.unflatten(dim, (-1, block))
    if dim == x.ndim - 1:
        return (blocks @ matrix).flatten(dim)
    return (matrix @ blocks.flatten(dim + 2)).view(x.shape)  # (..., C / b, b, positions)
