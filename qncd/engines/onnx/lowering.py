"""Markers become standard operators: QuantizeLinear and DequantizeLinear around convolutions and matrix products.

Codes are stored as runtimes have kernels for them: activations as uint8, k and v as int8 (the second operand of a matrix
product), weights as int8, and as INT4 cast to int8 where they have 4 bits or fewer. A code that is stored is our code minus
its smallest one, and the zero point moves along; below 8 bits k and v have one of 0. Widths below 8 bits are clipped to their
codes in front of the quantizer.

Where a layer has a range for each time step, its input is divided by that step's scale and quantized with scale 1, and the
product is multiplied by the scale: the kernels are those of one range. The time step of a call's first input chooses.

Rotations are products of floats in front of the quantizer, low-rank branches two of them beside the product of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import convenience
from torch import Tensor

from qncd.engines.onnx.tracing import ATTENTION, DOMAIN, LAYER
from qncd.models.network import Network
from qncd.quant.attention import AttentionProducts
from qncd.quant.layers import QuantConv2d, QuantLayer, QuantLinear
from qncd.quant.quantizers import ActQuantizer
from qncd.quant.rotation import hadamard
from qncd.quant.stepwise import StepwiseActQuantizer


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy())


def _only_split(value: ir.Value) -> ir.Node | None:
    """The node that splits the last axis of a value, where nobody else wants it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Split" or value.shape is None:
        return None
    axis = uses[0].node.attributes["axis"].as_int()
    return uses[0].node if axis in (-1, len(value.shape) - 1) else None


@dataclass(frozen=True)
class Rotation:
    """Of the channels of an input: in blocks, along dimension 1 of images, else the last."""

    block: int
    channels: int
    image: bool


class Lowering:
    """Replaces the markers of one graph."""

    def __init__(self, graph: ir.Graph, network: Network) -> None:
        self.graph, self.network = graph, network
        self.nodes: list[ir.Node] = []  # of the marker that is being replaced
        self.quantized: dict[tuple[Any, ...], ir.Value] = {}  # inputs that several layers quantize alike
        self.constants: dict[tuple[Any, ...], ir.Value] = {}
        self.factors: dict[int, ir.Value] = {}  # what a value on the grid of scale 1 has to be multiplied by, by its id
        self.rows: dict[tuple[int, ...], ir.Value] = {}  # which step a call is at, by the steps that are known
        self.count = 0
        self.shape: ir.Shape | None = None  # of the marker's output

    def run(self) -> None:
        """Replace every marker, in order."""
        for node in list(self.graph):
            if node.domain != DOMAIN:
                continue
            name, old = node.attributes["module"].as_string(), node.outputs[0]
            self.shape = old.shape
            module: Any = self.network.module.get_submodule(name)
            split = _only_split(old)
            if split is not None and isinstance(module, QuantLinear):
                self._layer_in_parts(name, module, node, split)
                continue
            if node.op_type == LAYER:
                output = self._layer(name, module, node.inputs)
            else:
                assert node.op_type == ATTENTION
                output = self._attention(name, module, node.inputs, node.attributes["scale"].as_float())
            self.graph.insert_before(node, self.nodes)
            self.nodes = []
            if old.is_graph_output():
                output.name, old.name = old.name, f"{old.name}_marker"
            convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)

    def _layer_in_parts(self, name: str, layer: QuantLinear, node: ir.Node, split: ir.Node) -> None:
        """A linear layer whose outputs are split next, as GEGLU's are, as a layer for each part: splitting copies them."""
        start = 0
        for index, old in enumerate(split.outputs):
            assert old.shape is not None and isinstance(old.shape[-1], int)
            self.shape, rows = old.shape, slice(start, start + old.shape[-1])
            output = self._layer(name, layer, node.inputs, rows, f".{index}")
            self.graph.insert_before(node, self.nodes)
            self.nodes = []
            convenience.replace_all_uses_with(old, output)
            start = rows.stop
        for part in (split, node):
            self.graph.remove(part, safe=True)

    # What nodes and constants are made of.

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        self.count += 1
        node.name = f"quantized_{op_type}_{self.count}"
        node.outputs[0].name = f"quantized_value_{self.count}"
        self.nodes.append(node)
        return node.outputs[0]

    def _floats(self, output: ir.Value) -> ir.Value:
        """The value, said to be floats of the marker's shape."""
        output.shape, output.dtype = self.shape, ir.DataType.FLOAT
        return output

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _constant(self, array: np.ndarray) -> ir.Value:
        """A small constant, one for all its uses."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self._initializer(f"quantized_constant_{len(self.constants)}", array)
        return self.constants[key]

    def _scalar(self, value: float, dtype: Any = np.float32) -> ir.Value:
        return self._constant(np.array(value, dtype))

    # Activations.

    def _act(
        self,
        x: ir.Value,
        quantizer: ActQuantizer,
        segment: int = 0,
        smoothing: Tensor | None = None,
        signed: bool = False,
        gain: float = 1.0,
        rotation: Rotation | None = None,
    ) -> ir.Value:
        """x / smoothing, rotated, on its integer grid, times `gain`; or on that of scale 1, with the scale in `self.factors`.

        Args:
            signed: store the codes as int8, with a zero point of 0 below 8 bits, else the same codes and zero point 128 lower.
        """
        codes = quantizer.codes
        if codes is None:
            return self._rotated(self._smoothed(x, smoothing), rotation)
        stepwise = isinstance(quantizer, StepwiseActQuantizer)
        scales, zeros = (v.cpu().view(-1, v.shape[-1])[:, segment] for v in (quantizer.scale, quantizer.zero_point))
        key = (id(x), b"" if smoothing is None else _array(smoothing).tobytes(), _array(scales).tobytes(),
               _array(zeros).tobytes(), codes, signed, gain, rotation)  # fmt: skip
        if key in self.quantized:
            return self.quantized[key]
        value = self._rotated(self._smoothed(x, smoothing), rotation)
        if len(zeros.unique()) > 1:
            raise ValueError("the zero point of an activation differs between time steps; allowed is one: calibrate anew")
        scale, zero, factor = scales[0], int(zeros[0]), None
        if stepwise:
            value = self._op("Div", value, self._at_step(quantizer, _array(scales)))
            factor, scale = self._at_step(quantizer, _array(scales * gain)), torch.tensor(1.0)
            gain = 1.0
        stored_zero, largest = zero - codes.qmin, codes.qmax - codes.qmin
        if not 0 <= stored_zero <= largest:  # of another package's checkpoint: the range does not hold 0
            value = self._float_grid(value, self._scalar(float(scale)), self._scalar(float(zero)), codes.qmin, codes.qmax)
            value = value if gain == 1.0 else self._op("Mul", value, self._scalar(gain))
        else:
            wide = codes.bits > 8
            if codes.bits not in (8, 16):
                low, high = (scale * (bound - zero) for bound in (codes.qmin, codes.qmax))
                value = self._op("Clip", value, self._scalar(float(low)), self._scalar(float(high)))
            dtype: Any = np.uint16 if wide else np.int8 if signed else np.uint8
            if dtype is np.int8:
                stored_zero = 0 if codes.bits < 8 else stored_zero - 128
            zero_point = self._scalar(stored_zero, dtype)
            grid = self._op("QuantizeLinear", value, self._scalar(float(scale)), zero_point)
            value = self._op("DequantizeLinear", grid, self._scalar(float(scale * gain)), zero_point)
        self.quantized[key] = value
        if factor is not None:
            self.factors[id(value)] = factor
        return value

    def _at_step(self, quantizer: ActQuantizer, table: np.ndarray) -> ir.Value:
        """The entry of a table (S,) for the call's time step, as a scalar."""
        assert isinstance(quantizer, StepwiseActQuantizer)
        if quantizer.known not in self.rows:
            outer, self.nodes = self.nodes, []
            times = next(value for value in self.graph.inputs if value.name == self.network.time_name)
            assert times.dtype is not None
            first = self._op("Gather", times, self._scalar(0, np.int64))
            known = self._constant(np.array(quantizer.known, times.dtype.numpy()))
            far = self._op("Abs", self._op("Sub", known, first))
            self.rows[quantizer.known] = self._op("ArgMin", far, axis=0, keepdims=0)
            self.graph.insert_before(self.graph[0], self.nodes)
            self.nodes = outer
        return self._op("Gather", self._constant(table), self.rows[quantizer.known])

    def _scaled(self, product: ir.Value, *operands: ir.Value, scores: bool = False) -> ir.Value:
        """A product times the scales that its operands were divided by; `scores` have another shape than the marker's output."""
        factors = [self.factors[id(operand)] for operand in operands if id(operand) in self.factors]
        if not factors:
            return product
        factor = factors[0] if len(factors) == 1 else self._op("Mul", *factors)
        scaled = self._op("Mul", product, factor)
        return scaled if scores else self._floats(scaled)

    def _smoothed(self, x: ir.Value, smoothing: Tensor | None) -> ir.Value:
        return x if smoothing is None else self._op("Mul", x, self._constant(_array(smoothing.float().reciprocal())))

    def _rotated(self, x: ir.Value, rotation: Rotation | None) -> ir.Value:
        if rotation is None:
            return x
        matrix = _array(hadamard(rotation.block))
        count = rotation.channels // rotation.block
        if rotation.image:
            kernel = self._constant(np.tile(matrix, (count, 1))[:, :, None, None])
            return self._op("Conv", x, kernel, kernel_shape=[1, 1], group=count)
        assert self.shape is not None
        kept = [0] * (len(self.shape) - 1)  # dimensions that stay as they are
        blocks = self._op("Reshape", x, self._constant(np.array([*kept, count, rotation.block])))
        return self._op("Reshape", self._op("MatMul", blocks, self._constant(matrix)), self._constant(np.array([*kept, -1])))

    def _float_grid(self, x: ir.Value, scale: ir.Value, zero: ir.Value, qmin: int, qmax: int) -> ir.Value:
        """The grid in floating-point operators, for what QuantizeLinear cannot say."""
        code = self._op("Add", self._op("Round", self._op("Div", x, scale)), zero)
        code = self._op("Clip", code, self._scalar(qmin), self._scalar(qmax))
        return self._op("Mul", self._op("Sub", code, zero), scale)

    # Weights.

    def _weight(self, label: str, layer: QuantLayer, rows: slice, part: slice, segment: int) -> ir.Value:
        """Outputs `rows` and inputs `part` of the weight, as a linear layer's (I, O) or a convolution's (O, I, h, w)."""
        linear = not isinstance(layer, QuantConv2d)
        label = f"{label}.weight" if layer.config.segments is None else f"{label}.weight.{segment}"
        if layer.weight_scale is None or layer.config.weight_codes is None:
            weight = layer.weight[rows, part].float()
            return self._initializer(label, _array(weight.T if linear else weight))
        codes = layer.weight_codes()[rows, part]
        array = _array(codes.T if linear else codes)
        if layer.config.weight_codes.bits <= 4:
            packed = self._initializer(label, array.astype(ml_dtypes.int4))
            value = self._op("Cast", packed, to=int(ir.DataType.INT8))
        else:
            value = self._initializer(label, array)
        scale = self._initializer(f"{label}.scale", _array(layer.weight_scale[rows, segment].float()))
        zero = []  # none where it is 0: OpenVINO keeps convolutions in floating point otherwise
        if layer.weight_zero_point is not None:
            zero = [self._constant(self._weight_zero(label, layer, rows, segment))]
        return self._op("DequantizeLinear", value, scale, *zero, axis=1 if linear else 0)

    @staticmethod
    def _weight_zero(label: str, layer: QuantLayer, rows: slice, segment: int) -> np.ndarray:
        assert layer.weight_zero_point is not None and layer.config.weight_codes is not None
        zero = layer.weight_zero_point[rows, segment] + layer.config.weight_codes.qmin
        if not bool(((zero == zero.round()) & (zero.abs() <= 127)).all()):
            raise ValueError(f"{label}: a weight's zero point is not a whole number from -127 to 127: it has no int8 form")
        return _array(zero.to(torch.int8))

    # Layers.

    def _layer(
        self, name: str, layer: QuantLayer, inputs: Sequence[ir.Value | None], rows: slice = slice(None), label: str = ""
    ) -> ir.Value:
        """Its outputs `rows`, of which `label` tells one part from another."""
        x = inputs[0]
        assert x is not None
        total: ir.Value | None = None
        for i, (part, piece) in enumerate(zip(layer.parts(), self._pieces(x, layer.parts()), strict=True)):
            smoothing = None if layer.smoothing is None else layer.smoothing[:, part]
            if smoothing is not None and not isinstance(layer, QuantConv2d):
                smoothing = smoothing.flatten()
            rotation = None
            if layer.rotation is not None:
                rotation = Rotation(layer.rotation, part.stop - part.start, isinstance(layer, QuantConv2d))
            grid = self._act(piece, layer.act, i, smoothing, rotation=rotation)
            weight = self._weight(f"{name}{label}", layer, rows, part, i)
            bias = None if i > 0 or layer.bias is None else _array(layer.bias[rows].float())
            output = self._product(f"{name}{label}", layer, grid, weight, bias)
            total = output if total is None else self._floats(self._op("Add", total, output))
        assert total is not None
        if layer.down is None or layer.up is None:
            return total
        return self._floats(self._op("Add", total, self._branch(f"{name}{label}", layer, x, layer.down, layer.up[rows])))

    def _branch(self, name: str, layer: QuantLayer, x: ir.Value, down: Tensor, up: Tensor) -> ir.Value:
        """up down x, in floats."""
        if not isinstance(layer, QuantConv2d):
            factors = [self._initializer(f"{name}.{key}", _array(part.float().T)) for key, part in (("down", down), ("up", up))]
            return self._op("MatMul", self._op("MatMul", x, factors[0]), factors[1])
        inner = self._convolution(layer, x, self._initializer(f"{name}.down", _array(down.float())))
        return self._op("Conv", inner, self._initializer(f"{name}.up", _array(up.float()[:, :, None, None])), kernel_shape=[1, 1])

    def _convolution(self, layer: QuantConv2d, *operands: ir.Value) -> ir.Value:
        assert not isinstance(layer.padding, str)
        return self._op(
            "Conv", *operands,
            kernel_shape=list(layer.kernel_size), strides=list(layer.stride), pads=[*layer.padding, *layer.padding],
            dilations=list(layer.dilation), group=layer.groups,
        )  # fmt: skip

    def _pieces(self, x: ir.Value, parts: Sequence[slice]) -> list[ir.Value]:
        """The channel groups of x: the operands of the concatenation that made it, else slices."""
        if len(parts) == 1:
            return [x]
        sizes = [part.stop - part.start for part in parts]
        producer = x.producer()
        if producer is not None and producer.op_type == "Concat" and producer.attributes["axis"].as_int() == 1:
            operands = [value for value in producer.inputs if value is not None]
            if [value.shape[1] if value.shape is not None else None for value in operands] == sizes:
                return operands
        axis = self._constant(np.array([1], np.int64))
        ends = [[self._constant(np.array([edge], np.int64)) for edge in (part.start, part.stop)] for part in parts]
        return [self._op("Slice", x, *pair, axis) for pair in ends]

    def _product(self, name: str, layer: QuantLayer, x: ir.Value, weight: ir.Value, bias: np.ndarray | None) -> ir.Value:
        offset = None
        if bias is not None:
            late = isinstance(layer, QuantConv2d) and id(x) in self.factors  # comes after the step's scale
            offset = self._initializer(f"{name}.bias", bias.reshape(-1, 1, 1) if late else bias)
        if not isinstance(layer, QuantConv2d):
            product = self._scaled(self._floats(self._op("MatMul", x, weight)), x)
            return product if offset is None else self._floats(self._op("Add", product, offset))
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError(
                f"{name}: padding {layer.padding_mode!r} {layer.padding!r} is not exported; allowed are numbers of zeros"
            )
        inside = [offset] if offset is not None and id(x) not in self.factors else []
        convolved = self._scaled(self._floats(self._convolution(layer, x, weight, *inside)), x)
        return convolved if inside or offset is None else self._floats(self._op("Add", convolved, offset))

    def _attention(self, name: str, processor: AttentionProducts, inputs: Sequence[ir.Value | None], scale: float) -> ir.Value:
        query, key, value, *mask = inputs
        assert query is not None and key is not None and value is not None
        # The scale of the scores rides on the step of q.
        query = self._act(query, processor.q, gain=scale)
        if processor.q.codes is None:
            query = self._op("Mul", query, self._scalar(scale))
        key = self._act(self._op("Transpose", key, perm=[0, 1, 3, 2]), processor.k, signed=True)
        scores = self._scaled(self._op("MatMul", query, key), query, key, scores=True)
        scores = self._op("Softmax", self._op("Add", scores, mask[0]) if mask else scores, axis=-1)
        weights, value = self._act(scores, processor.softmax), self._act(value, processor.v, signed=True)
        return self._scaled(self._floats(self._op("MatMul", weights, value)), weights, value)


def lower_(model: ir.Model, network: Network) -> None:
    """Replace every marker of `model`, in place, by what the module of that name in `network` computes.

    Raises:
        ValueError: naming a layer that has no form in standard operators.
    """
    Lowering(model.graph, network).run()
    model.opset_imports.pop(DOMAIN, None)
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name in [name for name in model.graph.initializers if name not in used]:
        del model.graph.initializers[name]
