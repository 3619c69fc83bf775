"""The integer grids of a network's activations: equal ones are one object, and a call says at which time step they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qncd.engines.network import DYNAMIC_ATTENTION
from qncd.engines.triton.operands import Grid, TokenGrid
from qncd.quant.affine import IntegerRange
from qncd.quant.attention import AttentionProducts
from qncd.quant.dynamic import DynamicActQuantizer
from qncd.quant.quantizers import ActQuantizer
from qncd.quant.stepwise import StepwiseActQuantizer


class Grids:
    """Makes grids, and keeps which of the time steps that have ranges a call is at, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tables: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # known time steps -> the same, and a row of them
        self.made: dict[Any, Grid] = {}
        self.tokens: dict[tuple[IntegerRange, Tensor | None], TokenGrid] = {}
        self.kept: dict[tuple[float, ...], Tensor] = {}

    def row(self, known: tuple[int, ...]) -> Tensor:
        """() int32, which `select` sets."""
        if known not in self.tables:
            times = torch.tensor(known, device=self.device)
            self.tables[known] = times, torch.zeros((), dtype=torch.int32, device=self.device)
        return self.tables[known][1]

    def select(self, timesteps: Tensor) -> None:
        """The step nearest to the first of `timesteps` (N,)."""
        for times, row in self.tables.values():
            if len(times) > 1:
                row.copy_((times - timesteps[0]).abs().argmin())

    def factors(self, values: Tensor | None) -> Tensor | None:
        """One tensor for all with these numbers."""
        return None if values is None else self.kept.setdefault(tuple(values.flatten().tolist()), values)

    def make(
        self, name: str, quantizer: ActQuantizer, widest: int, smoothing: Sequence[Tensor | None] = (None,)
    ) -> Sequence[Grid | TokenGrid]:
        """The grid of each segment, whose channels are divided by `smoothing` (C,) first.

        Raises:
            ValueError: activations in floating point or wider than `widest` bits, or ranges without a common whole zero point.
        """
        codes = quantizer.codes
        if not isinstance(codes, IntegerRange):
            raise ValueError(
                f"{name}: its activations are in floating point; backend triton runs integers only: pass --act_bit 8"
            )
        if codes.bits > widest:
            raise ValueError(f"{name}: activations of {codes.bits} bits; backend triton has kernels for up to {widest}")
        if isinstance(quantizer, DynamicActQuantizer):
            return [self._tokens(codes, self.factors(factors)) for factors in smoothing]
        known = quantizer.known if isinstance(quantizer, StepwiseActQuantizer) else (0,)
        scales, zeros = (v.view(len(known), -1) for v in (quantizer.scale.float(), quantizer.zero_point))
        grids: list[Grid] = []
        for segment, factors in enumerate(smoothing):
            zero = int(zeros[0, segment])
            if not bool((zeros[:, segment] == zero).all()) or not codes.qmin <= zero <= codes.qmax:
                raise ValueError(f"{name}: a range without 0 or with a zero point for each time step: calibrate anew")
            stored = zero - codes.qmin - 128 if codes.bits == 8 else 0
            low, high, scale = codes.qmin - zero, codes.qmax - zero, scales[:, segment].contiguous()
            numbers = (known, low, high, stored, *(None if v is None else tuple(v.tolist()) for v in (scale, factors)))
            if numbers not in self.made:
                self.made[numbers] = Grid(scale, self.row(known), low, high, stored, factors)
            grids.append(self.made[numbers])
        return grids

    def _tokens(self, codes: IntegerRange, factors: Tensor | None) -> TokenGrid:
        """One for all that are rounded alike; `factors` are of `self.factors`."""
        return self.tokens.setdefault((codes, factors), TokenGrid(codes, factors))

    def of_attention(self, name: str, products: AttentionProducts) -> tuple[list[Grid], Grid]:
        """The grids of q, k and v, and that of the softmax. Raises ValueError naming what has no kernel."""
        quantizers = (("q", products.q), ("k", products.k), ("v", products.v))
        if isinstance(products.q, DynamicActQuantizer):
            raise ValueError(f"{name}: {DYNAMIC_ATTENTION}")
        grids = [cast(Grid, self.make(f"{name}.{part}", quantizer, 8)[0]) for part, quantizer in quantizers]
        softmax = cast(Grid, self.make(f"{name}.softmax", products.softmax, 16)[0])
        if softmax.low != 0:
            raise ValueError(f"{name}.softmax: a zero point that is not 0 has no kernel in backend triton")
        return grids, softmax
