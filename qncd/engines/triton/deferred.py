"""Tensors that are computed when somebody needs them: on their own, or by the kernel of a layer, while it rounds them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qncd.engines.triton import kernels
from qncd.engines.triton.operands import Grid, Norm, Rounded, TokenGrid, padded_channels

T = TypeVar("T")
SMALL = 1 << 16  # numbers in a tensor of which codes are kept until the end of a call
RECENT = 2  # larger tensors of which they are kept: what a layer got, and its rotation


class Work(Protocol):
    """What a deferred tensor is computed by."""

    def run(self, dtype: torch.dtype) -> Tensor:
        """The tensor."""

    def codes(self, grid: Grid | TokenGrid) -> Rounded | None:
        """Its codes; None where only a tensor can be rounded."""


class Product(Protocol):
    """A layer that multiplies codes, as `Multiplied` calls it."""

    def product(self, codes: list[Rounded], **behind: Any) -> Tensor:
        """Codes of each segment -> (N, H, W, O); `behind` is what `kernels.convolve` does last."""


class Deferred(Tensor):
    """A tensor of which only the shape, dtype and device are there, until somebody needs it.

    Attributes:
        work: what computes it.
        value: that, once somebody needed it.
        taken: a product that another deferred tensor goes on with. Whoever comes next needs its value.
        shared: what layers that get it have in common, such as its codes, by key.
    """

    work: Work
    value: Tensor | None
    taken: bool
    shared: dict[Any, Any]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, work: Work, shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
    ) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(cls, torch.Size(shape), strides=strides, dtype=dtype, device=device)
        made.work, made.value, made.taken, made.shared = work, None, False, {}
        if (call := CALL.get()) is not None:
            call.pending.append(weakref.ref(made))
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def taken_product(self) -> Multiplied | None:
        """Its product, for one that goes on with it; None where there is none or another did before."""
        if self.value is not None or self.taken or not isinstance(self.work, Multiplied):
            return None
        self.taken = True
        return self.work


class Call:
    """What one call of a network has put off, and what its layers share.

    Attributes:
        pending: every deferred tensor that is still there.
        memo: what `once` computed, by key.
        recent: the last tensors that layers got, each with what they share of it.
    """

    def __init__(self) -> None:
        self.pending: list[weakref.ref[Deferred]] = []
        self.memo: dict[Any, tuple[Any, Any]] = {}
        self.recent: list[tuple[Tensor, dict[Any, Any]]] = []

    def before_writing(self, values: Iterable[Any]) -> None:
        """Compute what waits for tensors that are about to change, and forget what was made of them."""
        storages = _storages(values)
        for made in [made for reference in self.pending if (made := reference()) is not None]:
            if made.value is None and not storages.isdisjoint(_storages(vars(made.work).values())):
                plain(made)
            elif not storages.isdisjoint(_storages([made])):
                made.shared.clear()
        self.recent = [(source, shared) for source, shared in self.recent if storages.isdisjoint(_storages([source]))]
        self.memo = {key: kept for key, kept in self.memo.items() if storages.isdisjoint(_storages(kept[:1]))}

    def once(self, key: Any, argument: Any, make: Callable[[], T]) -> T:
        """What `make` gives, computed once a call for each key and argument."""
        key = (key, id(argument))
        if key not in self.memo:
            self.memo[key] = argument, make()  # the argument is kept, so that no other gets its id
        result: T = self.memo[key][1]
        return result

    def share(self, x: Tensor, key: Any, make: Callable[[], T]) -> T:
        """What `make` makes of x: once for layers that follow one another, and once a call where x is small."""
        if x.numel() <= SMALL:
            return self.once(key, x, make)
        known = x.shared if isinstance(x, Deferred) else next((shared for source, shared in self.recent if source is x), None)
        if known is None:
            known = {}
            self.recent = [*self.recent[1 - RECENT :], (x, known)]
        if key not in known:
            known[key] = make()
        result: T = known[key]
        return result


CALL: ContextVar[Call | None] = ContextVar("call", default=None)  # the one that is under way


def _storages(values: Iterable[Any]) -> set[int]:
    """Of the tensors among these values; a deferred one that was not computed has none."""
    there = (value.value if isinstance(value, Deferred) else value for value in values)
    return {tensor.untyped_storage()._cdata for tensor in there if isinstance(tensor, Tensor)}


def plain(x: Any) -> Any:
    """A deferred tensor's value; anything else as it is."""
    if not isinstance(x, Deferred):
        return x
    if x.value is None:
        x.value = x.work.run(x.dtype)
    return x.value


def deferred(
    work: Work, shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Tensor:
    """What `work` computes, put off within a call; without `strides` it is contiguous."""
    return work.run(dtype) if CALL.get() is None else Deferred(work, shape, dtype, device, strides)


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as kernels take it, (N, H, W, C): tokens (N, L, C) by image, what has fewer axes side by side."""
    rows = x if x.ndim == 4 else x[:, None] if x.ndim == 3 else x.reshape(1, 1, -1, x.shape[-1])
    return rows.contiguous()


def _in_memory(x: Tensor) -> list[int]:
    """The axes of x (..., C) as they lie in memory, C last."""
    strides = x.stride()
    return [*sorted(range(x.ndim - 1), key=lambda axis: -strides[axis]), x.ndim - 1]


def put_off_norm(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """The norm of x (..., C), with axes in memory as x has them."""
    x = plain(x)
    order, strides, step = _in_memory(x), [0] * x.ndim, 1
    for axis in reversed(order):
        strides[axis], step = step, step * x.shape[axis]
    return deferred(Normed(x, norm), x.shape, dtype, x.device, strides)


@dataclass(frozen=True)
class Normed:
    """norm(source) * factor + term of tokens (N, L, C), or the norm alone of (..., C); factor and term are (N, C)."""

    source: Tensor
    norm: Norm
    factor: Tensor | None = None
    term: Tensor | None = None

    def run(self, dtype: torch.dtype) -> Tensor:
        if self.factor is not None or self.term is not None:
            return kernels.normed(rows_of(self.source), self.norm, None, self.factor, self.term, dtype).view(self.source.shape)
        order = _in_memory(self.source)  # heads in front of tokens stay behind them there
        dense = self.source.permute(order)
        back = sorted(range(len(order)), key=order.__getitem__)
        return kernels.normed(rows_of(dense), self.norm, dtype=dtype).view(dense.shape).permute(back)

    def codes(self, grid: Grid | TokenGrid) -> Rounded | None:
        rows = rows_of(self.source)
        if isinstance(grid, TokenGrid):
            return kernels.token_codes(rows, grid, self.norm, self.factor, self.term)
        return Rounded(kernels.normed(rows, self.norm, grid, self.factor, self.term), grid)


@dataclass(frozen=True)
class Scaled:
    """source (N, H, W, C) * factor + term, (N, C) each, as group norms do."""

    source: Tensor
    affine: tuple[Tensor, Tensor]

    def run(self, dtype: torch.dtype) -> Tensor:
        return kernels.pointwise(self.source, affine=self.affine, dtype=dtype)

    def codes(self, grid: Grid | TokenGrid) -> Rounded | None:
        return None if isinstance(grid, TokenGrid) else Rounded(kernels.pointwise(self.source, grid, affine=self.affine), grid)


@dataclass(frozen=True)
class Multiplied:
    """act(product of codes * gate + residual), in `shape`."""

    layer: Product
    factors: list[Rounded]
    shape: torch.Size
    gate: Tensor | None = None
    residual: Tensor | None = None
    act: str = ""

    def run(self, dtype: torch.dtype) -> Tensor:
        return self._product(dtype=dtype).view(self.shape)

    def codes(self, grid: Grid | TokenGrid) -> Rounded | None:
        if isinstance(grid, TokenGrid) or self.shape[-1] != padded_channels(self.shape[-1]):
            return None  # no program sees a whole row, or the rest of it
        return Rounded(self._product(dtype=torch.int8, out_grid=grid), grid)

    def _product(self, **behind: Any) -> Tensor:
        residual = None if self.residual is None else rows_of(self.residual)
        return self.layer.product(self.factors, gate=self.gate, residual=residual, act=self.act, **behind)


@dataclass(frozen=True)
class Activated:
    """An activation of a tensor (..., C)."""

    source: Tensor
    act: str

    def run(self, dtype: torch.dtype) -> Tensor:
        return kernels.pointwise(rows_of(self.source), act=self.act, dtype=dtype).view(self.source.shape)

    def codes(self, grid: Grid | TokenGrid) -> Rounded | None:
        rows = rows_of(self.source)
        if isinstance(grid, TokenGrid):
            return kernels.token_codes(rows, grid, act=self.act)
        return Rounded(kernels.pointwise(rows, grid, act=self.act), grid)


def share(x: Tensor, key: Any, make: Callable[[], T]) -> T:
    """As `Call.share`; outside a call, what is made."""
    return make() if (call := CALL.get()) is None else call.share(x, key, make)


def codes_of(x: Tensor, grid: Grid | TokenGrid) -> Rounded:
    """Codes of x (..., C), which may be deferred."""

    def make() -> Rounded:
        work = _work_of(x)
        found = None if work is None else work.codes(grid)
        if found is not None:
            return found
        rows = rows_of(plain(x))
        return kernels.token_codes(rows, grid) if isinstance(grid, TokenGrid) else Rounded(kernels.pointwise(rows, grid), grid)

    return share(x, grid, make)


def _work_of(x: Tensor) -> Work | None:
    """What rounds x by the way, in a product of its own too; None where x is there or has to be."""
    if not isinstance(x, Deferred) or x.value is not None:
        return None
    if isinstance(x.work, Multiplied):  # as it is, more than one layer gets it most likely, such as a caption's tokens
        return x.taken_product() if x.work.act else None
    return x.work
