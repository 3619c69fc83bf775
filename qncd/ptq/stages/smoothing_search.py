"""How strongly to smooth each layer, searched (`QuantConfig.smoothing_search`).

A range that has to hold a few wide channels has few codes for all others. Dividing channel k by S_k evens them out; the weights
take S_k over and become harder to round. With S_k = (max |x_k| / max |w_k|)^a, SmoothQuant (arXiv 2211.10438) is a = 0.5. Which
a is best follows from neither side alone: the layer is rounded for each (by GPTQ or to nearest) with the ranges that it would
have, and the a whose output is the nearest to the full-precision one stays. Layers are looked at on the full-precision network's
activations, so none depends on what is chosen for another.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qncd.models.network import Network, network_of
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import find_ranges_, hooked, run_over
from qncd.ptq.stages.compensation import solutions
from qncd.ptq.stages.low_rank import add_branches_
from qncd.ptq.stages.smoothing import smooth_
from qncd.quant.inspection import quant_layers
from qncd.recipe import Recipe

STRENGTHS = (0.0, 0.25, 0.5)  # a; the first wins ties
INPUTS = 80  # of the calibration set that are looked at
ROWS = 3  # as compensation's, of which it takes more: comparing needs fewer than solving
SMALLEST = 1e-3  # of the widest channel: narrower ones count as this wide


@torch.no_grad()
def search_smoothing_(
    network: Network,
    data: CalibrationSet,
    batch_size: int = 32,
    finish: Callable[[Network], object] | None = None,
    gptq: bool = True,
) -> dict[str, float]:
    """Smooth every layer as strongly as leaves its output the least error, in place. Returns the strengths by layer.

    Args:
        network: prepared by `quantize_` (and smoothed by the embedding or rotated, or not), activation quantizers in their
            places, nothing calibrated yet.
        data: calibration inputs.
        finish: what becomes of a smoothed network before its ranges are found; the network itself is left without it.
        gptq: weights will be rounded so, else to nearest.

    Raises:
        ValueError: a weight or an activation is NaN or infinite; the layer is named.
    """
    part = data.spread(INPUTS)
    ratios = channel_ratios(network, part, batch_size)
    unchanged = {id(parameter): parameter for parameter in network.module.parameters()}
    least: dict[str, tuple[float, float]] = {}  # misfit and strength
    for strength in STRENGTHS:
        trial = network_of(
            copy.deepcopy(network.module, dict(unchanged)), network.prediction
        )  # the same weights: smoothing puts others in their place
        if strength:
            smooth_(trial, {name: ratio**strength for name, ratio in ratios.items()})
        if finish:
            finish(trial)
        find_ranges_(trial, part, batch_size)
        for name, solution in solutions(trial, part, batch_size, ROWS, (1.0,) if gptq else (), judged=True):
            if name not in least or solution.misfit < least[name][0]:
                least[name] = solution.misfit, strength
    chosen = {name: strength for name, (_, strength) in least.items() if name in ratios}
    smooth_(network, {name: ratios[name] ** strength for name, strength in chosen.items() if strength})
    return chosen


def channel_ratios(network: Network, data: CalibrationSet, batch_size: int) -> dict[str, Tensor]:
    """Largest magnitude of each input channel over that of its weights, (C,) with geometric mean 1, by layer.

    Layers are left out whose inputs or weights are all 0, or not finite, or so far apart that float32 does not hold their ratio.
    """
    layers = quant_layers(network.module)
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            smoothing = layers[name].smoothing
            x = args[0] if smoothing is None else args[0] / smoothing
            channel = layers[name].channel_dim % x.ndim
            found = x.abs().amax([d for d in range(x.ndim) if d != channel])
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with hooked(handles):
        run_over(network, data, batch_size)
    ratios = {}
    for name, inputs in largest.items():
        weights = layers[name].unrotated_weight().transpose(0, 1).flatten(1).abs().amax(1)
        sides = [side.clamp(min=SMALLEST * side.max()) for side in (inputs, weights)]
        if all(bool(torch.isfinite(side).all() and (side > 0).all()) for side in sides):
            ratio = sides[0] / sides[1]
            centred = ratio / ratio.log().mean().exp()
            if bool((torch.isfinite(centred) & (centred > 0)).all()):
                ratios[name] = centred
    return ratios


class SmoothingSearch:
    """The stage."""

    title = "smoothing search"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.smoothing_search and recipe.quant.act_bits is not None

    def run(self, context: Context) -> None:
        quant = context.recipe.quant
        finish = functools.partial(add_branches_, config=quant) if quant.rank else None
        strengths = search_smoothing_(context.network, context.data, context.batch_size, finish, quant.gptq)
        context.found["smoothing_search"] = strengths
