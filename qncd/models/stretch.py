"""How strongly an embedding stretches the channels of an activation (QNCD, arXiv 2403.19140, section 3.2).

additive block,    h = GN(h + emb_t):                   |((emb_t - mu)/sd)_k * gamma_k|
scale-shift block, h = GN(h) * (1 + scale_t) + shift_t: |1 + scale_{t,k}|
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normalized_embedding(emb: Tensor, groups: int, eps: float) -> Tensor:
    """(emb - mu)/sd over the channels of each GroupNorm group, (N, C) -> (N, C).

    A group of n channels bounds the result by sqrt(n-1); with one channel a group it is 0.
    """
    grouped = emb.view(len(emb), groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    return (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).view_as(emb)


def additive_factors(emb: Tensor, norm: nn.GroupNorm) -> Tensor:
    """|normalized embedding * gamma| of an additive block, (N, C) for projected embeddings (N, C)."""
    gamma = norm.weight if norm.affine else torch.ones(norm.num_channels, device=emb.device)
    return (normalized_embedding(emb, norm.num_groups, norm.eps) * gamma).abs()


def scale_shift_factors(emb: Tensor) -> Tensor:
    """|1 + scale| of a scale-shift block, (N, C) for projected embeddings (N, 2C): scale first, then shift."""
    return (1 + emb.chunk(2, 1)[0]).abs()
