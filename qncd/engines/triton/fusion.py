"""Norms, activations, gates and sums between the products of a network, computed by the kernels of the products.

Blocks of transformers are many classes, which all compute norm(x) * (1 + scale) + shift in front of linear layers, activations
between two, and gate * y + x behind them. So blocks stay as they are, and their operations are put off: within `Fusing`, a norm
gives a `Deferred` tensor, which remembers the norm, and so do what it is multiplied by, an activation, and a linear layer. A
layer that gets one computes all of it while it rounds; any other operation gets the tensor computed. What this takes in Python
is spent once, when a call is recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from qncd.engines.triton.deferred import CALL, Activated, Call, Deferred, Multiplied, Normed, Work, deferred, plain, put_off_norm
from qncd.engines.triton.operands import Norm

aten = torch.ops.aten


class Fusing(TorchDispatchMode):
    """One call of a network, within which operations are put off."""

    def __init__(self) -> None:
        super().__init__()
        self.call = Call()

    def __enter__(self) -> Any:
        self.token = CALL.set(self.call)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        CALL.reset(self.token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        result = None if rule is None else rule(*args, **kwargs)
        if result is not None:
            return result
        if func._schema.is_mutable:
            self.call.before_writing(_written(func, args, kwargs))
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operation writes to."""
    names = [argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    return [given.get(name) for name in names]


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    if len(shape) != 1 or not x.is_floating_point():
        return None
    return put_off_norm(x, Norm(eps, weight, bias), x.dtype)


def _native_layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    out = _layer_norm(x, shape, weight, bias, eps)
    return None if out is None else (out, plain(x).new_empty(0), plain(x).new_empty(0))  # the others are for gradients


def _multiply(a: Any, b: Any) -> Any:
    return _first(_scaled, a, b)


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    return _first(_summed, a, b) if alpha == 1 else None


def _first(rule: Callable[[Deferred, Tensor], Tensor | None], a: Any, b: Any) -> Any:
    """The rule for a deferred one of two tensors and the other."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Deferred) and one.value is None and isinstance(other, Tensor) and other.is_floating_point():
            result = rule(one, other)
            if result is not None:
                return result
    return None


def _scaled(x: Deferred, other: Tensor) -> Tensor | None:
    rows = _for_each_image(other, x.shape)
    if rows is None:
        return None
    work = x.work
    if isinstance(work, Normed):
        factor = rows if work.factor is None else work.factor * rows
        term = None if work.term is None else work.term * rows
        return _like(x, replace(work, factor=factor, term=term), other)
    if isinstance(work, Multiplied) and work.gate is None and work.residual is None and not work.act:
        product = x.taken_product()
        return None if product is None else _like(x, replace(product, gate=rows), other)
    return None


def _summed(x: Deferred, other: Tensor) -> Tensor | None:
    work = x.work
    if isinstance(work, Normed):
        rows = _for_each_image(other, x.shape)
        if rows is None:
            return None
        return _like(x, replace(work, term=rows if work.term is None else work.term + rows), other)
    if isinstance(work, Multiplied) and work.residual is None and not work.act and other.shape == x.shape:
        product = x.taken_product()
        return None if product is None else _like(x, replace(product, residual=plain(other)), other)
    return None


def _activate(act: str, x: Tensor) -> Any:
    if not x.is_floating_point() or x.ndim not in (2, 3):  # pixels, which convolutions read, lie otherwise in memory
        return None
    if isinstance(x, Deferred) and isinstance(x.work, Multiplied) and not x.work.act:
        product = x.taken_product()
        if product is not None:
            return _like(x, replace(product, act=act), x)
    return deferred(Activated(plain(x), act), x.shape, x.dtype, x.device)


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    return _activate("gelu" if approximate == "none" else "gelu_tanh", x)


def _silu(x: Tensor) -> Any:
    return _activate("silu", x)


def _cast(x: Any, *, dtype: torch.dtype | None = None, **others: Any) -> Any:
    """To another floating-point type."""
    waits = isinstance(x, Deferred) and x.value is None
    if not waits or dtype is None or not dtype.is_floating_point or any(value is not None for value in others.values()):
        return None
    work = x.taken_product() if isinstance(x.work, Multiplied) else x.work
    return None if work is None else Deferred(work, x.shape, dtype, x.device)


def _divide(x: Any, other: Any) -> Any:
    """By 1, as attention processors do."""
    return x if isinstance(x, Deferred) and isinstance(other, int | float) and other == 1 else None


def _like(x: Deferred, work: Work, other: Tensor) -> Deferred:
    return Deferred(work, x.shape, torch.promote_types(x.dtype, other.dtype), x.device)


def _for_each_image(values: Tensor, shape: torch.Size) -> Tensor | None:
    """(N, C) of what broadcasts to tokens (N, L, C) with the same for all L; None where it does not."""
    if len(shape) != 3 or values.ndim > 3:
        return None
    values = plain(values).reshape((1,) * (3 - values.ndim) + tuple(values.shape))
    if values.shape[1] != 1 or values.shape[2] != shape[2] or values.shape[0] not in (1, shape[0]):
        return None
    rows: Tensor = values.expand(shape[0], 1, shape[2])[:, 0]
    return rows if rows.stride(1) == 1 else rows.contiguous()


RULES: dict[Any, Callable[..., Any]] = {
    aten.layer_norm.default: _layer_norm,  # in inference mode
    aten.native_layer_norm.default: _native_layer_norm,
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _add,
    aten.div.Tensor: _divide,
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten._to_copy.default: _cast,
}
