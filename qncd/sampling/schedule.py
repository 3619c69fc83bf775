"""Noise schedules and the time steps that a sampler visits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qncd.recipe import OptionError, SamplerConfig, check_choice
from qncd.sampling.process import Process


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
            raise OptionError(
                "timesteps",
                f"timesteps {timesteps}: latent-diffusion's {skip_type} spacing would end at time step {shifted[-1]}, the "
                f"model's last is {num_train_timesteps - 1}; allowed are counts up to {num_train_timesteps // 2}",
            )
        return shifted
    check_choice("skip_type", skip_type, ("uniform", "quad"))
    if not 1 <= timesteps <= num_train_timesteps:
        raise OptionError("timesteps", f"timesteps {timesteps}: allowed are 1 to {num_train_timesteps}")
    if skip_type == "uniform":
        return list(range(0, num_train_timesteps, num_train_timesteps // timesteps))
    return [int(s) for s in np.linspace(0, np.sqrt(num_train_timesteps * 0.8), timesteps) ** 2]


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from time step t to the earlier t_prev (-1: the clean image; CompVis' samplers end at 0).

    Attributes:
        index: 0 for the first step taken, the noisiest.
        alpha, noise: levels of signal and noise at t (`qncd.sampling.process.Process`).
        alpha_prev, noise_prev: at t_prev.
        sigma: standard deviation of the noise that the step adds.
        eps_gain: derivative of the next sample by the noise prediction (c in the variance correction).
    """

    index: int
    t: float
    t_prev: float
    alpha: float
    noise: float
    alpha_prev: float
    noise_prev: float
    sigma: float
    eps_gain: float

    @property
    def kept(self) -> float:
        """What re-noising from t_prev to t leaves of the sample: r = alpha_t / alpha_p."""
        return self.alpha / self.alpha_prev

    @property
    def renoise(self) -> float:
        """Standard deviation of the noise that re-noising adds: sqrt(sigma_t^2 - r^2 sigma_p^2)."""
        return math.sqrt(max(0.0, self.noise**2 - self.kept**2 * self.noise_prev**2))


def make_steps(config: SamplerConfig, process: Process) -> list[Step]:
    """The steps of DDIM (`generalized`, `dpm_solver`, `plms`) or DDPM (`ddpm_noisy`), noisiest first.

    DDIM: sigma = eta (sigma_p / sigma_t) sqrt(sigma_t^2 - r^2 sigma_p^2), r = alpha_t / alpha_p (arXiv 2010.02502, eq. 16).
    DDPM: sigma^2 = 1 - abar_t/abar_p (the "fixed large" variance), 0 at t = 0; of variance-preserving processes.

    Raises:
        ValueError: a time step of pure noise would be visited (the end of a flow, or of a schedule of zero SNR).
    """
    if process.times is not None:
        times: list[float] = sorted(set(process.times))
    else:
        times = [*ddim_timesteps(config.skip_type, config.timesteps, len(process), config.convention)]
    end = 0 if config.convention == "ldm" and process.times is None else -1
    steps: list[Step] = []
    for index, (t, t_prev) in enumerate(zip(reversed(times), reversed([end, *times[:-1]]), strict=True)):
        (alpha, noise), (alpha_prev, noise_prev) = process.at(t), process.at(t_prev)
        if alpha == 0:
            raise ValueError(f"time step {t}: holds no signal, from which no clean image can be read off")
        step = Step(index, t, t_prev, alpha, noise, alpha_prev, noise_prev, 0.0, 0.0)
        if config.sample_type == "ddpm_noisy":
            beta = step.renoise**2  # of a variance-preserving process
            sigma = math.sqrt(beta) if t > 0 else 0.0
            gain = -alpha_prev * beta / noise / alpha
        else:
            sigma = config.eta * noise_prev / noise * step.renoise
            gain = math.sqrt(max(0.0, noise_prev**2 - sigma**2)) - alpha_prev * noise / alpha
        steps.append(dataclasses.replace(step, sigma=sigma, eps_gain=gain))
    return steps
