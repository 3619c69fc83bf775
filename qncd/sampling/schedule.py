"""Noise schedules and the time steps that a sampler visits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qncd.recipe import SamplerConfig, check_choice


def linear_betas(beta_start: float, beta_end: float, num_train_timesteps: int) -> np.ndarray:
    """DDPM's linear schedule: betas float64 (T,)."""
    return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)


def betas_of(config: Mapping[str, Any]) -> np.ndarray:
    """betas float64 (T,) of an ermongroup/ddim yaml's `diffusion` section.

    Raises:
        ValueError: the section is missing or incomplete, or names a schedule other than linear.
    """
    try:
        section = config["diffusion"]
        kind, count = section["beta_schedule"], int(section["num_diffusion_timesteps"])
        first, last = float(section["beta_start"]), float(section["beta_end"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the config's diffusion section lacks or garbles {error}") from None
    if kind != "linear":
        raise ValueError(f"beta_schedule {kind!r}: allowed is linear")
    if not (0 < first <= last < 1 and count > 0):
        raise ValueError(f"beta_start {first}, beta_end {last}, num_diffusion_timesteps {count}: not a noise schedule")
    return linear_betas(first, last, count)


def alphas_cumprod(betas: np.ndarray) -> np.ndarray:
    """abar_t = prod_{s<=t} (1 - beta_s), float64 (T,)."""
    return np.cumprod(1.0 - np.asarray(betas, np.float64))


def ddim_timesteps(skip_type: str, timesteps: int, num_train_timesteps: int = 1000, convention: str = "ddim") -> list[int]:
    """The time steps of ermongroup/ddim's runner ("ddim") or of CompVis' samplers ("ldm": one later each), ascending.

    uniform: 0, k, 2k, ... with k = T // S (a little more than S steps where S does not divide T).
    quad: floor(linspace(0, sqrt(0.8 T), S)^2), which repeats small time steps for large S.

    Raises:
        ValueError: unknown spacing, more steps than the model was trained with, or a time step past its last.
    """
    if convention == "ldm":
        shifted = [t + 1 for t in ddim_timesteps(skip_type, timesteps, num_train_timesteps)]
        if shifted[-1] >= num_train_timesteps:
            raise ValueError(
                f"timesteps {timesteps}: latent-diffusion's {skip_type} spacing would end at time step {shifted[-1]}, the "
                f"model's last is {num_train_timesteps - 1}; allowed are counts up to {num_train_timesteps // 2}"
            )
        return shifted
    check_choice("skip_type", skip_type, ("uniform", "quad"))
    if not 1 <= timesteps <= num_train_timesteps:
        raise ValueError(f"timesteps {timesteps}: allowed are 1 to {num_train_timesteps}")
    if skip_type == "uniform":
        return list(range(0, num_train_timesteps, num_train_timesteps // timesteps))
    return [int(s) for s in np.linspace(0, np.sqrt(num_train_timesteps * 0.8), timesteps) ** 2]


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from time step t to the earlier t_prev (-1: the clean image; CompVis' samplers end at 0).

    Attributes:
        index: 0 for the first step taken, the noisiest.
        abar, abar_prev: cumulative alphas at t and t_prev.
        sigma: standard deviation of the noise that the step adds.
        eps_gain: derivative of the next sample by the noise prediction (c in the variance correction).
    """

    index: int
    t: int
    t_prev: int
    abar: float
    abar_prev: float
    sigma: float
    eps_gain: float


def make_steps(config: SamplerConfig, abar: Sequence[float] | np.ndarray) -> list[Step]:
    """The steps of DDIM (`generalized`, `dpm_solver`, `plms`) or DDPM (`ddpm_noisy`), noisiest first.

    Args:
        abar: alphas_cumprod, (T,).

    DDIM: sigma = eta sqrt((1-abar_t/abar_p)(1-abar_p)/(1-abar_t)) (arXiv 2010.02502, eq. 16).
    DDPM: sigma^2 = 1 - abar_t/abar_p (the "fixed large" variance), 0 at t = 0.
    """
    times = ddim_timesteps(config.skip_type, config.timesteps, len(abar), config.convention)
    end, steps = 0 if config.convention == "ldm" else -1, []
    for index, (t, t_prev) in enumerate(zip(reversed(times), reversed([end, *times[:-1]]), strict=True)):
        a, p = float(abar[t]), float(abar[t_prev]) if t_prev >= 0 else 1.0
        if config.sample_type == "ddpm_noisy":
            beta = 1 - a / p
            sigma = float(np.sqrt(beta)) if t > 0 else 0.0
            gain = -np.sqrt(p) * beta / (1 - a) * np.sqrt(1 / a - 1)
        else:
            sigma = float(config.eta * np.sqrt(max(0.0, (1 - a / p) * (1 - p) / (1 - a))))
            gain = np.sqrt(max(0.0, 1 - p - sigma**2)) - np.sqrt(p * (1 - a) / a)
        steps.append(Step(index, t, t_prev, a, p, sigma, float(gain)))
    return steps
