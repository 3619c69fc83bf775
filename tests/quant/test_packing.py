"""Weights that are kept as codes alone: the same numbers in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.granularity import PerGroup
from qncd.quant.affine import IntegerRange
from qncd.quant.float8 import Float8Codes
from qncd.quant.inspection import UnpackedState
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLayer, QuantLinear
from qncd.quant.quantizers import Stage

KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "4 bits": {"weight_codes": IntegerRange(4, True)},
    "3 bits": {"weight_codes": IntegerRange(3, True)},
    "fp8": {"weight_codes": Float8Codes()},
    "segments": {"weight_codes": IntegerRange(4, True), "segments": (4, 7)},
    "groups": {"weight_codes": IntegerRange(4, True), "weight_granularity": PerGroup(4)},
}


@torch.no_grad()
def layer_of(kind: str, convolution: bool) -> tuple[QuantLayer, Tensor]:
    """A layer with 11 inputs, an odd number of weights, and inputs for it."""
    torch.manual_seed(0)
    settings = {"weight_codes": IntegerRange(8, True), "act_codes": IntegerRange(8, False)} | KINDS[kind]
    config = LayerConfig(**settings, weight_range="max", act_range="max")
    layer: QuantLayer
    if convolution:
        layer, x = QuantConv2d.from_float(nn.Conv2d(11, 5, 3, padding=1).requires_grad_(False), config), torch.randn(2, 11, 6, 6)
    else:
        layer, x = QuantLinear.from_float(nn.Linear(11, 5).requires_grad_(False), config), torch.randn(2, 11)
    layer.act.set_stage(Stage.OBSERVE)
    layer(x)
    layer.act.finish_observing()
    layer.quantize_weight_()
    layer.act.set_stage(Stage.QUANTIZE)
    return layer, x


def kept_bytes(layer: QuantLayer) -> int:
    """Of all that has a size like the weight's."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum(t.nbytes for t in tensors if t.numel() > 2 * layer.scale_shape[0] * layer.scale_shape[1])


@torch.no_grad()
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_computes_the_same(kind: str, convolution: bool) -> None:
    layer, x = layer_of(kind, convolution)
    weight, codes, out, error = layer.weight.clone(), layer.weight_codes().clone(), layer(x), layer.rounding_error(x)
    packed = copy.deepcopy(layer)
    packed.pack_weight_()
    packed.pack_weight_()
    assert packed.packed and not layer.packed
    assert "weight" not in dict(packed.named_parameters()) and "codes" in packed.state_dict()
    for tried in (packed, copy.deepcopy(packed)):
        assert torch.equal(tried.weight, weight) and tried.weight.shape == tried.weight_shape
        assert torch.equal(tried.weight_codes(), codes)
        assert torch.equal(tried(x), out) and torch.equal(tried.rounding_error(x), error)
    if kind != "groups":  # whose scales are nearly as many as the weights here
        assert kept_bytes(packed) <= (0.5 if "4" in kind or "3" in kind or kind == "segments" else 1) * weight.numel() + 1
        assert kept_bytes(layer) == 5 * weight.numel()
    packed.unpack_weight_()
    packed.unpack_weight_()
    assert packed.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in packed.state_dict().items())
    assert torch.equal(packed.codes, layer.codes) and torch.equal(packed(x), out)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_later(dtype: torch.dtype) -> None:
    """Scales keep their digits, so the codes stay those of the weight, packed or not."""
    layer, x = layer_of("8 bits", False)
    packed, scale = copy.deepcopy(layer), layer.weight_scale
    packed.pack_weight_()
    layer.to(dtype)
    packed.to(dtype)
    assert packed.weight.dtype == layer.weight.dtype == dtype
    assert torch.equal(packed.weight, layer.weight) and torch.equal(packed(x.to(dtype)), layer(x.to(dtype)))
    for tried in (layer, packed):
        assert tried.weight_scale is not None and scale is not None
        assert tried.weight_scale.dtype == torch.float32 and torch.equal(tried.weight_scale, scale)


def test_a_state_dict_goes_from_one_packed_layer_to_another() -> None:
    layer, x = layer_of("4 bits", True)
    other, _ = layer_of("4 bits", True)
    layer.pack_weight_()
    other.pack_weight_()
    assert other.codes is not None
    other.codes.zero_()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_the_state_of_a_network_is_the_same_packed_or_not() -> None:
    layers = [layer_of("4 bits", True)[0], layer_of("fp8", False)[0]]
    network = nn.Sequential(*layers, nn.Linear(2, 2))
    plain = {name: value.clone() for name, value in network.state_dict().items()}
    layers[0].pack_weight_()
    state = UnpackedState(network)
    assert state.keys() == plain.keys() and len(state) == len(plain)
    assert all(torch.equal(state[name], value) for name, value in plain.items())


def test_a_layer_in_floating_point_stays_so() -> None:
    layer = QuantLinear.from_float(nn.Linear(4, 4), LayerConfig(IntegerRange(8, True), None, "max", "max"))
    layer.pack_weight_()
    assert not layer.packed and isinstance(layer.weight, nn.Parameter)
