"""Codes of at most four bits, two in a byte: how files and `QuantLayer.pack_weight_` keep them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack4(codes: Tensor) -> Tensor:
    """Signed 4-bit codes, int8 any shape -> uint8 (ceil(n/2),): even elements in the low half of each byte."""
    flat = codes.flatten().view(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] & 15) | (flat[1::2] << 4)


def unpack4(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `pack4`: int8 codes of `shape`. Raises ValueError where the number of bytes does not fit."""
    count = int(torch.Size(shape).numel())
    if packed.numel() != (count + 1) // 2:
        raise ValueError(f"{packed.numel()} bytes of packed codes for {count} weights")
    halves = torch.stack([packed << 4, packed], 1).view(torch.int8) >> 4  # which keeps the sign
    return halves.flatten()[:count].view(tuple(shape))
