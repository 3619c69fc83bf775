"""The same model for OpenVINO: in operators for which it has integer kernels and which leave channels last.

It computes GroupNormalization on planes of one group each, and reorders what comes from a convolution and what goes to the
next one. Here only the sums run over planes; the rest is one factor and one term for each channel, which OpenVINO computes
together with the SiLU and the quantizer that follow.

It multiplies two activations, as attention does, in integers only where neither has a zero point: else it takes the zero
points off in floats first. Here they come off the product.

Both take small differences of large numbers, for which bfloat16 is too coarse. Beside the integers it is no faster anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qncd.engines.packages import require

COLUMNS = 8  # that a product gets for one sum: with 1 its width would not fill the kernel's registers
COLUMN_CODE = 64  # in them: of both 8-bit types, and dividing by it is exact


@functools.cache
def openvino_core() -> Any:
    """The one openvino.Core of this process. Raises ValueError where the package is not installed.

    Its CPU plugin gives the thread that loads it a stack for signals, and puts back the one before when the Core goes. Of two
    Cores the first to come must be the last to go: else the thread is left with a stack that is no more, and the next signal,
    as Ctrl-C or the end of a child process, is a segmentation fault.
    """
    return require("openvino").Core()


def read_network(path: Path, shapes: Mapping[str, Sequence[int]]) -> Any:
    """The openvino.Model in a file, with inputs of these shapes by name."""
    model = openvino_core().read_model(path)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    multiply_codes_(model)
    expand_group_norms_(model)
    raise_scalars_(model)
    return model


def raise_scalars_(model: Any) -> int:
    """Give computed scalars, as a time step's scale, the rank of what they multiply or divide, in place; how many there were.

    OpenVINO computes operands of different ranks in the order of the axes only, and reorders what has channels last.
    """
    op: Any = require("openvino.opset13")
    raised = 0
    for node in model.get_ops():
        if node.get_type_name() not in ("Multiply", "Divide"):
            continue
        rank = len(node.get_output_shape(0))
        for port in node.inputs():
            source = port.get_source_output()
            if len(source.get_shape()) == 0 < rank and source.get_node().get_type_name() != "Constant":
                shape = op.constant(np.ones(rank, np.int64))
                port.replace_source_output(op.reshape(source, shape, special_zero=False).output(0))
                raised += 1
    model.validate_nodes_and_infer_types()
    return raised


def multiply_codes_(model: Any) -> int:
    """Replace every product of two dequantized activations of an openvino.Model of fixed shapes by one of their codes, in place.

    With codes a and b and zero points u and v: sum (a - u)(b - v) = sum a b - u sum (b - v) - v sum a. The last term is the same
    for all of a row, and nothing in front of a softmax over rows; elsewhere its sum comes from columns that b gets. So OpenVINO
    still computes an attention's two products and its softmax in one kernel. Codes and sums are halved or quartered, for OpenVINO
    takes codes without a factor for floats: all of it is exact up to 2^24, before the scales. Returns how many there were.
    """
    op, utils = (require(f"openvino.{name}") for name in ("opset13", "utils"))
    half, rewritten = np.float32(0.5), 0
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or any(node.get_attributes().values()):  # none of ours transposes
            continue
        a, b = (_Dequantized.read(node.input_value(i)) for i in range(2))
        if a is None or b is None:
            continue
        width, sums = b.codes.get_shape()[-1], b.zero != 0 and not _feeds_softmax(node)
        right = _with_columns(b.codes) if sums else b.codes
        product = op.matmul(op.multiply(a.codes, half), op.multiply(right, half), False, False)
        if sums:
            added = _columns(product, width, width + 1)
            product = op.subtract(_columns(product, 0, width), op.multiply(added, np.float32(b.zero / COLUMN_CODE)))
        if a.zero:
            halves = op.multiply(op.subtract(b.codes, np.float32(b.zero)), half)
            total = op.reduce_sum(halves, op.constant(np.array([-2], np.int64)), keep_dims=True)
            product = op.add(product, op.multiply(total, np.float32(-a.zero / 2)))
        utils.replace_node(node, op.multiply(product, np.float32(4 * a.scale * b.scale)))
        rewritten += 1
    model.validate_nodes_and_infer_types()
    return rewritten


@dataclass(frozen=True)
class _Dequantized:
    """scale * (codes - zero), codes being floats converted from the 8-bit integers of a FakeQuantize."""

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
        stored = _input(codes, "Convert")
        grid = stored and _input(stored, "Convert")
        if zero is None or grid is None or stored.get_element_type().get_type_name() not in ("u8", "i8"):
            return None
        return cls(codes, scale, zero) if grid.get_node().get_type_name() == "FakeQuantize" else None


def _with_columns(codes: Any) -> Any:
    """Codes (..., K, N) of a FakeQuantize -> (..., K, N + COLUMNS), COLUMN_CODE in the new columns."""
    op: Any = require("openvino.opset13")
    stored = codes.get_node().input_value(0)
    grid = stored.get_node().input_value(0).get_node()
    x, *ends = grid.input_values()
    low, high, smallest, largest = (float(end.get_node().get_data().item()) for end in ends)
    value = low + (COLUMN_CODE - smallest) / (largest - smallest) * (high - low)
    columns = op.constant(np.full([*x.get_shape()[:-1], COLUMNS], value, np.float32))
    wider = op.fake_quantize(op.concat([x, columns], -1), *ends, grid.get_attributes()["levels"])
    return op.convert(op.convert(wider, stored.get_element_type().get_type_name()), "f32")


def _columns(value: Any, first: int, last: int) -> Any:
    op: Any = require("openvino.opset13")
    start, stop, step, axis = (op.constant(np.array([number], np.int64)) for number in (first, last, 1, -1))
    return op.slice(value, start, stop, step, axis)


def _feeds_softmax(node: Any) -> bool:
    """Whether all that becomes of a product is a softmax over its last axis, after factors of one element."""
    while len(targets := list(node.output(0).get_target_inputs())) == 1:
        node, port = targets[0].get_node(), targets[0].get_index()
        if node.get_type_name() == "Softmax":
            return node.get_attributes()["axis"] in (-1, len(node.get_output_shape(0)) - 1)
        if node.get_type_name() != "Multiply" or np.prod(node.get_input_shape(1 - port)) != 1:
            return False
    return False


def _input(value: Any, kind: str) -> Any:
    """The first input of the operator behind a value where it is of a kind, else None."""
    node = value.get_node()
    return node.input_value(0) if node.get_type_name() == kind else None


def _number(value: Any) -> float | None:
    """A constant of one element, converted or not."""
    node = (_input(value, "Convert") or value).get_node()
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().item())


def expand_group_norms_(model: Any) -> int:
    """Rewrite every GroupNormalization of an openvino.Model with fixed shapes, in place. Returns how many there were.

    What an input was multiplied by and added to for each channel, a time step's scale, a bias or the time embedding, joins the
    factor and the term: the sums are those of what came before. A group's variance is the mean
    of its channels' own ones, E[x^2] - E[x]^2 in float32, and the variance of their means.
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
        """(N, G, C / G) -> (N, G, 1)."""
        return op.reduce_mean(value, ints([2]), keep_dims=True)

    x, before = _affine_input(x)
    axes = ints(list(range(2, 2 + len(plane))))
    mean = shaped(op.reduce_mean(x, axes, keep_dims=True), grouped)  # of each channel
    norm = shaped(op.reduce_l2(x, axes, keep_dims=True), grouped)  # so there is no second tensor of squares
    square = op.multiply(op.multiply(norm, norm), np.float32(1 / np.prod(plane)))
    variance = op.relu(op.subtract(square, op.multiply(mean, mean)))
    factor, term = op.constant(np.float32(1)), op.constant(np.float32(0))  # the input is x * factor + term
    for kind, value in before:
        size = int(np.prod(value.get_shape()))
        value = shaped(value, [1, 1, 1] if size == 1 else shared if size == channels else grouped)
        if kind == "Multiply":
            factor, term = op.multiply(factor, value), op.multiply(term, value)
        else:
            term = op.add(term, value)
    mean, variance = op.add(op.multiply(mean, factor), term), op.multiply(variance, op.multiply(factor, factor))
    center = group_mean(mean)
    apart = op.subtract(mean, center)
    variance = group_mean(op.add(variance, op.multiply(apart, apart)))
    inverse = op.divide(np.float32(1), op.sqrt(op.add(variance, np.float32(epsilon))))
    slope = op.multiply(inverse, shaped(weight, shared))
    whole_factor = shaped(op.multiply(slope, factor), whole)
    whole_term = shaped(op.subtract(shaped(bias, shared), op.multiply(op.subtract(center, term), slope)), whole)
    return op.add(op.multiply(x, whole_factor), whole_term)


def _affine_input(value: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """What a value of one use was made from by multiplying and adding one number for each channel, and by which, in order.

    Constants directly behind a convolution stay: OpenVINO computes them with it.
    """
    steps: list[tuple[str, Any]] = []
    inputs = [value]
    while len(inputs[-1].get_target_inputs()) == 1 and (kind := inputs[-1].get_node().get_type_name()) in ("Add", "Multiply"):
        operands = inputs[-1].get_node().input_values()
        small = [i for i in range(2) if _for_channels(operands[i].get_shape(), value.get_shape())]
        if len(small) != 1:
            break
        steps.append((kind, operands[small[0]]))
        inputs.append(operands[1 - small[0]])
    while steps and steps[-1][1].get_node().get_type_name() == "Constant":
        steps.pop()
        inputs.pop()
    return inputs[-1], steps[::-1]


def _for_channels(shape: Any, whole: Any) -> bool:
    """Whether a shape is that of one number, or of one for each channel, of all samples or of each."""
    if np.prod(shape) == 1:
        return True
    full = [*[1] * (len(whole) - len(shape)), *shape]
    return full[0] in (1, whole[0]) and full[1] == whole[1] and all(side == 1 for side in full[2:])
