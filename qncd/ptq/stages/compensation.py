"""Weights of all layers that make up for their own rounding and for that of their inputs, from one pass of the full-precision
network (`QuantConfig.gptq`).

Each layer is looked at on the full-precision network's own activations: the quantizer in front of it says what they become,
and second moments of both are all that `solve_rounding` needs. The layers don't depend on one another, so there is no
order to keep and no prefix to quantize.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qncd.models.network import Network
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.heap import trim_heap
from qncd.ptq.observing import hooked, named, run_over
from qncd.ptq.positions import input_rows, is_matrix, some_positions
from qncd.quant.gptq import DAMPING, solve_rounding
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import Stage
from qncd.recipe import Recipe

INPUTS = 320  # of the calibration set, evenly spread, that the moments are taken over
ROWS = 8  # wanted for each input of a layer, where the layer has so many positions
MIN_POSITIONS = 128  # of each image, where there are so many
GRIDS = (0.7, 0.76, 0.82, 0.88, 0.94, 1.0, 1.08)  # of the scales that the range search has found, those that are tried
PRECISION = 0.1 * DAMPING  # of the variance of a layer's inputs: what rounding errors of their moments may come to
MEMORY = 4 << 30  # bytes of moments at a time where the device does not say what it has
PART = 1024  # rows of a matrix that are centred together


class Moments:
    """First and second moments of a layer's rounded inputs x_q and exact ones x_f, n of them.

    Args:
        exactly: sum in float64 about the first inputs instead of in float32 about 0, which loses what is left of nearly constant
            inputs when their means are taken out, and has no room for squares beyond 1e38.

    Attributes:
        rounded, exact: (n,), the sums.
        gram, cross: (n, n), of x_q x_q^T and x_f x_q^T.
        squares: of the outputs on x_f of a weight, where `add` gets one.
    """

    def __init__(self, inputs: int, device: torch.device, exactly: bool = False) -> None:
        self.count = 0
        self.exactly = exactly
        self.squares = 0.0
        self.origin: tuple[Tensor, Tensor] | None = None  # (n,) of x_q and x_f, what is summed about
        self.rounded, self.exact = torch.zeros(2, inputs, dtype=torch.float64, device=device)
        dtype = torch.float64 if exactly else torch.float32
        self.gram, self.cross = torch.zeros(2, inputs, inputs, dtype=dtype, device=device)

    def add(self, rounded: Tensor, exact: Tensor, weight: Tensor | None = None) -> None:
        """Take in (M, n) rows of both, and with a weight (O, n) its outputs on `exact`."""
        self.count += len(rounded)
        if weight is not None:
            self.squares += float((exact @ weight.T.to(exact)).double().square().sum())
        if self.exactly:
            rounded, exact = rounded.double(), exact.double()
            self.origin = self.origin or (rounded.mean(0), exact.mean(0))
            rounded, exact = rounded - self.origin[0], exact - self.origin[1]
        self.rounded += rounded.sum(0)
        self.exact += exact.sum(0)
        self.gram.addmm_(rounded.T, rounded)
        self.cross.addmm_(exact.T, rounded)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(gram, cross, mean of x_q, mean of x_f), the first two about the means; float64 where that is affordable.

        The sums are used up: they become what is returned, as two of them may be all that there is memory for.
        """
        dtype = torch.float64 if self.exactly or len(self.gram) <= 4096 else torch.float32
        rounded, exact = self.rounded / self.count, self.exact / self.count
        gram, cross = self.gram.to(dtype), self.cross.to(dtype)
        for matrix, left in ((gram, rounded), (cross, exact)):
            for rows, values in zip(matrix.split(PART), left.split(PART), strict=True):
                rows.div_(self.count).sub_(torch.outer(values, rounded).to(dtype))
        if self.origin is not None:
            rounded, exact = rounded + self.origin[0], exact + self.origin[1]
        return gram, cross, rounded, exact

    def lost(self) -> bool:
        """Whether float32 has left too little of the second moments about the means: to be summed exactly."""
        if self.exactly:
            return False
        rounded, exact = self.rounded / self.count, self.exact / self.count
        squares = self.gram.diagonal().double() / self.count
        rounding = torch.finfo(torch.float32).eps * torch.maximum(squares, exact.square()).max()
        varies = (squares - rounded.square()).clamp(min=0).mean()
        return not bool(rounding <= PRECISION * varies)  # NaN and infinity are lost too


@dataclass(frozen=True)
class Solution:
    """A layer's weights on their grid.

    Attributes:
        codes: packed, int8, shape of the weight.
        scale: (O, K).
        shift: (O,), what the bias gains where there may be one.
        misfit: mean square error of the layer's output less the exact output's mean square, both about their means where
            they have a bias: for comparing solutions of one layer with one another; 0 where that is not asked for. With a
            low-rank branch, which takes a part of the output that depends on the branch, the mean square error itself.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor
    misfit: float


@torch.no_grad()
def compensate_(network: Network, data: CalibrationSet, batch_size: int = 32, packed: bool = False) -> None:
    """Put every layer's weights on their grid and its mean error into its bias, in place; ranges are known, weights still float.

    Args:
        packed: keep the codes of the weights alone.

    Raises:
        ValueError: a layer's inputs hold NaN or infinity, or its weights cannot be solved for; the layer is named.
    """
    layers = quant_layers(network.module)
    solved = dict(solutions(network, data.spread(INPUTS), batch_size))  # all of them: every pass is one in full precision
    for name, solution in solved.items():
        layers[name].set_weight_codes(solution.codes, solution.scale)
        named(name, functools.partial(layers[name].shift_bias_, solution.shift))
        if packed:
            layers[name].pack_weight_()
        trim_heap()


@torch.no_grad()
def solutions(
    network: Network,
    data: CalibrationSet,
    batch_size: int,
    rows: int = ROWS,
    grids: Sequence[float] = GRIDS,
    judged: bool = False,
) -> Iterator[tuple[str, Solution]]:
    """What `compensate_` puts into each layer, with its name, as it is found; the network has to stay as it is until all are.

    Takes memory for the moments of as many layers at once as there is room for, and a pass over the inputs for each group. Layers
    whose moments float32 does not hold, those of nearly constant or very large inputs, are looked at once more in float64.

    Args:
        data: the inputs that the moments are taken over, all of them.
        rows: of moments for each input of a layer, where the layer has so many positions.
        grids: factors of the weights' scales to try; none of them: weights rounded to nearest.
        judged: with their misfits.
    """
    # Layers that are no matrix are rounded to nearest.
    layers = {
        name: layer
        for name, layer in quant_layers(network.module).items()
        if layer.config.weight_codes is not None and is_matrix(layer)
    }
    for exactly in (False, True):
        again: dict[str, QuantLayer] = {}
        for group in _groups(layers, _memory(network.device), exactly):
            moments: dict[str, Moments] = {}  # in the order in which the layers run: the first to see NaN is the one to name
            with _watching(group, moments, data.passed, rows, exactly, judged):
                run_over(network, data, batch_size)
            for name in list(moments):
                found = moments.pop(name)
                if found.lost():
                    again[name] = layers[name]
                else:
                    yield name, named(name, functools.partial(_solved, layers[name], found, grids, judged))
                    trim_heap()
        layers = again


def _memory(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] * 0.5) if device.type == "cuda" else MEMORY


def _groups(layers: Mapping[str, QuantLayer], memory: int, exactly: bool) -> Iterator[dict[str, QuantLayer]]:
    """Layers in their order, as many at a time as have room for two matrices each; one always has."""
    group: dict[str, QuantLayer] = {}
    taken = 0
    for name, layer in layers.items():
        need = (16 if exactly else 8) * layer.weight[0].numel() ** 2
        if group and taken + need > memory:
            yield group
            group, taken = {}, 0
        group[name], taken = layer, taken + need
    if group:
        yield group


@contextmanager
def _watching(
    layers: Mapping[str, QuantLayer], moments: dict[str, Moments], inputs: int, rows: int, exactly: bool, judged: bool
) -> Iterator[None]:
    """Add what each layer sees to its moments, as it comes and as its quantizer leaves it; `rows` for each of its inputs.

    Beside a low-rank branch, the outputs that solutions are judged by are what the branch leaves: they are added as well.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        generator = torch.Generator().manual_seed(0)  # its own: what a layer sees does not depend on who else is watched

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            layer, stage = layers[name], layers[name].act.stage
            size = layer.weight[0].numel()
            exact = layer.operand(args[0])
            try:
                layer.act.set_stage(Stage.QUANTIZE)
                rounded = layer.operand(args[0])
            finally:
                layer.act.set_stage(stage)
            take = some_positions(layer, exact, max(MIN_POSITIONS, -(-rows * size // inputs)), generator)
            if name not in moments:
                moments[name] = Moments(size, exact.device, exactly)
            outputs = layer.weight.flatten(1) if judged and layer.up is not None else None
            moments[name].add(input_rows(layer, rounded, take), input_rows(layer, exact, take), outputs)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with hooked(handles):
        yield


def _solved(layer: QuantLayer, moments: Moments, grids: Sequence[float], judged: bool) -> Solution:
    squares = moments.squares / moments.count
    gram, cross, rounded_mean, exact_mean = moments.centred()
    if not layer.takes_shift:  # about 0: there is no bias for the mean error to go into
        gram.add_(torch.outer(rounded_mean, rounded_mean).to(gram))
        cross.add_(torch.outer(exact_mean, rounded_mean).to(cross))
    codes = layer.config.weight_codes
    assert codes is not None and layer.weight_scale is not None
    weight = layer.weight.flatten(1)
    scale = layer.expanded_scale().expand_as(layer.weight).flatten(1)
    if grids:
        whole, factors = solve_rounding(weight, scale, codes, gram, cross, grids=grids, stored=layer.stored_scale)
    else:
        whole, factors = layer.nearest_codes().flatten(1), torch.ones(len(weight), device=weight.device)
    steps = layer.stored_scale(scale.double() * factors.double()[:, None])
    solved = (codes.unpack(whole).double() * steps).to(weight.dtype)
    shift = weight.double() @ exact_mean - solved.double() @ rounded_mean
    misfit = 0.0
    if judged:
        exact, rounded = weight.to(gram), solved.to(gram)
        misfit = float(((rounded @ gram - 2 * exact @ cross) * rounded).sum())
        if layer.up is not None:
            misfit += squares - (float((exact @ exact_mean.to(exact)).square().sum()) if layer.takes_shift else 0.0)
    chosen = layer.stored_scale(layer.weight_scale * factors[:, None].to(scale))
    return Solution(whole.view_as(layer.weight), chosen, shift, misfit)


class Compensation:
    """The stage: GPTQ, once all ranges are known."""

    title = "rounding weights (GPTQ)"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.gptq

    def run(self, context: Context) -> None:
        compensate_(context.network, context.data, context.batch_size, context.packed)
