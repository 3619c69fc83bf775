"""The same model for OpenVINO: group normalization in operators that leave channels last, as integer convolutions want them.

OpenVINO computes GroupNormalization on planes of one group each, and reorders what comes from a convolution and what goes to
the next one. Here only the sums run over planes; the rest is one factor and one term for each channel, which OpenVINO
computes together with the SiLU and the quantizer that follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qncd.export.packages import require


def read_network(path: Path, shapes: Mapping[str, Sequence[int]], precision: str = "fp32") -> Any:
    """The openvino.Model in a file, with inputs of these shapes by name; `precision`: of what is not quantized."""
    model = require("openvino").Core().read_model(path)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    if precision == "fp32":
        expand_group_norms_(model)
    return model


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
    grouped, whole, shared = [batch, groups, channels // groups], [batch, channels], [1, channels]
    ones = [1] * len(plane)

    def ints(values: list[int]) -> Any:
        return op.constant(np.array(values, np.int64))

    def shaped(value: Any, shape: list[int]) -> Any:
        return op.reshape(value, ints(shape), special_zero=False)

    def group_mean(value: Any) -> Any:
        """(N, C, 1, ...) -> (N, G, 1)."""
        return op.reduce_mean(shaped(value, grouped), ints([2]), keep_dims=True)

    def to_channels(value: Any) -> Any:
        """(N, G, 1) -> (N, C, 1, ...)."""
        return shaped(op.broadcast(value, ints(grouped)), [*whole, *ones])

    axes = ints(list(range(2, 2 + len(plane))))
    mean = group_mean(op.reduce_mean(x, axes, keep_dims=True))
    norm = op.reduce_l2(x, axes, keep_dims=True)  # of a plane: no second tensor of squares
    square = group_mean(op.multiply(op.multiply(norm, norm), np.float32(1 / np.prod(plane))))
    variance = op.relu(op.subtract(square, op.multiply(mean, mean)))
    inverse = op.divide(np.float32(1), op.sqrt(op.add(variance, np.float32(epsilon))))
    factor = op.multiply(to_channels(inverse), shaped(weight, [*shared, *ones]))
    term = op.subtract(shaped(bias, [*shared, *ones]), op.multiply(to_channels(mean), factor))
    return op.add(op.multiply(x, factor), term)
