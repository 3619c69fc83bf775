"""Temporal feature maintenance (TFMQ-DM, arXiv 2311.16503): the time embedding and every projection of it, as one block.

What these layers compute depends on the time step alone, so there are only as many outputs as the sampler has steps: their
weights' rounding is learned against exactly those outputs, and their inputs get a range for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.func import functional_call

from qncd.ptq.stages.smoothing import time_embeddings
from qncd.quant.convert import UNet, replace_quantizers_
from qncd.quant.layers import QuantLayer
from qncd.quant.rounding import LearnedRounding, learn_roundings_, reconstruction_loss
from qncd.quant.stepwise import StepwiseActQuantizer, make_stepwise, select_steps_on_call
from qncd.recipe import ReconstructionConfig


class TemporalPath(nn.Module):
    """The part of a UNet that depends on the time step alone: sinusoid in, all projections out."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        if not depends_on_time_alone(unet):
            raise ValueError("temporal reconstruction needs an embedding of time alone; this model adds other conditions to it")
        self.embedding = unet.time_embedding
        blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None]
        self.projections = nn.ModuleList([block.time_emb_proj for block in blocks])
        self.nonlinearity = blocks[0].nonlinearity

    def forward(self, sinusoid: Tensor) -> list[Tensor]:
        """(S, C) -> the S outputs of each projection, (S, C_i)."""
        activated = self.nonlinearity(self.embedding(sinusoid))
        return [projection(activated) for projection in self.projections]


def depends_on_time_alone(unet: UNet) -> bool:
    """Whether the blocks' embedding is one of the time step alone: no class, no text or size beside it."""
    return getattr(unet, "class_embedding", None) is None and unet.config.get("addition_embed_type") is None


def temporal_layers(unet: UNet) -> dict[str, QuantLayer]:
    """The quantized layers of the temporal path by their names in the UNet."""
    inside = set(TemporalPath(unet).modules())
    return {name: m for name, m in unet.named_modules() if isinstance(m, QuantLayer) and m in inside}


def _sinusoid(unet: UNet, timesteps: Sequence[int]) -> Tensor:
    return unet.time_proj(torch.tensor(list(timesteps), device=unet.device)).to(unet.dtype)


def reconstruct_temporal_(
    unet: UNet, reference: UNet, timesteps: Sequence[int], config: ReconstructionConfig
) -> tuple[float, float]:
    """Learn the rounding of the temporal path's weights against its outputs at the sampler's time steps, in place.

    Args:
        unet: prepared by `quantize_`, its weights in floating point.
        reference: the same network in floating point.
        timesteps: those that the sampler visits.

    Returns:
        the squared error of all projections relative to their mean square, rounded to nearest and as learned; the better
        one is kept.
    """
    path, sinusoid = TemporalPath(unet), _sinusoid(unet, timesteps)
    with torch.no_grad():
        targets = TemporalPath(reference)(sinusoid)
    layers = {name: m for name, m in path.named_modules() if isinstance(m, QuantLayer) and m.config.weight_codes is not None}
    roundings = {name: LearnedRounding(layer) for name, layer in layers.items()}
    total = sum(float(target.square().sum()) for target in targets)

    def outputs(weights: dict[str, Tensor]) -> list[Tensor]:
        return functional_call(path, {f"{name}.weight": weight for name, weight in weights.items()}, (sinusoid,))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.stack([reconstruction_loss(o, t) for o, t in zip(outputs(weights), targets, strict=True)]).sum()

    @torch.no_grad()
    def error(weights: dict[str, Tensor]) -> float:
        return sum(float((o - t).square().sum()) for o, t in zip(outputs(weights), targets, strict=True)) / max(total, 1e-30)

    learn_roundings_(roundings, config.iterations, config.lr, loss)
    nearest = {name: layer.rounded_weight() for name, layer in layers.items()}
    learned = {name: rounding.hard() for name, rounding in roundings.items()}
    before, after = error(nearest), error(learned)
    for name, layer in layers.items():
        layer.weight = nn.Parameter((learned if after < before else nearest)[name], requires_grad=False)
    return before, after


@torch.no_grad()
def set_stepwise_ranges_(unet: UNet, timesteps: Sequence[int]) -> None:
    """Give the temporal layers' inputs a range for each time step (finite set calibration), in place.

    The ranges are the inputs' extremes: each step has a single input.
    """
    times = sorted(set(timesteps))
    sinusoid = _sinusoid(unet, times)
    embedding = unet.time_embedding
    hidden = embedding.act(embedding.linear_1(sinusoid))
    emb = time_embeddings(unet, times)
    path = TemporalPath(unet)
    inputs: list[tuple[nn.Module, Tensor]] = [(embedding.linear_1, sinusoid), (embedding.linear_2, hidden)]
    inputs += [(projection, path.nonlinearity(emb)) for projection in path.projections]
    for layer, values in inputs:
        if isinstance(layer, QuantLayer) and layer.act.codes is not None:
            layer.act = StepwiseActQuantizer.from_values(layer.act.codes, torch.tensor(times), values)
    select_steps_on_call(unet)


def set_all_stepwise_(unet: UNet, timesteps: Sequence[int]) -> None:
    """Give every activation a range for each of the sampler's time steps, still to be observed, in place.

    Those of the temporal path are known at once, where the embedding is one of the time step alone.
    """
    if depends_on_time_alone(unet):
        set_stepwise_ranges_(unet, timesteps)
    times = torch.tensor(sorted(set(timesteps)))
    replace_quantizers_(unet, lambda _, quantizer: make_stepwise(quantizer, times))
    select_steps_on_call(unet)
