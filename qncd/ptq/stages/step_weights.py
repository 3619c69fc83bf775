"""What an error at each time step does to the sample, as weights of the calibration inputs (not in the paper).

An error d in the noise prediction of step t moves the sample x_0, to first order, by its derivative J_t d. Errors of one size but
no preferred direction move it by E|J_t d|^2 = |J_t|^2 E|d|^2 / n, and with v a vector of random signs |v J_t|^2 has the mean
|J_t|^2. One back-propagation through the run of the sampler gives it for all steps.

The first steps count most: what they get wrong, 1 / alpha_t enlarges. On the bundled DDIM model with 10 steps, an error at
t = 900 moves the sample 50 times as much (in squares) as one at t = 300, while predictions err most at the last steps, which a
loss that takes all calibration inputs alike is about.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict

from torch import Tensor

from qncd.ptq.backpropagation import probe_samples, step_by_step
from qncd.ptq.context import Context
from qncd.ptq.observing import Progress
from qncd.recipe import Recipe
from qncd.sampling.corrector import Denoiser
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions

SAMPLES = 16  # runs of the sampler; no more than there are conditions
PROBES = 2  # vectors v for each
SEED_BASE = 3 << 41  # far from the seeds of calibration, of tracking and of bit allocation


def step_sensitivity(
    diffusion: Diffusion,
    conditions: Conditions | None = None,
    samples: int = SAMPLES,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[float, float]:
    """Mean of |J_t|^2 / n by time step: squared error of an element of the sample for that of an element of the prediction.

    Args:
        diffusion: with the network in floating point.
        conditions: are used in turn, as many as there are.
        samples: seeds that are sampled.

    Raises:
        FloatingPointError: a sample is NaN or infinite.
        ValueError: a derivative is.
    """
    small = dataclasses.replace(diffusion, lane=min(batch_size, diffusion.lane))
    sums: dict[float, float] = defaultdict(float)

    def watched(denoise: Denoiser) -> Denoiser:
        inner = step_by_step(denoise)

        def predict(x: Tensor, t: float) -> Tensor:
            out = inner(x, t)
            out.register_hook(lambda gradient: _add(sums, t, gradient))
            return out

        return predict

    probe_samples(small, conditions, (samples, PROBES), SEED_BASE, lambda _: contextlib.nullcontext(), watched, progress)
    elements = PROBES * samples * math.prod(diffusion.shape)
    found = {t: sums[t] / elements for t in sorted(sums, reverse=True)}
    if not all(value < float("inf") for value in found.values()):
        raise ValueError("what an error at a time step does to the sample is NaN or infinite")
    return found


def _add(sums: dict[float, float], t: float, gradient: Tensor) -> None:
    sums[t] += float(gradient.double().square().sum())


class StepWeights:
    """The stage: before all that weighs calibration inputs."""

    title = "weighing time steps"
    unit = "sample"
    weights = False

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.step_weights

    def run(self, context: Context) -> None:
        diffusion = context.sampler("step_weights")
        with context.monitor(self.title, self.unit) as update:
            found = step_sensitivity(diffusion, context.conditions, batch_size=context.batch_size, progress=update)
        context.data = context.data.weighted(found)
        context.found["step_weights"] = dict(context.data.step_weights or {})
