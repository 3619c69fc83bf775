"""GPTQ over a whole network: what each layer gives on its rounded inputs, against the full-precision layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_networks import calibrate_with_
from torch import Tensor, nn

from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.positions import input_rows, is_matrix, some_positions
from qncd.ptq.stages import compensation
from qncd.ptq.stages.bias_correction import correct_biases_
from qncd.ptq.stages.prepare import quantize_
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLinear
from qncd.recipe import QuantConfig, Recipe, ReconstructionConfig

CONFIG = QuantConfig(3, 4, gptq=True)


def inputs(kind: str) -> CalibrationSet:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 3 if kind == "unet" else 4, 8, 8, generator=generator)
    given = {} if kind == "unet" else {"encoder_hidden_states": torch.randn(24, 5, 12, generator=generator)}
    return CalibrationSet(x, torch.arange(24) * 40, given)


def errors(reference: Any, quantized: Any, data: CalibrationSet) -> dict[str, tuple[float, float]]:
    """By layer, on the reference's own activations: largest mean error of an output channel, and mean square error; both
    in proportion to the output's."""
    layers, found = quant_layers(quantized), {}
    handles = []
    for name, layer in quant_layers(reference).items():

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
            channel = 1 if isinstance(module, nn.Conv2d) else output.ndim - 1
            error = layers[name](args[0]) - output
            mean = error.mean([d for d in range(output.ndim) if d != channel]).abs().max()
            found[name] = (float(mean / output.abs().mean()), float(error.square().mean() / output.square().mean()))

        handles.append(layer.register_forward_hook(hook))
    network_of(reference).predict(data.x, data.t, data.inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["unet", "cross_unet"])
def test_each_layer_is_nearer_and_right_in_the_mean(kind: str, make_unet: Any, make_cross_unet: Any) -> None:
    reference = quantize_(make_unet() if kind == "unet" else make_cross_unet(), CONFIG).module
    data = inputs(kind)
    plain, solved = copy.deepcopy(reference), copy.deepcopy(reference)
    calibrate_with_(plain, data, 8, correct=correct_biases_)
    calibrate_(solved, data, CONFIG, 8)
    before, after = errors(reference, plain, data), errors(reference, solved, data)
    assert all(mean < 1e-4 for mean, _ in after.values())
    assert all(after[name][1] < 1.02 * before[name][1] for name in before)
    ratios = torch.tensor([after[name][1] / before[name][1] for name in before])
    assert ratios.median() < 0.7
    for name, layer in quant_layers(solved).items():
        codes = layer.weight / layer.expanded_scale()
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4, msg=name)


def test_one_layer_at_a_time_gives_the_same(make_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, together, apart = inputs("unet"), quantize_(make_unet(), CONFIG).module, quantize_(make_unet(), CONFIG).module
    calibrate_(together, data, CONFIG, 8)
    monkeypatch.setattr(compensation, "MEMORY", 1)
    calibrate_(apart, data, CONFIG, 8)
    for name, layer in quant_layers(together).items():
        other = quant_layers(apart)[name]
        assert layer.weight.equal(other.weight) and layer.bias.equal(other.bias), name


def layer_of(source: nn.Conv2d | nn.Linear) -> QuantConv2d | QuantLinear:
    config = LayerConfig(IntegerRange(4, True), None, "max", "max")
    made: QuantConv2d | QuantLinear = (
        QuantConv2d.from_float(source, config) if isinstance(source, nn.Conv2d) else QuantLinear.from_float(source, config)
    )
    return made


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 7)),
        (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 3, 7, 6)),
        (nn.Conv2d(3, 5, 1), (2, 3, 4, 4)),
        (nn.Linear(6, 5), (4, 6)),
        (nn.Linear(6, 5), (4, 9, 6)),
    ],
)
def test_rows_are_what_the_weight_meets(source: Any, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(source), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    positions = some_positions(layer, x, 10**6, torch.Generator().manual_seed(0)).sort().values
    rows = input_rows(layer, x, positions)
    out = source(x)
    expected = out.flatten(2).transpose(1, 2).reshape(-1, 5) if x.ndim == 4 else out.reshape(-1, 5)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T + layer.bias, expected)
    few = some_positions(layer, x, 2, torch.Generator().manual_seed(0))
    assert len(few) == min(2, len(positions))


def test_a_grouped_convolution_is_left_to_rounding() -> None:
    assert not is_matrix(layer_of(nn.Conv2d(4, 4, 3, groups=2)))
    assert is_matrix(layer_of(nn.Conv2d(4, 4, 3)))


def test_a_layer_without_finite_inputs_is_named(make_unet: Any) -> None:
    config = QuantConfig(4, None, gptq=True)
    unet = quantize_(make_unet(), config).module
    unet.mid_block.resnets[0].norm1.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1: .*NaN or infinity"):
        calibrate_(unet, inputs("unet"), config, 8)


def test_what_excludes_it() -> None:
    with pytest.raises(ValueError, match="weight_bits None"):
        QuantConfig(None, 8, gptq=True)
    with pytest.raises(ValueError, match="needs bias_correction"):
        QuantConfig(4, 8, gptq=True, bias_correction=False)
    with pytest.raises(ValueError, match="both round the weights"):
        Recipe(quant=CONFIG, reconstruction=ReconstructionConfig())
