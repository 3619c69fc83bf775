"""The same model for OpenVINO: in operators for which it has integer kernels and which leave channels last.

It computes GroupNormalization on planes of one group each, and reorders what comes from a convolution and what goes to the
next one. Here only the sums run over planes; the rest is one factor and one term for each channel, which OpenVINO computes
together with the SiLU and the quantizer that follow.

It multiplies two activations, as attention does, in integers only where neither has a zero point: else it takes the zero
points off in floats first. Here they come off the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qncd.export.packages import require


def read_network(path: Path, shapes: Mapping[str, Sequence[int]], precision: str = "fp32") -> Any:
    """The openvino.Model in a file, with inputs of these shapes by name; `precision`: of what is not quantized."""
    model = require("openvino").Core().read_model(path)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    multiply_codes_(model)
    if precision == "fp32":
        expand_group_norms_(model)
    return model


def multiply_codes_(model: Any) -> int:
    """Rewrite every product of two dequantized activations of an openvino.Model as one of codes, in place; how many there were.

    With codes a and b, zero points u and v: sum (a - u)(b - v) = sum a b - u sum (b - v) - v sum (a - u) - K u v, K terms each.
    """
    op, utils = (require(f"openvino.{name}") for name in ("opset13", "utils"))
    rewritten = 0
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or any(node.get_attributes().values()):  # none of ours transposes
            continue
        left, right = (node.input_value(i) for i in range(2))
        a, b = _Dequantized.read(left), _Dequantized.read(right)
        if a is None or b is None:
            continue
        product = op.matmul(op.multiply(a.codes, np.float32(a.held)), op.multiply(b.codes, np.float32(b.held)), False, False)
        if (rest := a.scale / a.held * b.scale / b.held) != 1:
            product = op.multiply(product, np.float32(rest))
        if a.offset:
            product = op.subtract(product, op.multiply(_sums(right, -2), np.float32(a.offset)))
        if b.offset:
            both = np.float32(left.get_shape()[-1] * a.offset * b.offset)
            product = op.subtract(product, op.add(op.multiply(_sums(left, -1), np.float32(b.offset)), both))
        utils.replace_node(node, product)
        rewritten += 1
    model.validate_nodes_and_infer_types()
    return rewritten


def _sums(value: Any, axis: int) -> Any:
    op: Any = require("openvino.opset13")
    return op.reduce_sum(value, op.constant(np.array([axis], np.int64)), keep_dims=True)


@dataclass(frozen=True)
class _Dequantized:
    """scale * (codes - zero), codes being floats converted from 8-bit integers that are not constant."""

    codes: Any
    scale: float
    zero: float

    @classmethod
    def read(cls, value: Any) -> _Dequantized | None:
        """None where a value is something else."""
        multiply = value.get_node()
        if multiply.get_type_name() != "Multiply":
            return None
        subtract, scale = multiply.input_value(0).get_node(), _number(multiply.input_value(1))
        if subtract.get_type_name() != "Subtract" or scale is None:
            return None
        codes, zero = subtract.input_value(0), _number(subtract.input_value(1))
        if zero is None or codes.get_node().get_type_name() != "Convert":
            return None
        stored = codes.get_node().input_value(0)
        if stored.get_element_type().get_type_name() not in ("u8", "i8") or stored.get_node().get_type_name() == "Constant":
            return None
        return cls(codes, scale, zero)

    @property
    def offset(self) -> float:
        """What the zero point stands for."""
        return self.scale * self.zero

    @property
    def held(self) -> float:
        """The factor that codes go into a product with: without one, or with 1, OpenVINO takes them for floats."""
        return self.scale if self.scale != 1 else 0.5


def _number(value: Any) -> float | None:
    """A constant of one element, converted or not."""
    node = value.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().item())


def expand_group_norms_(model: Any) -> int:
    """Rewrite every GroupNormalization of an openvino.Model with fixed shapes, in place. Returns how many there were.

    The variance is E[x^2] - E[x]^2 in float32: for inputs of bfloat16 that would be too coarse.
    """
    utils: Any = require("openvino.utils")
    found = [node for node in model.get_ops() if node.get_type_name() == "GroupNormalization"]
    for node in found:
        utils.replace_node(node, _expanded(node))
    model.validate_nodes_and_infer_types()
    return len(found)


def _expanded(node: Any) -> Any:
    op: Any = require("openvino.opset13")
    x, weight, bias = (node.input_value(i) for i in range(3))
    groups, epsilon = (node.get_attributes()[name] for name in ("num_groups", "epsilon"))
    batch, channels, *plane = x.get_shape()
    grouped, shared = ([count, groups, channels // groups] for count in (batch, 1))
    whole = [batch, channels, *[1] * len(plane)]

    def ints(values: list[int]) -> Any:
        return op.constant(np.array(values, np.int64))

    def shaped(value: Any, shape: list[int]) -> Any:
        return op.reshape(value, ints(shape), special_zero=False)

    def group_mean(value: Any) -> Any:
        """(N, C, 1, ...) -> (N, G, 1)."""
        return op.reduce_mean(shaped(value, grouped), ints([2]), keep_dims=True)

    axes = ints(list(range(2, 2 + len(plane))))
    mean = group_mean(op.reduce_mean(x, axes, keep_dims=True))
    norm = op.reduce_l2(x, axes, keep_dims=True)  # of a plane: no second tensor of squares
    square = group_mean(op.multiply(op.multiply(norm, norm), np.float32(1 / np.prod(plane))))
    variance = op.relu(op.subtract(square, op.multiply(mean, mean)))
    inverse = op.divide(np.float32(1), op.sqrt(op.add(variance, np.float32(epsilon))))
    factor = op.multiply(inverse, shaped(weight, shared))
    term = op.subtract(shaped(bias, shared), op.multiply(mean, factor))
    return op.add(op.multiply(x, shaped(factor, whole)), shaped(term, whole))
