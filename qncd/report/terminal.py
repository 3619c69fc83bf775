"""The layers of a quantized network as aligned lines of text, and one line of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qncd.ptq.layer_record import LayerRecord, NetworkRecord, mean_of
from qncd.report.tables import number, percent

COLUMNS = ("layer", "kind", "weights", "bits", "input bits", "input from", "to", "own error", "gathered")
TEXTS = 2  # columns on the left that are texts; numbers are flush right

SORTS: dict[str, tuple[Callable[[LayerRecord], float | None], bool]] = {  # what by, and whether the largest come first
    "own": (lambda layer: mean_of(layer.own), True),
    "gathered": (lambda layer: mean_of(layer.gathered), True),
    "bits": (lambda layer: layer.weight_bits, False),
    "weights": (lambda layer: layer.weights, True),
}


def ordered(layers: Sequence[LayerRecord], by: str | None, top: int | None = None) -> list[LayerRecord]:
    """The first `top` of the layers in the order of SORTS, those without such a figure last; as they are where `by` is None."""
    found = list(layers)
    if by is not None:
        value_of, largest_first = SORTS[by]

        def place(layer: LayerRecord) -> tuple[bool, float]:
            value = value_of(layer)
            return value is None, 0.0 if value is None else -value if largest_first else value

        found.sort(key=place)
    return found[:top]


def lines_of(layers: Sequence[LayerRecord]) -> list[str]:
    """A head and a line for each layer. A dash stands for what is not known or does not exist."""
    rows = [COLUMNS, *(_row(layer) for layer in layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [f"{cell:{'<' if i < TEXTS else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))]


def _row(layer: LayerRecord) -> tuple[str, ...]:
    cells = (
        number(layer.weights or None, ","), number(layer.weight_bits), number(layer.act_bits), number(layer.low, ".3g"),
        number(layer.high, ".3g"), percent(mean_of(layer.own)), percent(mean_of(layer.gathered)),
    )  # fmt: skip
    return (layer.name, layer.kind, *(cell.text for cell in cells))


def closing_line(record: NetworkRecord) -> str:
    """The means over all layers; those that are not known are left out."""
    layers = [layer for layer in record.layers if layer.weights]
    weights = sum(layer.weights for layer in layers)
    known = [layer for layer in layers if layer.weight_bits]
    inputs = [layer.act_bits for layer in record.layers if layer.act_bits]
    parts = [f"{len(layers)} layers, {weights:,} weights"]
    if known:
        bits = sum(layer.stored for layer in known) / sum(layer.weights for layer in known)
        parts.append(f"{bits:.4g} bits a weight" + ("" if len(known) == len(layers) else f" in {len(known)} of the layers"))
    if inputs:
        parts.append(f"{sum(inputs) / len(inputs):.3g} bits an input")
    figures: dict[str, Sequence[Any]] = {
        "own error": [mean_of(layer.own) for layer in layers],
        "gathered": [mean_of(layer.gathered) for layer in layers],
        "prediction": record.prediction,
    }
    parts += [f"{name} {percent(mean).text}" for name, values in figures.items() if (mean := mean_of(values)) is not None]
    return "in the mean: " + ", ".join(parts)
