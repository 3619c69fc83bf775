"""What an activation looked like over the whole calibration set: extremes, moving extremes, or a histogram."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from qncd.quant.affine import Codes, affine_qparams, ordinary_factor, search_qparams


class Observer(Protocol):
    """Sees every batch, then gives quantization parameters."""

    @property
    def seen(self) -> bool:
        """Whether there was a batch."""

    def observe(self, x: Tensor, more: bool = False) -> None:
        """Take in one batch, any shape, or a part of one: `more` of the same batch follows."""

    def qparams(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Scale and zero point, 0-dim."""


class MinMaxObserver:
    """Extremes over everything seen (`max` ranges)."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.finite = True

    @property
    def seen(self) -> bool:
        return self.low is not None

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The range seen. Raises ValueError where nothing was, or NaN or infinity."""
        if self.low is None or self.high is None:
            raise ValueError("an activation quantizer saw no calibration data")
        if not self.finite:
            raise ValueError("an activation is NaN or infinite while calibrating")
        return self.low, self.high

    def observe(self, x: Tensor, more: bool = False) -> None:
        low, high = (v.float() for v in torch.aminmax(x.detach()))
        if not (torch.isfinite(low) and torch.isfinite(high)):
            self.finite = False  # said by qparams, whose caller knows the layer's name
        self._update(low, high, more)

    def _update(self, low: Tensor, high: Tensor, more: bool) -> None:
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def qparams(self, codes: Codes) -> tuple[Tensor, Tensor]:
        return affine_qparams(*self.extremes(), codes)


class RunningObserver(MinMaxObserver):
    """Exponential moving average of the extremes of each batch (`running` ranges).

    Momentum 0.95 as in Q-Diffusion's `--running_stat`: m = 0.95*m + 0.05*batch; the first batch starts it.
    """

    def __init__(self, momentum: float = 0.95) -> None:
        super().__init__()
        self.momentum = momentum
        self._batch: tuple[Tensor, Tensor] | None = None  # extremes of the parts of a batch that is not complete

    def _update(self, low: Tensor, high: Tensor, more: bool) -> None:
        if self._batch is not None:
            low, high = torch.minimum(self._batch[0], low), torch.maximum(self._batch[1], high)
        self._batch = (low, high) if more else None
        if more:
            return
        keep = self.momentum
        self.low = low if self.low is None else keep * self.low + (1 - keep) * low
        self.high = high if self.high is None else keep * self.high + (1 - keep) * high


class HistogramObserver(MinMaxObserver):
    """A histogram of everything seen, for the `mse` search; one pass, a fixed few KiB.

    Bins cover [-limit, limit]. When a batch reaches past the limit, the limit doubles and bins merge in pairs, which
    keeps every count exact. 8192 bins leave at least 8 bins to one step of an 8-bit grid.
    """

    def __init__(self, bins: int = 8192) -> None:
        super().__init__()
        self.bins = bins
        self.limit = 0.0
        self.counts: Tensor | None = None

    def observe(self, x: Tensor, more: bool = False) -> None:
        super().observe(x, more)
        if not self.finite:
            return
        assert self.low is not None and self.high is not None
        needed = max(-float(self.low), float(self.high))
        if needed == 0:
            needed = 1e-6
        if self.counts is None:
            self.limit = 2.0 ** math.ceil(math.log2(needed))  # a power of two: the bins do not depend on the first batch
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device=x.device)
        while self.limit < needed:
            self._double()
        factor = float(ordinary_factor(torch.tensor(needed)))  # the library's own arithmetic is in float32
        for part in x.detach().flatten().split(1 << 20):  # and its working memory grows with its input
            values = part.float() * factor if factor != 1 else part.float()
            self.counts += torch.histc(values, self.bins, -self.limit * factor, self.limit * factor).double()

    def _double(self) -> None:
        assert self.counts is not None
        merged = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[self.bins // 4 : self.bins // 4 + self.bins // 2] = merged
        self.limit *= 2

    def qparams(self, codes: Codes) -> tuple[Tensor, Tensor]:
        low, high = self.extremes()
        if codes.bits > 8:  # finer than a bin: clipping can't win there, and the histogram could not tell
            return affine_qparams(low, high, codes)
        assert self.counts is not None
        width = 2 * self.limit / self.bins
        places = torch.arange(self.bins, device=self.counts.device, dtype=torch.float64) + 0.5
        centres = places * width - self.limit  # in float64: the limit may be 2^128
        filled = self.counts > 0
        return search_qparams(centres[filled].float(), self.counts[filled], low, high, codes)


_OBSERVERS = {"max": MinMaxObserver, "running": RunningObserver, "mse": HistogramObserver}


def make_observer(act_range: str) -> Observer:
    """The observer of an activation range: "max", "running" or "mse"."""
    return _OBSERVERS[act_range]()
