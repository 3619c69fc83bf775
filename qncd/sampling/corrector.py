"""What a sampler asks of a noise corrector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qncd.sampling.schedule import Step

# A network call: x (N, C, H, W) and a time step -> noise prediction (N, C, H, W).
Denoiser = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Tentative:
    """A step taken on trial: the earlier sample x_p and the clean image it was built from, (N, C, H, W) each."""

    x_prev: Tensor
    x0: Tensor


Advance = Callable[[Tensor], Tentative]


@dataclass(frozen=True)
class Corrected:
    """A corrected noise prediction and the variance of the error that is left in it, which broadcasts against it."""

    eps: Tensor
    variance: Tensor | None = None


class Corrector(Protocol):
    """Removes quantization noise from noise predictions while sampling."""

    def begin(self, seeds: Sequence[int], device: str) -> None:
        """Start a batch of images; nothing of the last batch survives."""

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        """Correct `eps`, the prediction at `x` and `step`; `advance(e)` takes the sampler's step with e on trial."""
