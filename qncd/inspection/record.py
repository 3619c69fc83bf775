"""What was measured while a model was quantized, also as plain values, from which a report draws it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.io.files import read_json, write_text
from qncd.ptq.layer_record import NetworkRecord, short
from qncd.quant.affine import SEARCH_RATIOS

INSPECTION_FILE = "inspection.json"  # beside the pictures
PLAIN, CORRECTED, CONTROL = "quantized", "quantized, corrected", "full-precision control: what the paper's estimator reports"
DIGITS = 5  # that are written of a number


@dataclass(frozen=True)
class Smoothed:
    """What smoothing by the embedding does to the inputs of the layers that it stretches.

    Attributes:
        largest: |value| of each channel before smoothing, (C,) by layer.
        factors: S, (C,) by layer.
        used: the recipe smooths by them.
    """

    largest: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    used: bool = True

    def after(self, name: str) -> Tensor:
        """Largest |value| of each channel once it is divided by S."""
        return self.largest[name] / self.factors[name].cpu()

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of the whole input, before and after, by layer."""
        return {name: (float(value.max()), float(self.after(name).max())) for name, value in self.largest.items()}

    @property
    def most(self) -> str:
        """The layer whose range shrinks most."""
        return max(self.ranges, key=lambda name: self.ranges[name][0] / max(self.ranges[name][1], 1e-30))


@dataclass(frozen=True)
class NoiseAt:
    """The error of a prediction at one step, over all images and pixels.

    Attributes:
        snr: mean square of the exact prediction over that of the error, in dB; infinite where there is no error.
        mean, std: of the error.
        correlation: of the error with the exact prediction; 0 where one of them is constant.
    """

    snr: float
    mean: float
    std: float
    correlation: float


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie between edges, in order: one edge more than counts."""

    edges: Tensor
    counts: Tensor

    @classmethod
    def of(cls, values: Tensor, bins: int, low: float | None = None, high: float | None = None) -> Histogram:
        """Of all values, by default from the least to the largest."""
        flat = values.double().flatten()
        between = float(flat.min() if low is None else low), float(flat.max() if high is None else high)
        counts, edges = np.histogram(flat.numpy(), bins, between)
        return cls(torch.from_numpy(edges), torch.from_numpy(counts))


@dataclass(frozen=True)
class Search:
    """Error of the range search against the clip ratio, relative to that of the whole range.

    Attributes:
        title: what is searched.
        errors: (80, n) by SEARCH_RATIOS, a column for each range that has a search of its own.
        chosen: ratios that the layer's ranges have in the end, any number.
    """

    title: str
    errors: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class LayerRounding:
    """What became of one layer's weights, in steps of their channel's grid where there is one.

    Attributes:
        name: of the layer.
        bits: of its weights, None in floating point.
        exact: the weights as they were to be rounded, smoothing multiplied in.
        errors: of rounding.
        codes: (2, n): whole steps, and how many weights were rounded to them; None in floating point.
        share: squared error of rounding over the squared weights.
        searches: of the weights' ranges and of the input's, where they are quantized.
    """

    name: str
    bits: int | None
    exact: Histogram
    errors: Histogram
    codes: Tensor | None
    share: float
    searches: tuple[Search, ...]


@dataclass(frozen=True)
class Inspected:
    """What is known of a quantized network.

    Attributes:
        label: of what it is, with width and mode where it was measured here.
        record: of its layers.
        smoothed: ranges around smoothing; None where it was not measured, or the network's family knows no layer that its
            embedding stretches.
        noise: errors of predictions by step, by what was measured: PLAIN, CORRECTED, CONTROL.
        layer: the layer that was asked for.
        settings: how it was made, as plain values by the names that a run.json has.
    """

    label: str
    record: NetworkRecord
    smoothed: Smoothed | None = None
    noise: Mapping[str, Mapping[int, NoiseAt]] = field(default_factory=dict)
    layer: LayerRounding | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into the folder, which is there."""
        write_text(folder / INSPECTION_FILE, json.dumps(_plain(asdict(self)), allow_nan=False))

    @classmethod
    def open(cls, folder: Path) -> Inspected:
        """The inverse. Raises ValueError where the folder's file is damaged."""
        file = folder / INSPECTION_FILE
        try:
            values = read_json(file)
            noise = {
                str(name): {int(index): _noise(at) for index, at in steps.items()} for name, steps in values["noise"].items()
            }
            smoothed, layer = values["smoothed"], values["layer"]
            return cls(
                str(values["label"]), NetworkRecord.from_json(values["record"]), smoothed and _smoothed(smoothed), noise,
                layer and _layer(layer), dict(values["settings"]),
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{file}: damaged ({error}): make it again with `qncd inspect`") from None


def _plain(value: Any) -> Any:
    """Without tensors, tuples and what JSON has no number for: infinity is None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return short(value, DIGITS)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"expected a number, found {str(value)[:40]}")
    return math.inf if value is None else float(value)


def _tensor(values: Any, *shape: int) -> Tensor:
    """Of finite numbers, in the shape, where -1 stands for any size."""
    found = torch.tensor(values, dtype=torch.float64)
    if found.ndim != len(shape) or any(size not in (-1, have) for size, have in zip(shape, found.shape, strict=True)):
        raise ValueError(f"expected numbers in the shape {shape}, found {tuple(found.shape)}")
    return found


def _noise(values: Mapping[str, Any]) -> NoiseAt:
    return NoiseAt(*(_number(values[name]) for name in ("snr", "mean", "std", "correlation")))


def _smoothed(values: Mapping[str, Any]) -> Smoothed:
    largest = {str(name): _tensor(found, -1) for name, found in values["largest"].items()}
    factors = {name: _tensor(values["factors"][name], len(found)) for name, found in largest.items()}
    return Smoothed(largest, factors, bool(values["used"]))


def _histogram(values: Mapping[str, Any]) -> Histogram:
    counts = _tensor(values["counts"], -1)
    return Histogram(_tensor(values["edges"], len(counts) + 1), counts)


def _layer(values: Mapping[str, Any]) -> LayerRounding:
    bits, codes = values["bits"], values["codes"]
    searches = [
        Search(str(found["title"]), _tensor(found["errors"], len(SEARCH_RATIOS), -1), _tensor(found["chosen"], -1))
        for found in values["searches"]
    ]
    return LayerRounding(
        str(values["name"]), None if bits is None else int(bits), _histogram(values["exact"]), _histogram(values["errors"]),
        None if codes is None else _tensor(codes, 2, -1), _number(values["share"]), tuple(searches),
    )  # fmt: skip
