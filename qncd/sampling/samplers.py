"""Samplers as plain functions of a denoiser and a list of steps: DDIM, DDPM, PLMS and DPM-Solver++.

Symbols as in DDIM (arXiv 2010.02502): x_t noisy sample, e noise prediction, abar cumulative alpha, p the step after t.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.recipe import SamplerConfig
from qncd.rng import ImageNoise
from qncd.sampling.corrector import Corrected, Corrector, Denoiser, Tentative
from qncd.sampling.process import Process, clean_of
from qncd.sampling.schedule import Step, make_steps


@dataclass(frozen=True)
class StepState:
    """What a callback sees after each step: x at t, the prediction before and after correction, x0-hat and the next x."""

    step: Step
    x: Tensor
    eps: Tensor
    corrected: Tensor
    x0: Tensor
    x_prev: Tensor


Callback = Callable[[StepState], None]


def predict_x0(x: Tensor, eps: Tensor, step: Step) -> Tensor:
    """The clean image that a noise prediction at `step` stands for."""
    return clean_of(x, eps, step.alpha, step.noise)


def ddim_step(x: Tensor, eps: Tensor, step: Step, noise: Tensor | None, sigma: Tensor | float) -> Tentative:
    """x_p = alpha_p x0-hat + sqrt(sigma_p^2 - step.sigma^2) e + sigma z (DDIM eq. 12); sigma may have been reduced."""
    x0 = predict_x0(x, eps, step)
    x_prev = step.alpha_prev * x0 + math.sqrt(max(0.0, step.noise_prev**2 - step.sigma**2)) * eps
    if noise is not None:
        x_prev = x_prev + sigma * noise
    return Tentative(x_prev, x0)


def ddpm_step(x: Tensor, eps: Tensor, step: Step, noise: Tensor | None, sigma: Tensor | float) -> Tentative:
    """The posterior mean of DDPM (arXiv 2006.11239, eq. 7) with x0-hat clamped to [-1, 1], plus sigma z."""
    x0 = predict_x0(x, eps, step).clamp(-1, 1)
    beta = step.renoise**2  # 1 - abar_t / abar_p
    x_prev = (step.alpha_prev * beta * x0 + step.kept * step.noise_prev**2 * x) / step.noise**2
    if noise is not None:
        x_prev = x_prev + sigma * noise
    return Tentative(x_prev, x0)


def reduced_sigma(step: Step, variance: Tensor | None) -> Tensor | float:
    """sigma' = sqrt(max(0, sigma^2 - c^2 var_q)): the variance of the quantization noise taken out of the sampler's (QNCD)."""
    if variance is None or step.sigma == 0:
        return step.sigma
    return (step.sigma**2 - step.eps_gain**2 * variance).clamp(min=0).sqrt()


def sample_ddim(
    denoise: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: ImageNoise,
    corrector: Corrector | None = None,
    callback: Callback | None = None,
    step_function: Callable[[Tensor, Tensor, Step, Tensor | None, Tensor | float], Tentative] = ddim_step,
) -> Tensor:
    """Sample with DDIM at any eta, or with `step_function=ddpm_step` as DDPM does.

    Args:
        denoise: the network.
        x: x_T, (N, C, H, W).
        steps: from `make_steps`.
        noise: where the noise of steps with sigma > 0 comes from, one generator an image.
        corrector: removes quantization noise; it has begun its batch already.
        callback: sees every step.

    Returns:
        the clean sample (N, C, H, W), nominally in [-1, 1].

    Raises:
        FloatingPointError: the sample became NaN or infinite; names the step.
    """
    for step in steps:
        eps = denoise(x, step.t)
        z = noise.normal(x.shape[1:], x.device) if step.sigma > 0 else None

        def advance(e: Tensor, x: Tensor = x, step: Step = step, z: Tensor | None = z) -> Tentative:
            return step_function(x, e, step, z, step.sigma)

        corrected = corrector.correct(step, x, eps, denoise, advance) if corrector else Corrected(eps)
        after = step_function(x, corrected.eps, step, z, reduced_sigma(step, corrected.variance))
        if callback:
            callback(StepState(step, x, eps, corrected.eps, after.x0, after.x_prev))
        x = after.x_prev
        _check_finite(x, step)
    return x


# PLMS (arXiv 2202.09778, eq. 12): weights of this prediction and of up to three before it, the latest first.
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def sample_plms(
    denoise: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    corrector: Corrector | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with pseudo linear multistep (PLMS): DDIM's step with a noise prediction extrapolated from the last four.

    The first step has no history: it averages the predictions at both its ends, so S steps cost S + 1 network calls.
    A correction is part of the history. The first step's second prediction takes the first one's correction (QNCD's
    code leaves it as it is).
    """
    history: list[Tensor] = []  # the latest first
    for step, following in zip(steps, [*steps[1:], steps[-1]], strict=True):
        eps = denoise(x, step.t)

        def combine(
            e: Tensor,
            x: Tensor = x,
            eps: Tensor = eps,
            step: Step = step,
            following: Step = following,
            past: Sequence[Tensor] = history,
        ) -> Tensor:
            if not past:
                second = denoise(ddim_step(x, e, step, None, 0.0).x_prev, following.t)
                return (e + second + (e - eps)) / 2
            weights = _ADAMS_BASHFORTH[len(past)]
            total = weights[0] * e
            for weight, old in zip(weights[1:], past, strict=True):
                total = total + weight * old
            return total

        def advance(e: Tensor, x: Tensor = x, step: Step = step, combine: Callable[[Tensor], Tensor] = combine) -> Tentative:
            return ddim_step(x, combine(e), step, None, 0.0)

        corrected = corrector.correct(step, x, eps, denoise, advance) if corrector else Corrected(eps)
        after = advance(corrected.eps)
        history = [corrected.eps, *history[:2]]
        if callback:
            callback(StepState(step, x, eps, corrected.eps, after.x0, after.x_prev))
        x = after.x_prev
        _check_finite(x, step)
    return x


def sample_dpm_solver(
    denoise: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    betas: Sequence[float],
    corrector: Corrector | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DPM-Solver++(2M) (arXiv 2211.01095), diffusers' scheduler, at the time steps of `steps`."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=len(betas), trained_betas=list(map(float, betas)))
    times = list(dict.fromkeys(s.t for s in steps))
    by_time = {s.t: s for s in steps}
    scheduler.set_timesteps(timesteps=times, device=x.device)
    for t in times:
        step = by_time[t]
        eps = denoise(x, t)

        def advance(e: Tensor, x: Tensor = x, step: Step = step) -> Tentative:
            return Tentative(copy.deepcopy(scheduler).step(e, step.t, x).prev_sample, predict_x0(x, e, step))

        corrected = corrector.correct(step, x, eps, denoise, advance) if corrector else Corrected(eps)
        after = scheduler.step(corrected.eps, t, x).prev_sample
        if callback:
            callback(StepState(step, x, eps, corrected.eps, predict_x0(x, corrected.eps, step), after))
        x = after
        _check_finite(x, step)
    return x


def sample(
    config: SamplerConfig,
    process: Process,
    denoise: Denoiser,
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    corrector: Corrector | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Samples for `seeds` by the sampler that `config` names: x_T and all noise from each image's own generator.

    Args:
        process: that the network was trained on.
        shape: of one sample, (C, H, W) of images.

    Returns:
        (N, *shape) float32 on `device`.

    Raises:
        ValueError: DPM-Solver++ for a process that is not given by its betas.
    """
    steps = make_steps(config, process)
    noise = ImageNoise(seeds)
    x = noise.normal(shape, device)
    if corrector:
        corrector.begin(seeds, str(device))
    if config.sample_type == "plms":
        return sample_plms(denoise, x, steps, corrector, callback)
    if config.sample_type == "dpm_solver":
        if process.betas is None:
            raise ValueError("dpm_solver: allowed for processes given by their betas")
        return sample_dpm_solver(denoise, x, steps, list(process.betas), corrector, callback)
    step_function = ddpm_step if config.sample_type == "ddpm_noisy" else ddim_step
    return sample_ddim(denoise, x, steps, noise, corrector, callback, step_function)


def _check_finite(x: Tensor, step: Step) -> None:
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(f"the sample is NaN or infinite after step {step.index + 1} (time step {step.t})")
