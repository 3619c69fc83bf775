"""What each layer got: bits and ranges, and how far its output is from full precision, at time steps of the calibration set.

Two errors are told apart. The *own* error is what a quantized layer makes of the full-precision network's activations: what the
layer adds. The error that has *gathered* is that of its output in the quantized network, where its input is off already. Both are
looked at in a few positions of each layer's output, which are kept of calls of the full-precision network before it is quantized:
nothing copies the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.io.files import read_json
from qncd.models.network import Network
from qncd.ptq.bits import FLOAT, bits_beside
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import call_on, hooked
from qncd.ptq.positions import input_rows, is_matrix, output_rows, some_positions
from qncd.quant.affine import Codes
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.quant.stepwise import StepwiseActQuantizer, select_steps

LAYERS_FILE = "layers.json"  # in the folder of a run
TIMES = 10  # time steps at most
INPUTS = 2  # of the calibration set at each; twice as many with guidance
FEWEST, MOST = 4, 64  # positions of an input, fewer of layers with many inputs:
KEPT = 1 << 14  # numbers for each input that are kept of a layer, if FEWEST are not more
DIGITS = 4  # that are written of a number
PRODUCT = "attention"  # kind of an operand of an attention product, which has no weights


@dataclass(frozen=True)
class LayerRecord:
    """One layer, or one operand of an attention product.

    Attributes:
        name: in the network.
        kind: Conv2d, Linear or PRODUCT.
        weights: how many.
        weight_bits, act_bits: of weights and of the input, None where they stay in floating point.
        low, high: what the input's codes reach, over all segments and time steps; None in floating point.
        ranges: how many the input has: 1, or one for each of so many time steps.
        own: squared error of the output for full-precision inputs, relative to the output's square, by time step; None where it
            was not measured, is not finite, or the output is 0.
        own_weights: the same of rounded weights alone, with the input in floating point, over all time steps.
        gathered: squared error of the output in the quantized network, by time step.
        beside: bits that are stored beside the weights: scales of groups, a low-rank branch.
    """

    name: str
    kind: str
    weights: int
    weight_bits: int | None
    act_bits: int | None
    low: float | None
    high: float | None
    ranges: int
    own: tuple[float | None, ...] | None = None
    own_weights: float | None = None
    gathered: tuple[float | None, ...] | None = None
    beside: int = 0

    @property
    def stored(self) -> int:
        """Bits of the weights and what is beside them; weights in floating point have 32."""
        return self.weights * (self.weight_bits or FLOAT) + self.beside


@dataclass(frozen=True)
class NetworkRecord:
    """All layers of a quantized network.

    Attributes:
        layers: in the order in which the network runs them where errors were measured, else in that of its modules; operands of
            attention products behind them.
        times: time steps of the errors, the noisiest first; none where errors were not measured.
        inputs: of the network at each time step that errors were measured over.
        prediction: relative squared error of the network's prediction by time step, before any correction.
    """

    layers: tuple[LayerRecord, ...]
    times: tuple[float, ...] = ()
    inputs: int = 0
    prediction: tuple[float | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> NetworkRecord:
        """The inverse. Raises ValueError for anything else."""
        try:
            layers = tuple(LayerRecord(**{**layer, **_lists(layer, ("own", "gathered"))}) for layer in value["layers"])
            record = cls(**{**value, **_lists(value, ("times", "prediction")), "layers": layers})
            record._check()
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no record of layers: {error}") from None
        return record

    @classmethod
    def open(cls, file: Path) -> NetworkRecord | None:
        """What a layers.json says; None where there is none. Raises ValueError where it is damaged."""
        if not file.is_file():
            return None
        try:
            return cls.from_json(read_json(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def _check(self) -> None:
        """Raise ValueError where a value has another type than it should, or lists differ in length."""
        steps, whole = len(self.times), [self.inputs]
        lists: list[Sequence[Any]] = [self.times, self.prediction]
        numbers: list[Any] = []
        for layer in self.layers:
            if not isinstance(layer.name, str) or not isinstance(layer.kind, str):
                raise ValueError("no record of layers: a name is no text")
            counts = (layer.weights, layer.weight_bits, layer.act_bits, layer.ranges, layer.beside)
            whole += [value for value in counts if value is not None]
            numbers += [layer.low, layer.high, layer.own_weights]
            lists += [values for values in (layer.own, layer.gathered) if values is not None]
        if any(type(value) is not int for value in whole):
            raise ValueError("no record of layers: expected whole numbers of weights, bits and ranges")
        if any(len(values) != steps for values in lists):
            raise ValueError(f"no record of layers: expected {steps} errors, one for each time step")
        for value in (*numbers, *(value for values in lists for value in values)):
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                raise ValueError(f"no record of layers: expected numbers, not {str(value)[:40]}")


def mean_of(values: Sequence[float | None] | None) -> float | None:
    """Of the values that are known; None for none."""
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None


def _lists(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the values that are lists, as tuples."""
    return {name: tuple(values[name]) for name in names if isinstance(values.get(name), list)}


@torch.no_grad()
def what_layers_got(network: Network) -> NetworkRecord:
    """Bits and ranges of a quantized network, without errors."""
    quantizers, layers = act_quantizers(network.module), quant_layers(network.module)
    found = []
    for name, layer in layers.items():
        codes = layer.config.weight_codes
        bits, quantizer = codes.bits if codes else None, quantizers.pop(f"{name}.act", None)
        entry = _entry(name, _kind(layer), layer.weight_shape.numel(), bits, quantizer)
        found.append(replace(entry, beside=bits_beside(layer)))
    found += [_entry(name, PRODUCT, 0, None, quantizer) for name, quantizer in quantizers.items()]
    return NetworkRecord(tuple(found))


def _kind(layer: QuantLayer) -> str:
    return "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"


def _entry(name: str, kind: str, weights: int, weight_bits: int | None, quantizer: ActQuantizer | None) -> LayerRecord:
    if quantizer is None or quantizer.codes is None:
        return LayerRecord(name, kind, weights, weight_bits, None, None, None, 1)
    if not quantizer.calibrated:  # the range is found at run time
        return LayerRecord(name, kind, weights, weight_bits, quantizer.codes.bits, None, None, 1)
    low, high = range_of(quantizer.codes, quantizer.scale, quantizer.zero_point)
    ranges = len(quantizer.times) if isinstance(quantizer, StepwiseActQuantizer) else 1
    return LayerRecord(name, kind, weights, weight_bits, quantizer.codes.bits, low, high, ranges)


def range_of(codes: Codes, scale: Tensor, zero_point: Tensor) -> tuple[float | None, float | None]:
    """The lowest and the highest value that codes stand for, of all ranges, as a record holds them."""
    low, high = ((end - zero_point) * scale for end in (codes.qmin, codes.qmax))
    return short(float(low.min())), short(float(high.max()))


def short(value: float, digits: int = DIGITS) -> float | None:
    """With so many digits; None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class _Seen:
    """What a full-precision layer got and gave in one call, (M, n) and (M, O), at some positions (P,)."""

    positions: Tensor
    rows: Tensor
    target: Tensor


class ErrorMeter:
    """Looks at a network in full precision, and measures it against that when it is quantized.

    It takes one call of INPUTS inputs at each of TIMES time steps when it is made, and one more in `record`.

    Args:
        network: in full precision, not prepared.
        data: calibration inputs.
    """

    @torch.no_grad()
    def __init__(self, network: Network, data: CalibrationSet) -> None:
        every = list(dict.fromkeys(sorted(data.t.tolist(), reverse=True)))
        count = min(TIMES, len(every))
        self.times = [every[i * len(every) // count] for i in range(count)]
        self.calls = [data.subset((data.t == t).nonzero()[:INPUTS, 0]) for t in self.times]
        self.seen: list[dict[str, _Seen]] = [{} for _ in self.times]
        layers = {name: layer for name, layer in network.layers().items() if is_matrix(layer)}
        self.predictions = []
        for number, call in enumerate(self.calls):
            seen = self.seen[number]
            handles = [layer.register_forward_hook(self._keep(name, seen)) for name, layer in layers.items()]
            with hooked(handles):
                self.predictions.append(_prediction(network, call).cpu())

    @staticmethod
    def _keep(name: str, seen: dict[str, _Seen]) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        generator = torch.Generator().manual_seed(0)

        def hook(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name not in seen:
                wanted = max(FEWEST, min(MOST, KEPT // layer.weight[0].numel()))
                at = some_positions(layer, args[0], wanted, generator)
                seen[name] = _Seen(at, input_rows(layer, args[0], at).cpu(), output_rows(layer, out, at).cpu())

        return hook

    @torch.no_grad()
    def record(self, network: Network) -> NetworkRecord:
        """Bits, ranges and errors of the same network, quantized."""
        layers = quant_layers(network.module)
        errors = {name: _Errors() for name in layers}
        predicted = []
        for t, call, seen, exact in zip(self.times, self.calls, self.seen, self.predictions, strict=True):
            mine = {name: layers[name] for name in layers if name in seen}
            handles = [layer.register_forward_hook(_compare(errors[name], seen[name])) for name, layer in mine.items()]
            with hooked(handles):
                predicted.append(_relative(_prediction(network, call).cpu(), exact))
            for name, layer in mine.items():
                errors[name].add_own(layer, seen[name], t)
        plain = what_layers_got(network)
        steps = len(self.times)
        found = [errors[layer.name].into(layer, steps) if layer.name in errors else layer for layer in plain.layers]
        order = {name: place for place, name in enumerate(self.seen[0])}
        found.sort(key=lambda layer: (layer.kind == PRODUCT, order.get(layer.name, len(order))))
        return NetworkRecord(tuple(found), tuple(self.times), self.calls[0].passed, tuple(predicted))


class _Errors:
    """The errors of one layer, time step after time step."""

    def __init__(self) -> None:
        self.own: list[float | None] = []
        self.gathered: list[float | None] = []
        self.weights = torch.zeros(2, dtype=torch.float64)

    def add_own(self, layer: QuantLayer, seen: _Seen, t: float) -> None:
        """With full-precision inputs."""
        select_steps(layer, torch.tensor([t]))
        self.own.append(_relative(_output(layer, seen.rows), seen.target))
        stage = layer.act.stage
        try:
            layer.act.set_stage(Stage.FLOAT)
            error = _output(layer, seen.rows) - seen.target
        finally:
            layer.act.set_stage(stage)
        self.weights += torch.stack([error.double().square().sum(), seen.target.double().square().sum()])

    def into(self, layer: LayerRecord, steps: int) -> LayerRecord:
        """The record with the errors, where there are some of all time steps."""
        if len(self.own) != steps or len(self.gathered) != steps:
            return layer
        share = _share(*self.weights.tolist())
        return LayerRecord(**{**asdict(layer), "own": tuple(self.own), "own_weights": share, "gathered": tuple(self.gathered)})


def _compare(errors: _Errors, seen: _Seen) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds what has gathered in a layer's output, at the first call."""
    done: list[bool] = []

    def hook(layer: Any, _: tuple[Tensor, ...], out: Tensor) -> None:
        if not done:
            done.append(True)
            errors.gathered.append(_relative(output_rows(layer, out, seen.positions).cpu(), seen.target))

    return hook


def _output(layer: QuantLayer, rows: Tensor) -> Tensor:
    """The layer's output (M, O) for rows (M, n) of its input, float32 on the CPU."""
    x = rows.view(-1, *layer.weight.shape[1:]).to(layer.weight)
    x = layer.operand(x)
    out = F.conv2d(x, layer.weight, layer.bias).flatten(1) if x.ndim > 2 else F.linear(x, layer.weight, layer.bias)
    if layer.down is not None and layer.up is not None:
        out = out + F.linear(F.linear(rows.to(layer.weight), layer.down.flatten(1)), layer.up)
    return out.float().cpu()


def _prediction(network: Network, data: CalibrationSet) -> Tensor:
    """For a few inputs, all in one call."""
    ((x, t, inputs),) = data.batches(len(data))
    return call_on(network, x, t, inputs, data.constants).float()


def _relative(found: Tensor, exact: Tensor) -> float | None:
    """Squared error over the square of what is exact."""
    return _share(float((found - exact).double().square().sum()), float(exact.double().square().sum()))


def _share(error: float, whole: float) -> float | None:
    """Of squares; None where nothing is there to have a share of, as behind a layer whose weights are 0."""
    return short(error / whole) if whole > 0 else 0.0 if error == 0 else None
