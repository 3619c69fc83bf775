"""One noise source an image, so that an image depends on its seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qncd.options import check_seed

# Streams of one seed: turning the noise correction on or off leaves the sampler's own draws as they were.
SAMPLER_STREAM, CORRECTOR_STREAM = 0, 1


class ImageNoise:
    """Standard normal noise for a batch of images, each from a generator of its own.

    Args:
        seeds: one seed an image, 0 to 2^56 - 1.
        stream: a different, independent sequence for the same seeds.

    Drawn on the CPU in float32 and then moved, so that every device gets the same numbers (k-diffusion and EDM do so).
    """

    def __init__(self, seeds: Sequence[int], stream: int = SAMPLER_STREAM) -> None:
        for seed in seeds:
            check_seed(seed, 2**56 - 1)
        self.generators = [torch.Generator().manual_seed((seed << 8) + stream) for seed in seeds]

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draw (N, *shape) float32, N the number of seeds."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators]).to(device)
