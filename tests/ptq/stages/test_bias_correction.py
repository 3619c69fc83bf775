"""Bias correction: no layer's mean output is off by its own rounding any more."""

from __future__ import annotations

import copy
from typing import Any

import torch
from quantized_networks import calibrate_with_
from torch import Tensor, nn

from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.bias_correction import correct_biases_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig

CONFIG = QuantConfig(3, 4, act_range="max", weight_range="max")


def mean_errors(float_unet: Any, quantized: Any, data: CalibrationSet) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's mean output error (O,) on the float network's own activations, and the mean output itself."""
    layers, found = quant_layers(quantized), {}
    handles = []
    for name, layer in quant_layers(float_unet).items():

        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            channel = 1 if isinstance(module, nn.Conv2d) else output.ndim - 1
            dims = [d for d in range(output.ndim) if d != channel]
            found[name] = ((layers[name](inputs[0]) - output).mean(dims), output.abs().mean())

        handles.append(layer.register_forward_hook(hook))
    network_of(float_unet).predict(data.x, data.t, data.inputs)
    for handle in handles:
        handle.remove()
    return found


def check(unet: Any, data: CalibrationSet) -> None:
    quantize_(unet, CONFIG)
    plain, corrected = copy.deepcopy(unet), copy.deepcopy(unet)
    calibrate_with_(plain, data, 4)
    calibrate_(corrected, data, CONFIG, 4)
    before, after = mean_errors(unet, plain, data), mean_errors(unet, corrected, data)
    assert max(float(error.abs().max() / size) for error, size in before.values()) > 0.05
    for name, (error, size) in after.items():
        assert error.abs().max() < 1e-4 * size, name


def test_mean_errors_are_gone(make_unet: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    check(make_unet(), CalibrationSet(torch.randn(10, 3, 8, 8, generator=generator), torch.arange(10) * 100))


def test_layers_without_a_bias_get_one(make_cross_unet: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    x, context = torch.randn(6, 4, 8, 8, generator=generator), torch.randn(6, 5, 12, generator=generator)
    unet = make_cross_unet()
    assert any(layer.bias is None for layer in unet.modules() if isinstance(layer, nn.Linear))
    check(unet, CalibrationSet(x, torch.arange(6) * 150, {"encoder_hidden_states": context}))


def test_ranges_for_each_step_and_batches_larger_than_what_is_looked_at_together(make_unet: Any) -> None:
    """8 inputs a batch, 4 at a time (ERROR_INPUTS): each with the range of its own time step.

    In float64: kernels for another batch size differ in the last bit, and in float32 that tips codes that are nearly ties.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    data, found = CalibrationSet(x, torch.tensor([1, 901] * 4)), []
    for batch in (8, 1):
        unet = quantize_(make_unet().double(), CONFIG).module
        set_all_stepwise_(network_of(unet), [1, 901])
        calibrate_with_(unet, data, batch, correct=correct_biases_)
        found.append({name: layer.bias for name, layer in quant_layers(unet).items()})
    for name, bias in found[0].items():
        torch.testing.assert_close(bias, found[1][name], rtol=1e-9, atol=1e-12, msg=name)
