"""Conditions of a network (classes, prompts) and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """e_u + scale (e_c - e_u) (classifier-free guidance, arXiv 2207.12598, in the form of CompVis' code)."""
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Conditions:
    """What a batch of images is conditioned on.

    Attributes:
        cond: (N, L, D) contexts of a UNet2DConditionModel, or (N,) class labels of a UNet2DModel.
        uncond: (1, L, D), the context of "nothing", shared by all images; or None for no guidance.
        scale: of the guidance; at 1 the conditional prediction is taken alone, at half the cost.
    """

    cond: Tensor
    uncond: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.uncond is not None and self.uncond.shape != (1, *self.cond.shape[1:]):
            raise ValueError(f"uncond of shape {tuple(self.uncond.shape)}: expected {(1, *self.cond.shape[1:])}")
        if self.scale != 1 and self.uncond is None:
            raise ValueError(f"guidance scale {self.scale:g} needs the unconditional context; allowed without it is 1")

    def __len__(self) -> int:
        return len(self.cond)

    def __getitem__(self, rows: slice | Sequence[int]) -> Conditions:
        return Conditions(self.cond[rows], self.uncond, self.scale)

    @property
    def guided(self) -> bool:
        """Whether the network is called for both halves."""
        return self.uncond is not None and self.scale != 1
