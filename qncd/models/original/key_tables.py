"""Weights under two names: tables from an original checkpoint's keys to a diffusers model's, and errors that name the keys.

A table maps each original key to where its tensor goes. Most tensors only change their name; `Pointwise` and `FusedHeads`
also change their layout. All of them work in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

_SHOWN = 3  # keys named in an error
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # no original has a part so named

Network = TypeVar("Network", bound=nn.Module)


class Layout(Protocol):
    """Where one original tensor goes: `split` gives the tensors for `names`, `join` takes them back."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def split(self, value: Tensor) -> tuple[Tensor, ...]: ...

    def join(self, values: tuple[Tensor, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Renamed:
    """The same tensor under another name."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        return (value,)

    def join(self, values: tuple[Tensor, ...]) -> Tensor:
        return values[0]


@dataclass(frozen=True)
class Pointwise(Renamed):
    """The weight of a 1x1 convolution (O, I, 1, ...) with `dims` dimensions of size 1 as that of a linear layer (O, I)."""

    dims: int = 2

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        return (value.reshape(value.shape[:2]),)

    def join(self, values: tuple[Tensor, ...]) -> Tensor:
        return values[0].reshape(values[0].shape + (1,) * self.dims)


@dataclass(frozen=True)
class FusedHeads:
    """A `qkv` of LDM's AttentionBlock, weight (3C, C, 1) or bias (3C,), whose rows are grouped head by head as q, k, v.

    Args:
        names: of q, k and v.
        heads: number of heads; 1 where the rows are all of q, then k, then v.
    """

    names: tuple[str, ...]
    heads: int

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        channels = value.shape[0] // 3
        rows = value.reshape(self.heads, 3, channels // self.heads, *value.shape[1:2])
        return tuple(rows[:, i].reshape(channels, *value.shape[1:2]) for i in range(3))

    def join(self, values: tuple[Tensor, ...]) -> Tensor:
        channels, *rest = values[0].shape
        rows = torch.stack([value.reshape(self.heads, channels // self.heads, *rest) for value in values], dim=1)
        return rows.reshape(3 * channels, *rest, *(1 for _ in rest))


KeyTable = Mapping[str, Layout]


def parameter_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of each parameter by name, of weights too that a quantized layer keeps as codes alone."""
    shapes = {name: value.shape for name, value in module.named_parameters()}
    for name, part in module.named_modules():
        if getattr(part, "packed", False) and f"{name}.weight" not in shapes:
            shapes[f"{name}.weight"] = part.weight_shape
    return shapes


def refuse(what: str, keys: Iterable[str]) -> None:
    """Raise ValueError with the number of the keys, `what` is wrong with them, and the first few names; nothing without keys."""
    if found := sorted(keys):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}")


def plain_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without what wrappers put into its keys: DataParallel's `module.`, torch.compile's `_orig_mod.`, FSDP's.

    Raises:
        ValueError: two keys differ by such a name alone.
    """
    names = {key: _plain(key) for key in state}
    plain = {name: state[key] for key, name in names.items()}
    if len(plain) < len(state):
        refuse("keys are there twice, with and without _orig_mod", [key for key, name in names.items() if key != name])
    return plain


def _plain(key: str) -> str:
    # LitEma takes the dots out of the names of averaged weights.
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS).replace("_orig_mod", "")


def take_part(state: dict[str, Any], prefix: str, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take the keys with this prefix out of the state dict, and the prefix off them."""
    found = [key for key in state if key.startswith(prefix) and not key.startswith(but)]
    return {key.removeprefix(prefix): state.pop(key) for key in found}


def check_original(state: Mapping[str, Any], table: KeyTable, shapes: Mapping[str, torch.Size], kind: str) -> None:
    """Raise ValueError unless the state dict has the table's keys and no other, each with its shape.

    The weight of a 1x1 convolution may also have the shape of a linear layer, and the other way round: some tools store
    attention so.

    Args:
        state: under original keys.
        shapes: of the diffusers model's tensors.
        kind: what the model is called in the error, e.g. "DDIM model".
    """
    # Missing ones first: a checkpoint of another family lacks nearly all of them, which says more than what it has.
    refuse(f"of {len(table)} keys are missing in the checkpoint", table.keys() - state.keys())
    refuse(f"keys that a {kind} of this config lacks", state.keys() - table.keys())
    refuse("keys that hold no tensor", [key for key, value in state.items() if not isinstance(value, Tensor)])
    wrong = []
    for old, layout in table.items():
        expected = layout.join(tuple(torch.empty(shapes[name], device="meta") for name in layout.names)).shape
        if not same_but_for_ones(state[old].shape, expected):
            wrong.append(f"{old} {tuple(state[old].shape)} for {tuple(expected)}")
    refuse("tensors of another shape than the config's", wrong)


def from_original(state: MutableMapping[str, Tensor], table: KeyTable) -> Iterator[tuple[str, Tensor]]:
    """(name in the diffusers model, tensor) for each tensor of a checked state dict, which is EMPTIED on the way.

    Taking each tensor out lets its memory go as soon as the caller has copied it. The tensors may share memory with the
    checkpoint and keep its dtype.
    """
    for old, layout in table.items():
        yield from zip(layout.names, layout.split(state.pop(old)), strict=True)


def same_but_for_ones(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are equal, or those of one matrix as linear layer (O, I) and as 1x1 convolution (O, I, 1, ...)."""
    if tuple(found) == tuple(expected):
        return True
    matrices = len(found) >= 2 and len(expected) >= 2 and tuple(found[:2]) == tuple(expected[:2])
    return matrices and {*found[2:], *expected[2:]} == {1}


def to_original(state: Mapping[str, Tensor], table: KeyTable, kind: str) -> dict[str, Tensor]:
    """The inverse of `from_original`: a diffusers model's state dict under its original keys and in its layouts.

    Raises:
        ValueError: a key of the model is missing or left over.
    """
    names = {name for layout in table.values() for name in layout.names}
    refuse(f"keys that a {kind} of this config lacks", state.keys() - names)
    refuse(f"of {len(names)} keys are missing in the state dict", names - state.keys())
    return {old: layout.join(tuple(state[name] for name in layout.names)) for old, layout in table.items()}


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """The shape of each tensor that the network's state dict would have, without making the network."""
    with torch.device("meta"):
        return {key: value.shape for key, value in build().state_dict().items()}


def network_with_weights(build: Callable[[], Network], weights: Iterable[tuple[str, Tensor]], source: str) -> Network:
    """The network with these weights as float32: eval mode, on the CPU, no gradients.

    The network is made without memory and takes one tensor after the other, so that at no time there is a second copy of it.

    Args:
        weights: (name, tensor of any floating point dtype) pairs.
        source: what the error messages begin with.

    Raises:
        ValueError: a name is missing or left over, a shape is another one, or a value is no finite floating point number.
    """
    with torch.device("meta"):
        network = build()
    expected, state = network.state_dict(), {}
    extra, wrong = [], []
    for key, value in weights:
        if key not in expected:
            extra.append(key)
        elif not isinstance(value, Tensor) or not same_but_for_ones(value.shape, expected[key].shape):
            wrong.append(key)
        else:
            state[key] = _as_float32(value, f"{source}: {key}").reshape(expected[key].shape)
    refuse_fit(source, missing=expected.keys() - state.keys() - set(wrong), extra=extra, wrong=wrong)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def refuse_fit(source: str, missing: Iterable[str], extra: Iterable[str], wrong: Iterable[str]) -> None:
    """Raise ValueError where weights and network do not fit: what is missing first, as it says most."""
    refuse_in(source, "keys are missing", missing)
    refuse_in(source, "keys belong to no layer", extra)
    refuse_in(source, "tensors have another shape than their layer", wrong)


def refuse_in(source: str, what: str, keys: Iterable[str]) -> None:
    """`refuse` with the source in front."""
    try:
        refuse(what, keys)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _as_float32(value: Tensor, where: str) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"{where} holds {value.dtype}, expected floating point numbers")
    value = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(value).all():
        raise ValueError(f"{where} holds NaN or infinite values")
    return value
