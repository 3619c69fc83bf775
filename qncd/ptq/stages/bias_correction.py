"""Bias correction: the mean rounding error of every layer's output is taken out of its bias.

Nagel et al. 2019 (arXiv 1906.04721), section 4.2, measured on calibration data. Not part of the QNCD paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qncd.models.network import Network
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import hooked, named, run_over
from qncd.quant.inspection import quant_layers
from qncd.recipe import Recipe

BIAS_INPUTS = 128  # inputs that bias correction looks at


@torch.no_grad()
def correct_biases_(network: Network, data: CalibrationSet, batch_size: int = 32) -> None:
    """Take the mean rounding error of every layer's output out of its bias, in place; ranges are known, weights still float.

    Each layer is compared with itself on the full-precision network's own activations, so the order of the layers
    does not matter. A deterministic sampler adds such a mean up over all its steps.

    Raises:
        ValueError: a layer's mean error is NaN or infinite; the layer is named.
    """
    layers = quant_layers(network.module)
    sums = {name: torch.zeros(len(layer.weight), dtype=torch.float64, device=network.device) for name, layer in layers.items()}
    ran: dict[str, None] = {}  # in their order: the first to see NaN is the one to name
    weight = 1.0  # of the inputs that pass
    inside = False  # rounding_error calls the layer itself

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal inside
            if not inside:
                inside = True
                ran.setdefault(name)
                sums[name] += layers[name].rounding_error(inputs[0]) * len(inputs[0]) * weight
                inside = False

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    part = data.spread(BIAS_INPUTS)  # a mean needs fewer inputs than a range does
    total = 0.0
    with hooked(handles):
        for weight, rows in _by_weight(part):
            run_over(network, part.subset(rows), batch_size)
            total += weight * len(rows) * part.passed / len(part)
    for name in [*ran, *(name for name in layers if name not in ran)]:
        named(name, functools.partial(layers[name].shift_bias_, -sums[name] / total))


def _by_weight(data: CalibrationSet) -> list[tuple[float, Tensor]]:
    """Rows of inputs that count alike, with how much."""
    weights = data.weights_at(data.t)
    if weights is None:
        return [(1.0, torch.arange(len(data)))]
    return [(float(weight), (weights == weight).nonzero()[:, 0]) for weight in weights.unique()]


class BiasCorrection:
    """The stage: once all ranges are known, before the weights are rounded."""

    title = "bias correction"
    unit = "input"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.bias_correction and not recipe.quant.gptq  # which puts mean errors into the biases itself

    def run(self, context: Context) -> None:
        correct_biases_(context.network, context.data, context.batch_size)
