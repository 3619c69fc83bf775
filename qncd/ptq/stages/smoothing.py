"""Intra noise: embedding-derived feature smoothing (QNCD, arXiv 2403.19140, section 3.2).

Between the two convolutions of a residual block the time (and class) embedding stretches a few channels of the
activation that feeds the second one. The stretch is computed from the embedding alone, without image data:

    additive block,    h = GN(h + emb_t):                   S_k = mean_t |((emb_t - mu)/sd)_k * gamma_k|
    scale-shift block, h = GN(h) * (1 + scale_t) + shift_t: S_k = mean_t |1 + scale_{t,k}|

floored at 1. conv2(silu(.)) = (W2 * S)(silu(.) / S) is exact in floating point and easier to quantize.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from qncd.quant.convert import UNet
from qncd.quant.layers import QuantLayer
from qncd.recipe import SmoothingConfig


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


@torch.no_grad()
def time_embeddings(unet: UNet, timesteps: Iterable[int], classes: Iterable[int] | None = None) -> Tensor:
    """The embedding that every residual block receives: (T, E), or (T * classes, E) with a class embedding.

    Args:
        timesteps: those that the sampler will visit.
        classes: for a model with a class embedding; by default all of an embedding table's.

    Raises:
        ValueError: a model that adds other conditions (text, image) to the time embedding.
    """
    times = torch.tensor(sorted(set(timesteps)), device=unet.device)
    kind = unet.config.get("addition_embed_type")
    if kind is not None:
        raise ValueError(f"addition_embed_type {kind!r}: smoothing needs an embedding of time and class alone")
    emb = unet.time_embedding(unet.time_proj(times).to(unet.dtype))  # (T, E)
    if getattr(unet, "class_embedding", None) is None:
        return emb
    if classes is None:
        if not isinstance(unet.class_embedding, nn.Embedding):
            raise ValueError("this model's class embedding is no table: name the classes to smooth for")
        classes = range(unet.class_embedding.num_embeddings)
    labels = torch.tensor(list(classes), device=unet.device)
    if getattr(unet.config, "class_embed_type", None) == "timestep":
        labels = unet.time_proj(labels)
    return (emb[:, None] + unet.class_embedding(labels)[None]).flatten(0, 1)


@torch.no_grad()
def smoothing_factors(
    unet: UNet, timesteps: Iterable[int], config: SmoothingConfig | None = None, classes: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """S (C,) for the second convolution of every residual block, by the name of that convolution.

    The formula follows from each block's own structure. Call before activations are quantized.
    """
    config = config or SmoothingConfig()
    emb = time_embeddings(unet, timesteps, classes)
    factors = {}
    for name, block in unet.named_modules():
        if not isinstance(block, ResnetBlock2D) or block.time_emb_proj is None:
            continue
        projected = block.time_emb_proj(block.nonlinearity(emb))
        if block.time_embedding_norm == "scale_shift":
            per_step = scale_shift_factors(projected)
        elif block.time_embedding_norm == "default":
            per_step = additive_factors(projected, block.norm2)
        else:
            continue  # the embedding enters through the normalization itself: nothing to read off
        factors[f"{name}.conv2"] = per_step.mean(0).clamp(min=config.floor)
    return factors


def smooth_(unet: UNet, factors: dict[str, Tensor]) -> None:
    """Divide the named layers' inputs by S and multiply S into their weights, in place.

    Raises:
        ValueError: the model was not prepared by `quantize_`, its weights are quantized already, or a factor is
            not a positive finite number.
    """
    for name, factor in factors.items():
        layer = unet.get_submodule(name)
        if not isinstance(layer, QuantLayer):
            raise ValueError(f"{name}: smooth_ works on a model prepared by quantize_")
        layer.smooth_(factor)
