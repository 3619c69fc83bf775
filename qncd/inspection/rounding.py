"""One layer more closely: its weights and what they were rounded to, and what the range search compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qncd.inspection.record import Histogram, LayerRounding, Search
from qncd.models.network import Network
from qncd.quant.affine import SEARCH_RATIOS, searched_errors, symmetric_scale, weight_error
from qncd.quant.layers import QuantLayer
from qncd.quant.stepwise import StepwiseActQuantizer

KEPT = 1 << 16  # numbers of its input that are kept for each time step
BINS = 100  # of a histogram
SEARCHED = 1 << 20  # numbers that one search is repeated on, at most


class LayerKept:
    """The weights of a layer in full precision, and inputs of it at some positions, which its hooks keep.

    Attributes:
        weight: (O, I, ...), a copy.
        rows: (M, C) inputs, call after call, by the time step.
        handles: of the hooks.
    """

    def __init__(self, network: Network, name: str) -> None:
        layer: Any = network.module.get_submodule(name)
        self.weight: Tensor = layer.weight.detach().float().clone()
        self.rows: dict[float, list[Tensor]] = {}
        self._network, self._time = network, 0.0
        self._generator = torch.Generator().manual_seed(0)
        self.handles = [
            network.module.register_forward_pre_hook(self._at, with_kwargs=True),
            layer.register_forward_pre_hook(self._keep),
        ]

    def _at(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._time = float(self._network.times_of(args, kwargs).flatten()[0])

    def _keep(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        rows = (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)
        kept = self.rows.setdefault(self._time, [])
        free = max(1, KEPT // rows.shape[1]) - sum(map(len, kept))
        if free > 0:
            kept.append(rows[torch.randperm(len(rows), generator=self._generator)[:free]].float().cpu())


@torch.no_grad()
def rounding_of(name: str, kept: LayerKept, layer: nn.Module) -> LayerRounding:
    """What became of a layer that is quantized by now. Raises ValueError where it is not."""
    if not isinstance(layer, QuantLayer):
        raise ValueError(f"--layer {name}: this recipe does not quantize it")
    smoothing, codes = layer.smoothing, layer.config.weight_codes
    exact = kept.weight if smoothing is None else kept.weight * smoothing.to(kept.weight)
    rounded = layer.weight.detach().float()
    share = float((rounded - exact).square().sum() / exact.square().sum().clamp(min=1e-30))
    searches = [search for search in (_of_weights(layer, exact), _of_inputs(layer, kept)) if search is not None]
    steps = None
    if codes is not None:
        scale = layer.expanded_scale()
        exact, rounded = exact / scale, rounded / scale
        steps = torch.stack(rounded.round().unique(return_counts=True)).cpu()
    low, high = float(min(exact.min(), rounded.min())) - 0.5, float(max(exact.max(), rounded.max())) + 0.5
    among, errors = Histogram.of(exact.cpu(), BINS, low, high), Histogram.of((rounded - exact).cpu(), BINS)
    return LayerRounding(name, codes.bits if codes else None, among, errors, steps, share, tuple(searches))


def _of_weights(layer: QuantLayer, exact: Tensor) -> Search | None:
    codes = layer.config.weight_codes
    if codes is None or layer.weight_scale is None:
        return None
    errors, chosen = [], []
    for place, part in enumerate(layer.parts()):
        rows = exact[:, part].flatten(1)
        peak = rows.abs().amax(1, keepdim=True)
        tried = [weight_error(rows, symmetric_scale(peak * ratio, codes), codes) for ratio in SEARCH_RATIOS]
        errors.append(torch.stack(tried)[..., 0])  # (80, O)
        chosen.append(layer.weight_scale[:, place] / symmetric_scale(peak[:, 0], codes))
    return Search(f"weights, {codes.bits} bits, by output channel", _relative(torch.cat(errors, 1)), torch.cat(chosen).cpu())


def _of_inputs(layer: QuantLayer, kept: LayerKept) -> Search | None:
    """A search for each segment of channels, and for each time step that has a range of its own."""
    act, codes = layer.act, layer.act.codes
    if codes is None or not kept.rows:
        return None
    stepwise = isinstance(act, StepwiseActQuantizer)
    times = [[float(t)] for t in act.times] if isinstance(act, StepwiseActQuantizer) else [list(kept.rows)]
    scales = act.scale.cpu().view(len(times), -1)  # (S, K)
    errors, chosen = [], []
    for row, seen in enumerate(times):
        found = [rows for t in seen for rows in kept.rows.get(t, [])]
        inputs = torch.cat(found) if found else torch.empty(0, layer.weight.shape[1])
        if layer.smoothing is not None:
            inputs = inputs / layer.smoothing.flatten().cpu()
        for segment, part in enumerate(inputs.split(act.segments, 1) if act.segments else [inputs]):
            values = part.flatten()
            values = values[:: max(1, len(values) // SEARCHED)]
            if len(values):
                found_errors, whole, _ = searched_errors(values, None, values.min(), values.max(), codes)
                errors.append(found_errors)
                chosen.append(scales[row, segment] / whole[0])
    if not errors:
        return None
    title = f"input, {codes.bits} bits" + (", by time step" if stepwise else "")
    return Search(title, _relative(torch.stack(errors, 1)), torch.stack(chosen))


def _relative(errors: Tensor) -> Tensor:
    """(80, n), each column over its first, which is that of the whole range."""
    return (errors / errors[:1].clamp(min=1e-30)).float().cpu()
