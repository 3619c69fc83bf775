"""Conditions of a network (classes, prompts) and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qncd.models.calls import Inputs, rows_of


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """e_u + scale (e_c - e_u) (classifier-free guidance, arXiv 2207.12598, in the form of CompVis' code)."""
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Conditions:
    """What a batch of images is conditioned on.

    Attributes:
        inputs: of the network beside sample and time step, by name, (N, ...) each.
        uncond: the same for "nothing", (1, ...) each, shared by all images, or (N, ...); None for no guidance.
        scale: of the guidance; at 1 the conditional prediction is taken alone, at half the cost.
        constants: what else the network is called with, the same for all images.
    """

    inputs: Inputs
    uncond: Inputs | None = None
    scale: float = 1.0
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self)
        for name, value in self.inputs.items():
            if len(value) != count:
                raise ValueError(f"{name} has {len(value)} rows, another input {count}")
        for name, value in (self.uncond or {}).items():
            given = self.inputs.get(name)
            if given is None or value.shape[1:] != given.shape[1:] or len(value) not in (1, count):
                expected = None if given is None else (1, *given.shape[1:])
                raise ValueError(f"uncond {name} of shape {tuple(value.shape)}: expected {expected}")
        if self.uncond is not None and self.uncond.keys() != self.inputs.keys():
            raise ValueError(f"uncond has {sorted(self.uncond)}, the conditions have {sorted(self.inputs)}")
        if self.scale != 1 and self.uncond is None:
            raise ValueError(f"guidance scale {self.scale:g} needs the unconditional context; allowed without it is 1")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, rows: slice | Sequence[int]) -> Conditions:
        uncond = self.uncond and {name: v if len(v) == 1 else v[rows] for name, v in self.uncond.items()}
        return Conditions(rows_of(self.inputs, rows), uncond, self.scale, self.constants)

    @property
    def guided(self) -> bool:
        """Whether the network is called for both halves."""
        return self.uncond is not None and self.scale != 1

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditions:
        """The same on a device, in the precision of a network: `dtype`, for what is no whole number."""

        def moved(inputs: Inputs) -> Inputs:
            return {name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in inputs.items()}

        constants = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.constants.items()}
        return Conditions(moved(self.inputs), self.uncond and moved(self.uncond), self.scale, constants)
