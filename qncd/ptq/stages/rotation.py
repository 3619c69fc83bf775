"""Hadamard rotations in front of layers (`QuantConfig.rotation`), along the channels of linear layers and convolutions.

ConvRot (arXiv 2512.03673) for linear layers, HQ-DM (arXiv 2512.05746) for convolutions. The weights are rotated here, once; the
inputs are rotated in every call, before they are rounded.
"""

from __future__ import annotations

import logging

from qncd.models.network import Network, few
from qncd.ptq.context import Context
from qncd.ptq.edges import inner_layers
from qncd.quant.rotation import SMALLEST, block_of
from qncd.recipe import GGUF, QuantConfig, Recipe

log = logging.getLogger("qncd")


def rotate_network_(network: Network, config: QuantConfig) -> dict[str, int]:
    """Rotate all layers but the first and last, in place, in the largest blocks that their channels take. Returns the blocks.

    The halves of a split concatenation are rotated apart. Layers without a block of SMALLEST channels or more stay as they are.

    Args:
        network: prepared by `quantize_`, its weights in floating point.
        config: that it was prepared with.
    """
    layers = inner_layers(network, config)
    fitting = {name: block_of([part.stop - part.start for part in layer.parts()]) for name, layer in layers.items()}
    blocks = {name: block for name, block in fitting.items() if block is not None}
    for name, block in blocks.items():
        layers[name].rotate_(block)
    if left := [name for name in layers if name not in blocks]:
        log.debug("%d layers are not rotated, no block of %d channels fits: %s", len(left), SMALLEST, few(left, len(left)))
    return blocks


def rotates(network: Network, config: QuantConfig) -> bool:
    """Whether a network is rotated: as its family has it where nothing else is asked for, and weights may be any numbers."""
    return network.rotates and config.weight_grid != GGUF if config.rotation is None else config.rotation


class Rotation:
    """The stage."""

    title = "rotation"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.rotation is not False

    def run(self, context: Context) -> None:
        if rotates(context.network, context.recipe.quant):
            context.found["rotation"] = rotate_network_(context.network, context.recipe.quant)
