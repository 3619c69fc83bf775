"""One layer more closely: its weights and what they were rounded to, and what the range search compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qncd.quant.affine import SEARCH_RATIOS, searched_errors, symmetric_scale, weight_error
from qncd.quant.layers import QuantLayer

KEPT = 512  # positions of a call whose inputs are kept
MOST = 1 << 14  # positions in all


class LayerKept:
    """The weights of a layer in full precision, and inputs of it at some positions, which its hook keeps.

    Attributes:
        weight: (O, I, ...), a copy.
        rows: (M, C) inputs, so many for each call.
        handle: of the hook.
    """

    def __init__(self, layer: Any) -> None:
        self.weight: Tensor = layer.weight.detach().float().clone()
        self.rows: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)
        self.handle = layer.register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        rows = (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2).float().cpu()
        if sum(map(len, self.rows)) < MOST:
            self.rows.append(rows[torch.randperm(len(rows), generator=self._generator)[:KEPT]])


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
    """What became of one layer.

    Attributes:
        name: of the layer.
        bits: of its weights, None in floating point.
        exact: its weights as they were to be rounded, smoothing multiplied in, (O, n).
        rounded: what they became.
        scale: (O, K) of the grid; None in floating point.
        searches: of the weights' ranges and of the input's, where they are quantized.
    """

    name: str
    bits: int | None
    exact: Tensor
    rounded: Tensor
    scale: Tensor | None
    searches: tuple[Search, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, kept: LayerKept, layer: nn.Module) -> LayerRounding:
        """Of a layer that is quantized by now. Raises ValueError where it is not."""
        if not isinstance(layer, QuantLayer):
            raise ValueError(f"--layer {name}: this recipe does not quantize it")
        smoothing = layer.smoothing
        exact = kept.weight if smoothing is None else kept.weight * smoothing.to(kept.weight)
        searches = [search for search in (_of_weights(layer, exact), _of_inputs(layer, kept)) if search is not None]
        codes = layer.config.weight_codes
        rounded, scale = layer.weight.detach().float().cpu().flatten(1), layer.weight_scale
        return cls(
            name, codes.bits if codes else None, exact.cpu().flatten(1), rounded, None if scale is None else scale.cpu(),
            tuple(searches),
        )  # fmt: skip


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
    codes = layer.act.codes
    if codes is None or not kept.rows:
        return None
    rows = torch.cat(kept.rows)
    if layer.smoothing is not None:
        rows = rows / layer.smoothing.flatten().cpu()
    segments = len(layer.act.segments or (0,))
    widths = (codes.qmax - codes.qmin) * layer.act.scale.cpu().view(-1, segments)  # (S, K): a row for each time step
    errors, chosen = [], []
    for place, part in enumerate(layer.parts() if segments > 1 else [slice(None)]):
        values = rows[:, part].flatten()
        low, high = values.min(), values.max()
        found, scales, _ = searched_errors(values, None, low, high, codes)
        errors.append(found)
        chosen.append(widths[:, place] / ((codes.qmax - codes.qmin) * scales[0]))
    title = f"input, {codes.bits} bits" + (", a range for each time step" if len(widths) > 1 else "")
    return Search(title, _relative(torch.stack(errors, 1)), torch.cat(chosen))


def _relative(errors: Tensor) -> Tensor:
    """(80, n), each column over its first, which is that of the whole range."""
    return (errors / errors[:1].clamp(min=1e-30)).float().cpu()
