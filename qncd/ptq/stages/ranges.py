"""Ranges of weights and activations over the whole calibration set, and the switch from floating point to their grids."""

from __future__ import annotations

import logging

from qncd.models.network import Network, few
from qncd.ptq.context import Context
from qncd.ptq.heap import trim_heap
from qncd.ptq.observing import find_ranges_, named
from qncd.quant.inspection import quant_layers, set_stage
from qncd.quant.quantizers import Stage as QuantizerStage
from qncd.recipe import Recipe

log = logging.getLogger("qncd")


def round_(network: Network, packed: bool = False) -> None:
    """Round all weights whose codes are not known yet and quantize activations from now on, in place; ranges are known.

    Args:
        packed: keep the codes of the weights alone.
    """
    for name, layer in quant_layers(network.module).items():
        named(name, layer.quantize_weight_)
        if packed:
            layer.pack_weight_()
        trim_heap()
    set_stage(network.module, QuantizerStage.QUANTIZE)


class Ranges:
    """The stage."""

    title = "calibrating"
    unit = "input"
    weights = False

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def run(self, context: Context) -> None:
        with context.monitor(f"{self.title} {context.recipe.quant.label}", self.unit) as update:
            idle = find_ranges_(context.network, context.data, context.batch_size, update)
        if idle:
            log.warning("%d activations never came up while calibrating and have no range: %s", len(idle), few(idle))


class Rounding:
    """The stage: weights to nearest where no other stage has rounded them, activations from here on."""

    title = "rounding"
    unit = "layer"
    weights = False

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def run(self, context: Context) -> None:
        round_(context.network, context.packed)
