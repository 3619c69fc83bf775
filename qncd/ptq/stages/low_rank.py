"""Low-rank branches (`QuantConfig.rank`): the largest directions of a weight in 16 bits, the rest of it in integers.

SVDQuant (arXiv 2411.05007): with a smoothed weight W = U S V^T, the first r singular values and vectors become
L = (U_r S_r^1/2)(S_r^1/2 V_r^T), and the layer computes L x + Q(W - L) Q(x). What is left of the weight has a smaller range, and
the branch takes the wide channels that smoothing has moved into the weight. The kernel of a convolution is the matrix (O, I h w):
its branch is a convolution to r channels and one of 1x1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qncd.models.network import Network
from qncd.ptq.context import Context
from qncd.ptq.edges import inner_layers
from qncd.ptq.heap import trim_heap
from qncd.ptq.observing import named
from qncd.quant.layers import QuantLayer
from qncd.quant.transforms import BRANCH_BITS
from qncd.recipe import QuantConfig, Recipe

OVERSAMPLING, ROUNDS = 8, 8  # of the randomized decomposition: more directions than are kept, and powers of the weight


@torch.no_grad()
def add_branches_(network: Network, config: QuantConfig) -> dict[str, int]:
    """Give a branch to all layers but the first and last, in place. Returns the ranks, of layers whose rank is not 0.

    Args:
        network: prepared by `quantize_`, smoothed and rotated or not, its weights in floating point.
        config: that it was prepared with.

    Raises:
        ValueError: a weight is NaN or infinite, or its branch is beyond 16-bit numbers; the layer is named.
    """
    ranks = {}
    for name, layer in inner_layers(network, config).items():
        if rank := rank_of(layer, config.rank, config.branch_bits):
            named(name, lambda layer=layer, rank=rank: layer.split_off_(*branch_of(layer, rank)))  # type: ignore[misc]
            ranks[name] = rank
            trim_heap()
    return ranks


def rank_of(layer: QuantLayer, largest: int, bits: float) -> int:
    """The largest rank whose branch takes at most `bits` for each weight of the layer, and `largest` at most."""
    outputs, inputs = layer.weight.flatten(1).shape
    return min(largest, int(bits * outputs * inputs / (BRANCH_BITS * (outputs + inputs))))


def branch_of(layer: QuantLayer, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) of the smoothed weight's largest directions, as `QuantLayer.split_off_` takes them."""
    weight = layer.unrotated_weight().float()
    left, values, right = largest_directions(weight.flatten(1), rank)
    root = values.sqrt()
    down = (right * root).T.view(rank, *weight.shape[1:])
    if layer.smoothing is not None:  # the branch takes the input as it comes
        down = down / layer.smoothing
    return down.to(layer.branch_dtype), (left * root).to(layer.branch_dtype)


def largest_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(O, r), (r,) and (n, r): the first r singular vectors and values of a matrix (O, n), the same in every call.

    Raises:
        ValueError: the matrix holds NaN or infinity.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("a weight is NaN or infinite")
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, *matrix.shape), ROUNDS)
    return left[:, :rank], values[:rank], right[:, :rank]


class LowRank:
    """The stage: after smoothing, whose wide weights the branches take."""

    title = "low-rank branches"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.rank > 0

    def run(self, context: Context) -> None:
        context.found["low_rank"] = add_branches_(context.network, context.recipe.quant)
