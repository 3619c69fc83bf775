"""What tracers do not follow, in other words: complex numbers, with which rotary embeddings compute, as pairs of real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Pairs:
    """Stands in for a complex tensor (...): a real one (..., 2), for what diffusers' rotary embeddings do with it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.view_as_real:
            return args[0].values
        return NotImplemented

    def __mul__(self, other: Pairs) -> Pairs:
        (a, b), (c, d) = self.values.unbind(-1), other.values.unbind(-1)
        return Pairs(torch.stack([a * c - b * d, a * d + b * c], -1))

    def unsqueeze(self, dim: int) -> Pairs:
        """As torch's; `dim` counts from the front."""
        if dim < 0:
            raise ValueError(f"dim {dim}: allowed are numbers from the front")
        return Pairs(self.values.unsqueeze(dim))


class Traceable(TorchFunctionMode):
    """Within it, torch.view_as_complex gives `Pairs`, and a size becomes a tensor without being fixed."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.view_as_complex:
            return Pairs(args[0])
        if func is torch.as_tensor and isinstance(args[0], torch.SymInt):
            return torch.full((), args[0], dtype=torch.int64, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def pairs_of(values: Tensor) -> Pairs:
    """Of complex numbers (...), in 32 bits each."""
    return Pairs(torch.view_as_real(values).float())
