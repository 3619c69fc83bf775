"""The same model for ONNX Runtime: its CPU kernels run QDQ convolutions in integers only where the output is quantized too.

Ours is not: what follows a layer gets floats, as in the calibrated model. So each QDQ convolution becomes a product of
uint8 patches with int8 weights, accumulated in int32 and scaled to floats in the same kernel (`MatMulIntegerToFloat`), and
each QDQ matrix product with constant weights that kernel alone. Only the patches' bytes are moved, a quarter of floats'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

KERNELS = "com.microsoft"  # the domain of ONNX Runtime's own operators


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _const(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


class IntegerKernels:
    """Rewrites one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self.constants: dict[tuple[Any, ...], ir.Value] = {}
        self.patches: dict[tuple[Any, ...], ir.Value] = {}  # of inputs that several convolutions share
        self.tail: list[ir.Node] = []  # what follows the product and is computed in it
        self.count = 0

    def run(self) -> int:
        """Rewrite what can be; returns how many products run in integers now."""
        rewritten = 0
        for node in list(self.graph):
            if node.graph is None:
                continue  # the tail of another
            output = self._conv(node) if node.op_type == "Conv" else self._matmul(node) if node.op_type == "MatMul" else None
            if output is not None:
                last = self.tail[-1] if self.tail else node
                self._replace(last, last.outputs[0], output)
                for part in reversed([node, *self.tail][:-1] if self.tail else []):
                    self.graph.remove(part, safe=True)
                self.tail = []
                rewritten += 1
            elif node.op_type == "GroupNormalization":
                self._replace(node, node.outputs[0], self._group_norm(node))
        return rewritten

    def _replace(self, node: ir.Node, old: ir.Value, output: ir.Value) -> None:
        output.shape, output.type = old.shape, old.type
        self.graph.insert_before(node, self.nodes)
        self.nodes = []
        if old.is_graph_output():
            output.name, old.name = old.name, f"{old.name}_float"
        convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _op(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        self.count += 1
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=f"integer_{op_type}_{self.count}")
        node.outputs[0].name = f"integer_value_{self.count}"
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(self, array: np.ndarray | Sequence[int]) -> ir.Value:
        array = np.ascontiguousarray(np.asarray(array))
        key = (array.dtype.str, array.shape, array.tobytes() if array.size < 1 << 12 else len(self.constants))
        if key not in self.constants:
            name = f"integer_constant_{len(self.constants)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self.constants[key] = value
        return self.constants[key]

    def _operands(self, node: ir.Node) -> tuple[ir.Node, np.ndarray, ir.Node] | None:
        """(the input's DequantizeLinear, codes of the weight, the weight's DequantizeLinear), where both are integers."""
        x, w = _producer(node.inputs[0], "DequantizeLinear"), _producer(node.inputs[1], "DequantizeLinear")
        quantize = _producer(x.inputs[0], "QuantizeLinear") if x else None
        if x is None or w is None or quantize is None or _const(x.inputs[2]).dtype != np.uint8:
            return None
        packed = _producer(w.inputs[0], "Cast")
        source = packed.inputs[0] if packed else w.inputs[0]
        if source is None or source.const_value is None:
            return None
        return x, source.const_value.numpy().astype(np.int8), w

    def _product(
        self, node: ir.Node, codes: ir.Value, weight: np.ndarray, x: ir.Node, w: ir.Node, bias: ir.Value | None
    ) -> ir.Value:
        """uint8 codes (..., K) times int8 weights (K, O), as floats; a time step's scale and a bias that follow included."""
        scale, zero, steps = x.inputs[1], x.inputs[2], w.inputs[1]
        if float(_const(scale)) == 1.0 and (factor := self._follower(node, "Mul", 1)) is not None:
            scale = factor
        last = self.tail[-1] if self.tail else node
        if bias is None and (added := self._follower(last, "Add", weight.shape[1])) is not None:
            bias = self._constant(_const(added).reshape(-1))
        zeros = w.inputs[2] if len(w.inputs) > 2 else self._constant(np.zeros(weight.shape[1], np.int8))
        assert scale is not None and zero is not None and steps is not None and zeros is not None
        inputs = [codes, self._constant(weight), scale, steps, zero, zeros, *([bias] if bias is not None else [])]
        return self._op("MatMulIntegerToFloat", *inputs, domain=KERNELS)

    def _follower(self, node: ir.Node, op_type: str, size: int) -> ir.Value | None:
        """What the only consumer of a node multiplies by (a step's scale) or adds (a bias of `size`); it joins the tail."""
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0].node.op_type != op_type:
            return None
        consumer = uses[0].node
        other = consumer.inputs[1 - uses[0].idx]
        assert other is not None
        if op_type == "Mul":
            gather = _producer(other, "Gather")
            if gather is None or gather.inputs[0] is None or gather.inputs[0].const_value is None:
                return None
        elif other.const_value is None or _const(other).size != size:
            return None
        self.tail.append(consumer)
        return other

    def _matmul(self, node: ir.Node) -> ir.Value | None:
        found = self._operands(node)
        if found is None:
            return None
        x, weight, w = found
        codes = x.inputs[0]
        assert codes is not None
        return self._product(node, codes, weight, x, w, None)

    def _conv(self, node: ir.Node) -> ir.Value | None:
        found = self._operands(node)
        attributes = node.attributes
        if found is None or attributes["group"].as_int() != 1 or set(attributes["dilations"].as_ints()) != {1}:
            return None
        x, weight, w = found
        codes = x.inputs[0]
        assert codes is not None
        size, pads = tuple(weight.shape[2:]), tuple(attributes["pads"].as_ints())
        strides, shape = tuple(attributes["strides"].as_ints()), node.outputs[0].shape
        assert shape is not None and isinstance(shape[2], int) and isinstance(shape[3], int)
        patches = self._patches(codes, x.inputs[2], size, pads, strides, (shape[2], shape[3]))
        matrix = weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))  # (h w I, O)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return self._op("Transpose", self._product(node, patches, matrix, x, w, bias), perm=[0, 3, 1, 2])

    def _patches(
        self, codes: ir.Value, zero: ir.Value | None, size: tuple[int, ...], pads: tuple[int, ...], strides: tuple[int, ...],
        output: tuple[int, int],
    ) -> ir.Value:  # fmt: skip
        """(N, C, H, W) -> (N, H', W', h w C): what each output pixel sees, padded with the code of 0."""
        key = (id(codes), size, pads, strides)
        if key in self.patches:
            return self.patches[key]
        assert zero is not None
        rows = self._op("Transpose", codes, perm=[0, 2, 3, 1])
        if any(pads):
            top, left, bottom, right = pads
            rows = self._op("Pad", rows, self._constant(np.array([0, top, left, 0, 0, bottom, right, 0])), zero)
        if size != (1, 1) or strides != (1, 1):
            axes, step = self._constant(np.array([1, 2])), self._constant(np.array(strides))
            parts = []
            for i in range(size[0]):
                for j in range(size[1]):
                    ends = [start + (count - 1) * by + 1 for start, count, by in zip((i, j), output, strides, strict=True)]
                    starts = self._constant(np.array([i, j]))
                    parts.append(self._op("Slice", rows, starts, self._constant(np.array(ends)), axes, step))
            rows = parts[0] if len(parts) == 1 else self._op("Concat", *parts, axis=3)
        self.patches[key] = rows
        return rows

    def _group_norm(self, node: ir.Node) -> ir.Value:
        """ONNX Runtime has no CPU kernel for it, so it becomes one normalization over (N, G, everything else)."""
        x, scale, bias = node.inputs
        assert x is not None and x.shape is not None and scale is not None and bias is not None
        groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes["epsilon"].as_float()
        ones, zeros = self._constant(np.ones(groups, np.float32)), self._constant(np.zeros(groups, np.float32))
        flat = self._op("Reshape", x, self._constant(np.array([0, groups, -1])))
        normalized = self._op("InstanceNormalization", flat, ones, zeros, epsilon=epsilon)
        sizes = [side for side in list(x.shape)[1:] if isinstance(side, int)]
        back = self._op("Reshape", normalized, self._constant(np.array([0, *sizes])))
        column = [-1, *[1] * (len(sizes) - 1)]
        shaped = [self._constant(_const(value).reshape(column)) for value in (scale, bias)]
        return self._op("Add", self._op("Mul", back, shaped[0]), shaped[1])


def to_integer_kernels_(model: ir.Model) -> int:
    """Rewrite the QDQ products of `model` for ONNX Runtime's CPU kernels, in place; returns how many there were."""
    count = IntegerKernels(model.graph).run()
    model.opset_imports[KERNELS] = 1
    return count
