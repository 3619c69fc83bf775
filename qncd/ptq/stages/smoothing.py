"""Intra noise: embedding-derived feature smoothing (QNCD, arXiv 2403.19140, section 3.2).

Between the two convolutions of a residual block the time (and class) embedding stretches a few channels of the activation that
feeds the second one. `Network.stretch` computes the stretch S_k from the embedding alone, without image data; floored at 1,
conv2(silu(.)) = (W2 * S)(silu(.) / S) is exact in floating point and easier to quantize.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from qncd.models.calls import Inputs
from qncd.models.network import Network
from qncd.ptq.context import Context
from qncd.ptq.observing import named
from qncd.quant.layers import QuantLayer
from qncd.recipe import Recipe, SmoothingConfig


def smoothing_factors(
    network: Network, times: Sequence[float], config: SmoothingConfig | None = None, inputs: Inputs | None = None
) -> dict[str, Tensor]:
    """S (C,) by the name of the layer whose input is divided by it.

    Args:
        times: those that the sampler visits.
        inputs: of calibration calls, for embeddings of more than time and class.

    Raises:
        ValueError: the network's family knows no layer that its embedding stretches.
    """
    config = config or SmoothingConfig()
    stretch = network.stretch(times, inputs)
    return {name: factor.clamp(min=config.floor) ** config.strength for name, factor in stretch.items()}


def settled(recipe: Recipe, network: Network) -> Recipe:
    """The recipe without smoothing where it is that of a mode, and the network of a family that modes leave out."""
    left_out = recipe.smoothing is not None and not (network.smooths or recipe.smoothing.transformers)
    return dataclasses.replace(recipe, smoothing=None) if left_out else recipe


def smooth_(network: Network, factors: dict[str, Tensor]) -> None:
    """Divide the named layers' inputs by S and multiply S into their weights, in place.

    Raises:
        ValueError: the model was not prepared by `quantize_`, its weights are quantized already, or a factor is
            not a positive finite number.
    """
    for name, factor in factors.items():
        layer = network.module.get_submodule(name)
        if not isinstance(layer, QuantLayer):
            raise ValueError(f"{name}: smooth_ works on a model prepared by quantize_")
        named(name, functools.partial(layer.smooth_, factor))


class Smoothing:
    """The stage: by the embedding, at the time steps that the sampler visits."""

    title = "smoothing"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.smoothing is not None

    def run(self, context: Context) -> None:
        factors = smoothing_factors(context.network, context.visited(), context.recipe.smoothing, context.data.inputs)
        smooth_(context.network, factors)
