"""Temporal feature maintenance (TFMQ-DM, arXiv 2311.16503): the time embedding and every projection of it, as one block.

What these layers compute depends on the time step alone, so there are only as many outputs as the sampler has steps: their
weights' rounding is learned against exactly those outputs, and their inputs get a range for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qncd.models.network import Network, TimePath
from qncd.ptq.blocks import in_float
from qncd.ptq.context import Context
from qncd.ptq.observing import named
from qncd.quant.inspection import replace_quantizers_
from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import HALVES
from qncd.quant.rounding import LearnedRounding, learn_roundings_, reconstruction_loss
from qncd.quant.stepwise import StepwiseActQuantizer, make_stepwise, select_steps_on_call
from qncd.recipe import Recipe, ReconstructionConfig


class TemporalPath(nn.Module):
    """The part of a network that depends on the time step alone: sinusoid in, all projections out."""

    def __init__(self, path: TimePath | None) -> None:
        super().__init__()
        if path is None:
            raise ValueError("temporal reconstruction needs an embedding of time alone; this model adds other conditions to it")
        self.embedding, self.nonlinearity = path.embedding, path.nonlinearity
        self.projections = nn.ModuleList(list(path.projections.values()))

    def forward(self, sinusoid: Tensor) -> list[Tensor]:
        """(S, C) -> the S outputs of each projection, (S, C_i)."""
        activated = self.nonlinearity(self.embedding(sinusoid))
        return [projection(activated) for projection in self.projections]


def temporal_layers(network: Network) -> dict[str, QuantLayer]:
    """The quantized layers of the temporal path by their names in the network."""
    inside = set(TemporalPath(network.time_path()).modules())
    return {name: m for name, m in network.module.named_modules() if isinstance(m, QuantLayer) and m in inside}


def reconstruct_temporal_(
    network: Network, reference: Network, times: Sequence[int], config: ReconstructionConfig
) -> tuple[float, float]:
    """Learn the rounding of the temporal path's weights against its outputs at the sampler's time steps, in place.

    Args:
        network: prepared by `quantize_`, its weights in floating point.
        reference: the same network in floating point.
        times: those that the sampler visits.

    Returns:
        the squared error of all projections relative to their mean square, rounded to nearest and as learned; the better
        one is kept.
    """
    found = network.time_path()
    path = TemporalPath(found)
    assert found is not None
    sinusoid = found.sinusoid(times)
    sinusoid = sinusoid.float() if sinusoid.dtype in HALVES else sinusoid
    exact = TemporalPath(reference.time_path())
    with torch.no_grad():
        targets = functional_call(exact, in_float(exact, {}), (sinusoid,))
    layers = {name: m for name, m in path.named_modules() if isinstance(m, QuantLayer) and m.config.weight_codes is not None}
    roundings = {name: LearnedRounding(layer) for name, layer in layers.items()}
    total = sum(float(target.square().sum()) for target in targets)

    def outputs(weights: dict[str, Tensor]) -> list[Tensor]:
        return functional_call(path, in_float(path, {f"{name}.weight": weight for name, weight in weights.items()}), (sinusoid,))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.stack([reconstruction_loss(o, t) for o, t in zip(outputs(weights), targets, strict=True)]).sum()

    @torch.no_grad()
    def error(weights: dict[str, Tensor]) -> float:
        return sum(float((o - t).square().sum()) for o, t in zip(outputs(weights), targets, strict=True)) / max(total, 1e-30)

    learn_roundings_(roundings, config.iterations, config.lr, loss)
    before = error({name: layer.rounded_weight() for name, layer in layers.items()})
    after = error({name: rounding.hard() for name, rounding in roundings.items()})
    for name, layer in layers.items():
        layer.set_weight_codes(roundings[name].hard_codes() if after < before else layer.nearest_codes(), layer.weight_scale)
    return before, after


@torch.no_grad()
def set_stepwise_ranges_(network: Network, times: Sequence[int]) -> None:
    """Give the temporal layers' inputs a range for each time step (finite set calibration), in place.

    The ranges are the inputs' extremes: each step has a single input.

    Raises:
        ValueError: an input is NaN or infinite; the quantizer is named.
    """
    visited = sorted(set(times))
    found = network.time_path()
    path = TemporalPath(found)
    assert found is not None
    sinusoid = found.sinusoid(visited)
    embedding = found.embedding
    hidden = embedding.act(embedding.linear_1(sinusoid))
    emb = path.nonlinearity(embedding(sinusoid))
    inputs: list[tuple[nn.Module, Tensor]] = [(embedding.linear_1, sinusoid), (embedding.linear_2, hidden)]
    inputs += [(projection, emb) for projection in path.projections]
    names = {part: name for name, part in network.module.named_modules()}
    for layer, values in inputs:
        if isinstance(layer, QuantLayer) and layer.act.codes is not None:
            seen = layer.operand(values)
            ranges = functools.partial(StepwiseActQuantizer.from_values, layer.act.codes, torch.tensor(visited), seen)
            layer.act = named(f"{names[layer]}.act", ranges)
    select_steps_on_call(network.module, network.times_of)


def set_all_stepwise_(network: Network, times: Sequence[int], window: float | None = None) -> None:
    """Give every activation a range for each of the sampler's time steps, still to be observed, in place.

    Those of the temporal path are known at once, where the embedding is one of the time step alone.

    Args:
        window: as for `make_stepwise`; None for that of the network's family.
    """
    window = network.step_window if window is None else window
    if network.time_path() is not None:
        set_stepwise_ranges_(network, times)
    visited = torch.tensor(sorted(set(times)))
    replace_quantizers_(network.module, lambda _, quantizer: make_stepwise(quantizer, visited, window))
    select_steps_on_call(network.module, network.times_of)


class StepwiseRanges:
    """The stage: which activations get a range for each time step; those that calibration has to find are found later."""

    title = "ranges for each time step"
    unit = "layer"
    weights = False

    def wanted(self, recipe: Recipe) -> bool:
        quant = recipe.quant
        return quant.act_bits is not None and (quant.stepwise_activations or quant.stepwise_embedding)

    def run(self, context: Context) -> None:
        quant = context.recipe.quant
        if quant.stepwise_activations:
            set_all_stepwise_(context.network, context.visited(), quant.step_window)
        else:
            set_stepwise_ranges_(context.network, context.visited())


class TemporalReconstruction:
    """The stage: before all other blocks, whose reconstruction leaves these layers as they are."""

    title = "reconstructing the time embedding"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.stepwise_embedding and recipe.reconstruction is not None and recipe.quant.weight_bits is not None

    def run(self, context: Context) -> None:
        config = context.recipe.reconstruction
        assert config is not None
        reference = context.keep_reference()
        context.found["temporal"] = reconstruct_temporal_(context.network, reference, context.visited(), config)
