"""What a pipeline's guidance is, read off one step of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qncd.sampling.scheduler import Guidance


def step(seed: int, rescaled: float = 1.0) -> tuple[torch.Tensor, Any]:
    """The network's output for both halves, in half precision and near each other, and what the pipeline made of it."""
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(1, 4, 8, 8, generator=generator).bfloat16() * 0.3
    cond = (uncond + torch.randn(1, 4, 8, 8, generator=generator) * 0.02).bfloat16()
    guided = (uncond + 7.5 * (cond - uncond)) * rescaled
    return torch.cat([uncond, cond]), SimpleNamespace(x=uncond, output=guided)


def test_in_half_precision() -> None:
    """Rounding leaves the scale uncertain by more than one part in a thousand."""
    for seed in range(40):
        found = Guidance.seen(*step(seed))
        assert found.parts == 2 and abs(found.scale - 7.5) < 0.01
    with pytest.raises(ValueError, match="the pipeline's guidance is not"):
        Guidance.seen(*step(0, 0.9))
