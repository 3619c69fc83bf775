"""What quantization costs along a trajectory: the error of the noise prediction, step by step, and images to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.io.images import to_uint8
from qncd.recipe import check_int
from qncd.sampling.corrector import Corrector
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.samplers import StepState


@dataclass
class _Sums:
    """Running sums over the images of one step."""

    images: int = 0
    elements: int = 0
    squared_error: float = 0.0
    squared_expected: float = 0.0
    product: float = 0.0
    error: float = 0.0


class NoiseErrorRecorder:
    """A sampler callback that compares each noise prediction with the full-precision model's at the same x_t.

    Per step, over the first `images` images that it sees, with e the prediction that the sampler uses (after correction):

        error  sum ||e - e_fp||^2 / sum ||e_fp||^2
        gain   sum <e, e_fp> / sum ||e_fp||^2: below 1, the prediction is shrunk as a whole
        bias   mean of e - e_fp over all elements: what a correction by a mean could take out

    x_t lies on the sampled model's own trajectory: the figures are what each step adds, not what earlier steps have left in
    x_t. Random error largely averages out over the steps, gain and bias add up.

    Args:
        reference: the full-precision model.
        images: how many to compare; later batches pass at no cost.
    """

    def __init__(self, reference: Diffusion, images: int = 64) -> None:
        check_int("images", images, 1)
        self.reference = reference
        self.images = images
        self.sums: dict[int, _Sums] = {}
        self.begin(None)

    def begin(self, conditions: Conditions | None) -> None:
        """The conditions of the images that come next."""
        self.denoise = self.reference.denoiser(conditions)

    def __call__(self, state: StepState) -> None:
        sums = self.sums.setdefault(state.step.index, _Sums())
        count = min(len(state.x), self.images - sums.images)
        if count <= 0:
            return
        expected = self.denoise(state.x[:count], state.step.t).double()
        predicted = state.corrected[:count].double()
        error = predicted - expected
        sums.images += count
        sums.elements += error.numel()
        sums.squared_error += float(error.square().sum())
        sums.squared_expected += float(expected.square().sum())
        sums.product += float((predicted * expected).sum())
        sums.error += float(error.sum())

    def error_per_step(self) -> list[float]:
        """Relative squared error of each step, the noisiest first. Raises ValueError where nothing was seen."""
        return [s.squared_error / s.squared_expected for s in self._ordered()]

    def gain_per_step(self) -> list[float]:
        """Gain of each step, the noisiest first; 1 where nothing is lost."""
        return [s.product / s.squared_expected for s in self._ordered()]

    def bias_per_step(self) -> list[float]:
        """Mean error of each step, the noisiest first."""
        return [s.error / s.elements for s in self._ordered()]

    def mean_error(self) -> float:
        """Mean of `error_per_step`."""
        return float(np.mean(self.error_per_step()))

    def _ordered(self) -> list[_Sums]:
        if not self.sums:
            raise ValueError("no step was recorded")
        return [self.sums[index] for index in sorted(self.sums)]


@torch.no_grad()
def sample_images(
    sampler: Any,
    seeds: Sequence[int],
    batch_size: int,
    corrector: Corrector | None = None,
    errors: NoiseErrorRecorder | None = None,
    conditions: Callable[[Sequence[int]], Any] | None = None,
    decode: Callable[[Tensor], np.ndarray] = to_uint8,
) -> np.ndarray:
    """Images for `seeds`, uint8 (N, H, W, C), `batch_size` at a time.

    Args:
        sampler: a `Diffusion`, or a `PipelineSampler`.
        errors: watches the noise predictions of a `Diffusion`.
        conditions: of images by their places in `seeds`.
        decode: samples -> images.
    """
    parts = []
    for start in range(0, len(seeds), batch_size):
        rows = range(start, min(start + batch_size, len(seeds)))
        given = conditions(rows) if conditions else None
        if errors:
            errors.begin(given)
        watching = {} if errors is None else {"callback": errors}
        parts.append(decode(sampler.sample([seeds[i] for i in rows], corrector, conditions=given, **watching)))
    return np.concatenate(parts)
