"""What a network was called with while it was calibrated: exporters and checkpoints ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.calls import Inputs

_SEEN, _CONSTANTS = "_qncd_inputs", "_qncd_constants"  # attributes of a module
DTYPES = ("float32", "int64", "bool")


def remember_inputs(network: Any, x: Tensor, t: Tensor, inputs: Inputs, constants: Mapping[str, Any]) -> None:
    """Keep the shape of one row, or of what rows share, and the dtype of all that a network is called with.

    Time steps are whole numbers (int64) unless one has a fraction, or the network's have it always.

    Args:
        network: a `qncd.models.network.Network`.
        constants: `Call.constants`, which are kept as they are.
    """
    whole = not network.fractions and (not t.is_floating_point() or bool((t == t.round()).all()))
    seen = {network.sample_name: [list(x.shape[1:]), "float32"], network.time_name: [[], "int64" if whole else "float32"]}
    shared = {name: value for name, value in constants.items() if name in network.shared}
    for name, value in [*inputs.items(), *shared.items()]:
        shape = value.shape if name in shared else value.shape[1:]
        dtype = "float32" if value.is_floating_point() else "bool" if value.dtype is torch.bool else "int64"
        seen[name] = [list(shape), dtype]
    set_seen(network.module, seen, constants)


def seen_inputs(module: nn.Module) -> dict[str, Any] | None:
    """What `remember_inputs` kept of shapes: [shape, dtype] by name, the sample and the time step first."""
    return getattr(module, _SEEN, None)


def seen_constants(module: nn.Module) -> dict[str, Any]:
    """The constants that `remember_inputs` kept."""
    return getattr(module, _CONSTANTS, {})


def set_seen(module: nn.Module, seen: dict[str, Any] | None, constants: Mapping[str, Any]) -> None:
    """Put back what `seen_inputs` and `seen_constants` gave."""
    object.__setattr__(module, _SEEN, seen)
    object.__setattr__(module, _CONSTANTS, dict(constants))


def settings_of(module: nn.Module, constants: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """Those constants of a call that are no tensors and say something, by name, as JSON has them: lists for tuples.

    Args:
        strict: False leaves out what has no form in JSON.

    Raises:
        ValueError: one has no form in JSON, where `strict`.
    """
    parameters = inspect.signature(type(module).forward).parameters
    found = {}
    for name, value in constants.items():
        default = parameters[name].default if name in parameters else None
        empty = isinstance(value, (Mapping, list, tuple)) and not value
        if name != "return_dict" and value is not default and not isinstance(value, Tensor) and not empty:
            try:
                found[name] = _plain(name, value)
            except ValueError:
                if strict:
                    raise
    return found


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(f"{name}.{key}", part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name}: a network on an engine takes tensors, numbers and texts, this is {value!r:.80}")
