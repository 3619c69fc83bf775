"""Names of widths such as W4A8 and FP8, and what formats and granularities of numbers allow beside them."""

from __future__ import annotations

import re
from typing import Any, Protocol

from qncd.granularity import CHANNEL, TENSOR
from qncd.options import RecipeError

INTEGER, FP8 = "int", "fp8"
FORMATS = (INTEGER, FP8)
CALIBRATED = ("act_range", "softmax_range", "stepwise_embedding", "stepwise_activations", "bit_allocation")  # about ranges


class Numbers(Protocol):
    """What `qncd.recipe.QuantConfig` says of the numbers that weights and activations become."""

    @property
    def weight_bits(self) -> int | None: ...
    @property
    def act_bits(self) -> int | None: ...
    @property
    def weight_format(self) -> str: ...
    @property
    def act_format(self) -> str: ...
    @property
    def temporal_differences(self) -> bool: ...
    @property
    def attention_bits(self) -> int | None: ...
    @property
    def quantize_attention(self) -> bool: ...
    @property
    def weight_granularity(self) -> str: ...
    @property
    def act_granularity(self) -> str: ...


def parse_width(text: str) -> dict[str, Any]:
    """The options, by path, that a name such as W4A8 stands for; W4A32, W4A16 and W4 leave activations in floating point."""
    name = "WFP8AFP8" if str(text).upper() == "FP8" else str(text).upper()
    match = re.fullmatch(r"(?:W([2-8]|16|32|FP8))?(?:A([2-8]|16|32|FP8))?", name)
    if not match or not text:
        raise ValueError(
            f"width {text!r}: allowed are names such as W4A8 and FP8, 2 to 8 bits or FP8 each, and 16 or 32 for floating point"
        )
    found: dict[str, Any] = {}
    for side, bits in zip(("weight", "act"), match.groups(), strict=True):
        found[f"quant.{side}_bits"] = None if bits in (None, "16", "32") else 8 if bits == "FP8" else int(bits)
        if bits == "FP8":
            found[f"quant.{side}_format"] = FP8
    return found


def width_name(text: str) -> str:
    """The one name of a width: W4A32 of w4, W4A16 and so on, FP8 of WFP8AFP8. Raises ValueError as `parse_width`."""
    found = parse_width(text)
    return _name(*((found[f"quant.{side}_bits"], found.get(f"quant.{side}_format", INTEGER)) for side in ("weight", "act")))


def _name(*sides: tuple[int | None, str]) -> str:
    weights, acts = ("32" if bits is None else "FP8" if form == FP8 else str(bits) for bits, form in sides)
    return "FP8" if weights == acts == "FP8" else f"W{weights}A{acts}"


def label_of(config: Numbers) -> str:
    """W8A8, W4A32, FP8 and so on, with what is not the usual way besides."""
    width = _name((config.weight_bits, config.weight_format), (config.act_bits, config.act_format))
    others = [f"weights {config.weight_granularity}"] if config.weight_bits and config.weight_granularity != CHANNEL else []
    others += [f"activations {config.act_granularity}"] if config.act_bits and config.act_granularity != TENSOR else []
    others += ["differences of time steps"] if config.act_bits and config.temporal_differences else []
    others += [f"attention {config.attention_bits}"] if config.act_bits and config.attention_bits else []
    return f"{width} ({', '.join(others)})" if others else width


def check_numbers(config: Numbers) -> None:
    """Raise RecipeError where formats and granularities contradict other options."""
    usual = type(config)
    if config.act_bits is not None and config.act_granularity != TENSOR:
        for name in CALIBRATED:
            if getattr(config, name) != getattr(usual, name):
                found = f"with {{quant.act_granularity}} {config.act_granularity} they are found at run time"
                raise RecipeError(f"{{quant.{name}}} is about calibrated ranges: {found}")
    if config.temporal_differences and config.act_granularity == TENSOR:
        allowed = "allowed are token and groups: the ranges of differences are found at run time"
        raise RecipeError(f"{{quant.temporal_differences}} with {{quant.act_granularity}} {TENSOR}: {allowed}")
    if config.attention_bits is not None and not config.quantize_attention:
        raise RecipeError("{quant.attention_bits} without {quant.quantize_attention}: q, k and v are in floating point then")
    of_acts = ("act_bits", "softmax_bits", "act_symmetric", "attention_bits", "temporal_differences")
    for side, of_side in (("weight", ("weight_bits",)), ("act", of_acts)):
        if getattr(config, f"{side}_bits") is None or getattr(config, f"{side}_format") != FP8:
            continue
        for name in (*of_side, "edge_bits"):  # which have the 8 bits and no zero point that fp8 has
            if (asked := getattr(config, name)) not in (only := getattr(usual, name), None):
                raise RecipeError(f"{{quant.{side}_format}} fp8 with {{quant.{name}}} {asked}: allowed is {only}")
