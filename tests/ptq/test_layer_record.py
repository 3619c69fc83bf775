"""What each layer got, and how far its output is from full precision."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import TIMES, call, inputs, prepared

from qncd.models.network import network_of
from qncd.ptq import layer_record
from qncd.ptq.checkpoint import peek_quantized, save_quantized
from qncd.ptq.layer_record import PRODUCT, ErrorMeter, LayerRecord, NetworkRecord, what_layers_got
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.recipe import QuantConfig

CONFIG = QuantConfig(4, 6, bias_correction=False)


@pytest.fixture(scope="module")
def measured(make_unet: Any) -> tuple[Any, Any, NetworkRecord]:
    """A network in full precision, quantized with a range for each step, and its record, of all positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_record, "FEWEST", 1 << 10)
        patch.setattr(layer_record, "MOST", 1 << 10)
        full, unet = make_unet(), make_unet()
        meter = ErrorMeter(network_of(unet), inputs(unet))
        prepared(unet, CONFIG, set_all_stepwise_)
        return full, unet, meter.record(network_of(unet))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


def outputs(unet: Any, t: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each layer for the inputs at a time step."""
    data, found = inputs(unet), {}
    handles = [
        unet.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: found.update({name: (args[0], out)}))
        for name in network_names(unet)
    ]
    call(unet, data.subset((data.t == t).nonzero()[:, 0]))
    for handle in handles:
        handle.remove()
    return found


def network_names(unet: Any) -> list[str]:
    return [name for name, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]


def test_errors_are_those_of_whole_outputs(measured: tuple[Any, Any, NetworkRecord]) -> None:
    full, unet, record = measured
    assert record.times == tuple(sorted(TIMES, reverse=True)) and record.inputs == 2
    layers = {layer.name: layer for layer in record.layers}
    for place, t in enumerate(record.times):
        exact, rounded = outputs(full, int(t)), outputs(unet, int(t))
        for name, module in quant_layers(unet).items():
            own, gathered = layers[name].own, layers[name].gathered
            assert own is not None and gathered is not None
            assert own[place] == pytest.approx(relative(module(exact[name][0]), exact[name][1]), rel=0.01), name
            assert gathered[place] == pytest.approx(relative(rounded[name][1], exact[name][1]), rel=0.01), name
        data = inputs(full)
        part = data.subset((data.t == t).nonzero()[:, 0])
        assert record.prediction[place] == pytest.approx(relative(call(unet, part), call(full, part)), rel=0.01)


def test_an_output_of_zeros_has_no_relative_error(make_unet: Any) -> None:
    """A layer that gives nothing in full precision, as zero-initialized ones do, has no share of anything."""
    unet = make_unet()
    layer = unet.mid_block.resnets[0].conv2
    layer.weight.zero_(), layer.bias.zero_()
    meter = ErrorMeter(network_of(unet), inputs(unet))
    prepared(unet, CONFIG)
    quant_layers(unet)["mid_block.resnets.0.conv2"].bias.add_(1e-3)
    found = {record.name: record for record in meter.record(network_of(unet)).layers}["mid_block.resnets.0.conv2"]
    assert found.own is not None and set(found.own) == {None} and found.own_weights is None


def test_weights_alone(measured: tuple[Any, Any, NetworkRecord]) -> None:
    """With activations in floating point, what is left of an error is that of the weights."""
    full, unet, record = measured
    alone = copy.deepcopy(unet)
    exact = [outputs(full, t)["conv_out"] for t in TIMES]
    layer = quant_layers(alone)["conv_out"]
    weights = torch.nn.functional.conv2d(torch.cat([x for x, _ in exact]), layer.weight, layer.bias, layer.stride, layer.padding)
    (found,) = (layer.own_weights for layer in record.layers if layer.name == "conv_out")
    assert found == pytest.approx(relative(weights, torch.cat([out for _, out in exact])), rel=0.01)


def test_bits_and_ranges(measured: tuple[Any, Any, NetworkRecord]) -> None:
    _, unet, record = measured
    layers = {layer.name: layer for layer in record.layers}
    first, inner = layers["conv_in"], layers["mid_block.resnets.0.conv1"]
    assert (first.kind, first.weight_bits, first.act_bits, first.weights) == ("Conv2d", 8, 8, 16 * 3 * 9)
    assert (inner.weight_bits, inner.act_bits, inner.ranges) == (4, 6, len(TIMES))
    quantizer = act_quantizers(unet)["mid_block.resnets.0.conv1.act"]
    assert inner.low == pytest.approx(float(((0 - quantizer.zero_point) * quantizer.scale).min()), rel=1e-3)
    assert inner.high == pytest.approx(float(((63 - quantizer.zero_point) * quantizer.scale).max()), rel=1e-3)
    products = [layer for layer in record.layers if layer.kind == PRODUCT]
    assert len(products) % 4 == 0 and products and all(layer.own is None and layer.weights == 0 for layer in products)
    assert record.layers[-len(products) :] == tuple(products)
    assert record.layers[0].name in ("conv_in", "time_embedding.linear_1")
    # In the order in which the network runs: the middle before the way up, unlike diffusers' modules.
    names = [layer.name for layer in record.layers]
    assert names.index("mid_block.resnets.0.conv1") < names.index("up_blocks.0.resnets.0.conv1")


def test_a_few_positions_tell_nearly_the_same(make_unet: Any, measured: tuple[Any, Any, NetworkRecord]) -> None:
    _, unet, whole = measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_record, "MOST", 16)
        few = ErrorMeter(network_of(make_unet()), inputs(unet)).record(network_of(unet))
    errors = [[error for layer in record.layers for error in layer.own or ()] for record in (few, whole)]
    ratios = torch.tensor([a / b for a, b in zip(*errors, strict=True) if a and b])
    assert len(ratios) > 50 and 0.7 < float(ratios.median()) < 1.4 and few.prediction == whole.prediction


def test_what_is_left_in_floating_point(make_unet: Any) -> None:
    """Has no bits, no range and no error of weights."""
    unet = make_unet()
    meter = ErrorMeter(network_of(unet), inputs(unet))
    prepared(unet, QuantConfig(None, 8, bias_correction=False))
    for layer in meter.record(network_of(unet)).layers:
        assert layer.weight_bits is None and layer.act_bits == 8
        assert layer.kind == PRODUCT or (layer.own_weights is not None and layer.own_weights < 1e-10)
    unet = prepared(make_unet(), QuantConfig(8, None, bias_correction=False))
    record = what_layers_got(network_of(unet))
    assert all((layer.act_bits, layer.low, layer.high, layer.own) == (None,) * 4 for layer in record.layers)
    assert record.times == ()


def test_the_record_goes_through_files(measured: tuple[Any, Any, NetworkRecord], tmp_path: Path) -> None:
    _, unet, record = measured
    assert NetworkRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    save_quantized(network_of(unet), tmp_path / "q.safetensors", CONFIG, "h", {}, None, record)
    assert peek_quantized(tmp_path / "q.safetensors").layers == record
    save_quantized(network_of(unet), tmp_path / "plain.safetensors", CONFIG, "h", {})
    assert peek_quantized(tmp_path / "plain.safetensors").layers is None


LAYER = LayerRecord("a", "Linear", 4, 4, 8, -1.0, 1.0, 1, (0.1,), 0.1, (0.2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "many"}, "expected whole numbers"),
        ({"own": [0.1, 0.2]}, "expected 1 errors, one for each time step"),
        ({"low": "x"}, "expected numbers, not x"),
        ({"name": 3}, "a name is no text"),
        ({"more": 3}, "unexpected keyword argument 'more'"),
    ],
)
def test_damaged_records_are_refused(changes: dict[str, Any], message: str) -> None:
    layer = {**dataclasses.asdict(LAYER), **changes}
    with pytest.raises(ValueError, match=message):
        NetworkRecord.from_json({"layers": [layer], "times": [1], "inputs": 2, "prediction": [0.1]})


@pytest.mark.parametrize("value", [[], 3, {}, {"layers": 3}, {"layers": [3]}])
def test_something_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="no record of layers"):
        NetworkRecord.from_json(value)
