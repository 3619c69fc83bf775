"""Calls of a network as data: named tensors, with a row for each sample or one for all, and what else there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Named inputs of a call beside sample and time step. Nested ones have dotted names: added_cond_kwargs.time_ids,
# down_block_additional_residuals.0.
Inputs = Mapping[str, Tensor]
PlainCall = Callable[[Tensor, Tensor, Inputs], Tensor]  # samples, their time steps and named inputs -> the network's output


@dataclass(frozen=True)
class Call:
    """One call of a network, taken apart.

    Attributes:
        x: (N, ...) the noisy samples.
        t: (N,) their time steps, int64, or float32 where the network's are no whole numbers.
        inputs: every other tensor by name that has a row for each sample.
        constants: every other argument by name, as it is: what is no tensor, and tensors that all samples share (the ids of
            tokens), nested ones by dotted names.
    """

    x: Tensor
    t: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


def in_one(calls: Sequence[Call]) -> Call:
    """Two calls for the same samples, with and without condition, as the one that pipelines make of them elsewhere: without
    condition first. Raises ValueError where they differ in more than the values of their inputs.
    """
    if len(calls) == 1:
        return calls[0]
    shapes = [{name: value.shape for name, value in call.inputs.items()} for call in calls]
    if len(calls) != 2 or shapes[0] != shapes[1] or not torch.equal(calls[0].x, calls[1].x):
        raise ValueError(
            f"the network was called {len(calls)} times for a step: allowed is 1, or 2 with conditions of as many tokens for "
            "the same samples"
        )
    cond, uncond = calls
    inputs = {name: torch.cat([uncond.inputs[name], value]) for name, value in cond.inputs.items()}
    return Call(torch.cat([cond.x, cond.x]), torch.cat([cond.t, cond.t]), inputs, cond.constants)


def rows_of(inputs: Inputs, rows: Tensor | slice | Sequence[int]) -> dict[str, Tensor]:
    """Some rows of every input."""
    return {name: value[rows] for name, value in inputs.items()}


def flatten(name: str, value: Any, into: dict[str, Tensor]) -> bool:
    """Take in a tensor or a nest of tensors; False for anything else."""
    if isinstance(value, Tensor):
        into[name] = value
        return True
    if value is None:
        return True
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(str(key), part) for key, part in enumerate(value)]
    inside: dict[str, Tensor] = {}
    if not parts or not all(flatten(f"{name}.{key}", part, inside) for key, part in parts):
        return False
    into.update(inside)
    return True


def nested(inputs: Inputs) -> dict[str, Any]:
    """Dotted names back to nests: dictionaries, and lists where the parts are numbered."""
    nest: dict[str, Any] = {}
    for name, value in inputs.items():
        *path, last = name.split(".")
        place = nest
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value

    def listed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if all(key.isdigit() for key in value):
            return [listed(value[key]) for key in sorted(value, key=int)]
        return {key: listed(part) for key, part in value.items()}

    return {name: listed(value) for name, value in nest.items()}
