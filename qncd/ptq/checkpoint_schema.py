"""What a quantized checkpoint may hold, tensor by tensor and field by field, checked before any of it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.seen import DTYPES
from qncd.ptq.layer_record import NetworkRecord
from qncd.quant.affine import Codes, IntegerRange
from qncd.quant.inspection import calibrated_quantizers, quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.packing import unpack4
from qncd.recipe import QuantConfig, Recipe

_LONGEST = 120  # characters of a value in a message
_EXACT = 1 << 24  # whole numbers up to here are exact in float32


@dataclass(frozen=True)
class Rule:
    """What a tensor has to be.

    Attributes:
        shape: exactly; (1,) does not stand for (C,).
        dtype: exactly, None for any floating point number. What is floating point is finite.
        low, high: of the values, both included.
        positive, nonzero, whole: every value is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    low: float = -math.inf
    high: float = math.inf
    positive: bool = False
    nonzero: bool = False
    whole: bool = False

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError that names the tensor and what it should be."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {self.shape}")
        fits = tensor.is_floating_point() if self.dtype is None else tensor.dtype == self.dtype
        if not fits:
            raise ValueError(f"{name}: {tensor.dtype}, expected {self.dtype or 'floating point numbers'}")
        if not tensor.numel():
            return
        tensor = tensor.float() if tensor.dtype is torch.float8_e4m3fn else tensor  # torch does not compare them
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: holds NaN or infinity")
        low, high = float(tensor.min()), float(tensor.max())
        if low < self.low or high > self.high:
            wrong = low if low < self.low else high
            raise ValueError(f"{name}: holds {wrong:g}, allowed are {self.low:g} to {self.high:g}")
        if self.positive and low <= 0:
            raise ValueError(f"{name}: holds {low:g}, allowed are numbers above 0")
        if self.nonzero and not bool(tensor.all()):
            raise ValueError(f"{name}: holds 0, allowed are numbers other than 0")
        if self.whole and bool((tensor != tensor.round()).any()):
            raise ValueError(f"{name}: holds numbers that are not whole")


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], ranges: bool) -> None:
    """Compare tensors with what a network needs that is prepared by `quantize_`, with the widths of the file.

    Args:
        module: may be without memory.
        tensors: of the file, without those of corrections.
        ranges: activation ranges are used too.

    Raises:
        KeyError: the name of a tensor that is missing.
        ValueError: a tensor is not what the network needs, or has no place in it.
    """
    rules: dict[str, Rule] = {}
    for name, layer in quant_layers(module).items():
        rules |= _layer_rules(name, layer, tensors)
    for name, quantizer in calibrated_quantizers(module).items():
        if ranges:
            assert quantizer.codes is not None
            rules |= _range_rules(name, quantizer.codes, quantizer.scale.numel(), tensors)
    weights = {f"{name}.weight" for name in quant_layers(module)}
    for name, parameter in module.named_parameters():
        if name not in weights:
            rules[name] = Rule(tuple(parameter.shape))
    for name, rule in rules.items():
        rule.check(name, tensors[name])
    for name, layer in quant_layers(module).items():
        codes = layer.config.weight_codes
        if codes is not None and codes.bits < 4:  # all 16 values of half a byte are codes of 4 bits
            unpacked = unpack4(tensors[f"{name}.weight_packed"], layer.weight.shape)
            Rule(tuple(layer.weight.shape), torch.int8, codes.qmin, codes.qmax).check(f"{name}.weight_packed", unpacked)
        if f"{name}.rotation" in rules:
            layer.check_rotation(int(tensors[f"{name}.rotation"]))
    ignored = () if ranges else (".scale", ".zero_point", ".times")
    extra = [name for name in tensors.keys() - rules.keys() if not name.endswith(ignored)]
    if extra:
        raise ValueError(f"{len(extra)} tensors that this model has no place for, {shortened(min(extra))} among them")
    _check_times([(name, tensors[name]) for name in rules if name.endswith(".times")])


def _layer_rules(name: str, layer: QuantLayer, tensors: Mapping[str, Tensor]) -> dict[str, Rule]:
    shape, codes = tuple(layer.weight.shape), layer.config.weight_codes
    rules: dict[str, Rule] = {}
    if f"{name}.smoothing" in tensors:
        rules[f"{name}.smoothing"] = Rule((shape[1],), positive=True)
    if f"{name}.rotation" in tensors:
        rules[f"{name}.rotation"] = Rule((1,), torch.int64, low=2, high=shape[1])
    if f"{name}.up" in tensors:
        rank = tensors[f"{name}.up"].shape[-1] if tensors[f"{name}.up"].ndim else 0
        rules |= {f"{name}.down": Rule((rank, *shape[1:])), f"{name}.up": Rule((shape[0], rank))}
    if layer.bias is not None or (layer.takes_shift and f"{name}.bias" in tensors):  # bias correction may have made one
        rules[f"{name}.bias"] = Rule((shape[0],))
    if codes is None:
        return rules | {f"{name}.weight": Rule(shape)}
    if codes.bits <= 4:
        rules[f"{name}.weight_packed"] = Rule(((math.prod(shape) + 1) // 2,), torch.uint8)
    else:
        rules[f"{name}.weight_codes"] = Rule(shape, codes.file_dtype, codes.qmin, codes.qmax)
    rules[f"{name}.weight_scale"] = scale_rule(layer)
    if f"{name}.weight_zero_point" in tensors and isinstance(codes, IntegerRange):
        # Those of Q-Diffusion's searched ranges lie beyond the codes where all weights of a channel have one sign.
        rules[f"{name}.weight_zero_point"] = Rule(layer.scale_shape, low=-_EXACT, high=_EXACT, whole=True)
    return rules


def scale_rule(layer: QuantLayer) -> Rule:
    """What its weight's scales have to be."""
    grouped = layer.config.grouped  # whose scales may be negative
    return Rule(layer.scale_shape, positive=not grouped, nonzero=grouped)


def _range_rules(name: str, codes: Codes, segments: int, tensors: Mapping[str, Tensor]) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    shape: tuple[int, ...] = (segments,)
    if f"{name}.times" in tensors:
        times = tensors[f"{name}.times"]
        shape = (len(times) if times.ndim else 0, segments)
        rules[f"{name}.times"] = Rule(shape[:1], None if times.is_floating_point() else torch.int64, low=0)
    foreign = any(key.endswith(".weight_zero_point") for key in tensors)  # Q-Diffusion's, as above
    low, high = (-_EXACT, _EXACT) if foreign else (codes.qmin, codes.qmax)
    return rules | {
        f"{name}.scale": Rule(shape, positive=True),
        f"{name}.zero_point": Rule(shape, low=low, high=high, whole=True),
    }


def _check_times(times: list[tuple[str, Tensor]]) -> None:
    for name, value in times:
        if not len(value) or bool((value.diff() <= 0).any()):
            raise ValueError(f"{name}: expected time steps in ascending order, each once")


def read_field(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """An object of JSON in the header. Raises KeyError where it is missing, and ValueError that names the file and the key."""
    text = metadata[key]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header: {key}: no JSON ({shortened(str(error))})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged header: {key}: expected names with values")
    return value


def read_config(path: Path, metadata: Mapping[str, str]) -> QuantConfig:
    """How the file was quantized; options that are younger than the file have their defaults. Raises as `read_field`."""
    found = read_field(path, metadata, "config")
    try:
        return QuantConfig(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged header: config: {shortened(str(error))}") from None


def read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What else the calibration depended on. Raises as `read_field`."""
    settings = read_field(path, metadata, "settings")
    try:
        for key in ("reconstruction", "sampler", "correction", "recipe"):
            if settings.get(key) is not None and not isinstance(settings[key], dict):
                raise ValueError(f"{key}: expected names with values")
        if "recipe" in settings:
            if settings["recipe"] is None:
                raise ValueError("recipe: expected names with values")
            Recipe.from_json(settings["recipe"])
        times = settings.get("times", [])
        if not isinstance(times, list) or not all(_is_number(time) and time >= 0 for time in times):
            raise ValueError("times: expected a list of numbers, 0 or more")
        if settings.get("guidance") is not None and not _is_number(settings["guidance"]):
            raise ValueError("guidance: expected a number")
    except ValueError as error:
        raise ValueError(f"{path}: damaged header: settings: {shortened(str(error))}") from None
    return settings


def read_inputs(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the network is called with: [shape of one row, dtype] by name. Raises as `read_field`."""
    inputs = read_field(path, metadata, "inputs")
    for name, value in inputs.items():
        fits = isinstance(value, list) and len(value) == 2 and isinstance(value[0], list) and value[1] in DTYPES
        if not fits or not all(type(size) is int and 0 < size < 1 << 20 for size in value[0]):
            raise ValueError(f"{path}: damaged header: inputs: {shortened(name)}: expected the shape of a row and its dtype")
    return inputs


def read_act_bits(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """The number of bits of each activation quantizer. Raises as `read_field`."""
    bits = read_field(path, metadata, "act_bits")
    for name, value in bits.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 16:
            raise ValueError(
                f"{path}: damaged header: act_bits: {shortened(name)} {shortened(value)}: allowed are whole numbers, 2 to 16"
            )
    return bits


def read_layers(path: Path, metadata: Mapping[str, str]) -> NetworkRecord:
    """What each layer got. Raises as `read_field`."""
    try:
        return NetworkRecord.from_json(read_field(path, metadata, "layers"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged header: layers: {shortened(str(error))}") from None


def shortened(value: Any) -> str:
    """What a file holds, for a message: on one line, and not longer than that."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
