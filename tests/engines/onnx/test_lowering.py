"""One marker at a time: what the standard operators compute is what the module computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qncd.engines.onnx.lowering import lower_
from qncd.engines.onnx.model import build_onnx
from qncd.engines.onnx.tracing import DOMAIN, LAYER, OPSET
from qncd.granularity import PER_ROW, PerGroup
from qncd.models.network import network_of
from qncd.quant.affine import IntegerRange
from qncd.quant.float8 import Float8Codes
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLayer, QuantLinear
from qncd.quant.quantizers import Stage


def quantized(conv: nn.Conv2d, x: Tensor) -> QuantConv2d:
    layer = QuantConv2d.from_float(conv, LayerConfig(IntegerRange(8, True), IntegerRange(8, False), "max", "max"))
    layer.act.set_stage(Stage.OBSERVE)
    layer(x)
    layer.act.finish_observing()
    layer.quantize_weight_()
    layer.act.set_stage(Stage.QUANTIZE)
    return layer


class Denoiser(nn.Module):
    """A network of one layer."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)


def lowered(layer: QuantConv2d, x: Tensor, y: Tensor) -> ir.Model:
    """A graph whose only node is the layer's marker, lowered."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    entry = ir.Value(name="x", shape=ir.Shape(x.shape), type=floats)
    marker = ir.node(LAYER, [entry], {"module": "layer"}, domain=DOMAIN)
    out = marker.outputs[0]
    out.name, out.shape, out.type = "y", ir.Shape(y.shape), floats
    graph = ir.Graph([entry], [out], nodes=[marker], opset_imports={"": OPSET, DOMAIN: 1}, name="network")
    model = ir.Model(graph, ir_version=10)
    lower_(model, network_of(Denoiser(layer)))
    return model


@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": (3, 1), "dilation": (3, 1), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 3, "groups": 2, "bias": False},
    ],
    ids=["dilation", "unlike axes", "groups"],
)
@torch.no_grad()
def test_a_convolution_of_any_shape(shape: dict[str, Any]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 7)
    layer = quantized(nn.Conv2d(4, 6, **shape).requires_grad_(False), x)
    expected = layer(x)
    model = lowered(layer, x, expected)
    assert all(node.domain == "" for node in model.graph)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the operators as they are written
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    found = session.run(None, {"x": np.ascontiguousarray(x.numpy())})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"act_granularity": PER_ROW}, "activations whose scales are found at run time"),
        ({"weight_granularity": PerGroup(64)}, "weights with one scale for each 64 inputs"),
        ({"weight_codes": Float8Codes()}, "fp8"),
    ],
)
def test_what_has_no_form(changes: dict[str, Any], found: str) -> None:
    config = LayerConfig(IntegerRange(8, True), IntegerRange(8, False), "max", "max")
    layer = QuantLinear.from_float(nn.Linear(64, 4).requires_grad_(False), dataclasses.replace(config, **changes))
    layer.quantize_weight_()
    layer.act.set_stage(Stage.QUANTIZE)
    with pytest.raises(ValueError, match=f"^layer: an ONNX model has no form for {found}$"):
        build_onnx(network_of(Denoiser(layer)))
