"""The noise process that a network was trained on, x_t = alpha_t x_0 + sigma_t eps, as two tables.

Variance-preserving schedules (DDPM), variance-exploding ones and rectified flow are three ways to fill them. What a network
predicts (noise, velocity, clean sample, flow) is turned into noise here, at the border: samplers and corrections know noise only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Process:
    """Signal and noise levels at the time steps 0 to T - 1.

    Attributes:
        alpha, sigma: (T,) float64.
        betas: (T,) variances of a variance-preserving process, where it was given by them; else None.
        times: time steps that a scheduler visits, the noisiest first, where that decides and not a sampler's configuration.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    betas: np.ndarray | None = None
    times: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.alpha)

    @classmethod
    def from_betas(cls, betas: np.ndarray | Sequence[float]) -> Process:
        """Variance preserving: alpha^2 = prod (1 - beta), sigma^2 = 1 - alpha^2 (DDPM, arXiv 2006.11239)."""
        betas = np.asarray(betas, np.float64)
        abar = np.cumprod(1.0 - betas)
        return cls(np.sqrt(abar), np.sqrt(1 - abar), betas)

    @classmethod
    def from_alphas_cumprod(cls, abar: np.ndarray | Sequence[float]) -> Process:
        """Variance preserving, by the cumulative alphas (T,)."""
        abar = np.asarray(abar, np.float64)
        return cls(np.sqrt(abar), np.sqrt(1 - abar))

    @classmethod
    def exploding(cls, sigmas: np.ndarray | Sequence[float]) -> Process:
        """Variance exploding: alpha = 1, sigma (T,) as given, ascending (arXiv 2011.13456)."""
        sigmas = np.asarray(sigmas, np.float64)
        return cls(np.ones_like(sigmas), sigmas)

    @classmethod
    def rectified_flow(cls, steps: int = 1000) -> Process:
        """alpha = 1 - t, sigma = t with t = (i + 1) / T (rectified flow, arXiv 2209.03003)."""
        t = np.arange(1, steps + 1, dtype=np.float64) / steps
        return cls(1 - t, t)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha^2, (T,): of a variance-preserving process what DDPM calls the cumulative alphas."""
        return self.alpha**2

    def at(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at a time step, linear between whole ones; (1, 0), the clean image, before the first."""
        if t < 0:
            return 1.0, 0.0
        if float(t).is_integer():
            return float(self.alpha[int(t)]), float(self.sigma[int(t)])
        places = np.arange(len(self))
        return float(np.interp(t, places, self.alpha)), float(np.interp(t, places, self.sigma))


def clean_of(x: Tensor, eps: Tensor, alpha: float, sigma: float) -> Tensor:
    """x0-hat = (x_t - sigma eps) / alpha (DDIM, arXiv 2010.02502, eq. 9)."""
    return (x - sigma * eps) / alpha


def noise_of(kind: str, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The noise that a network's output says is in x_t.

    epsilon       the output itself
    v_prediction  v = alpha eps - sigma x_0 (arXiv 2202.00512), eps = (sigma x + alpha v) / (alpha^2 + sigma^2)
    sample        eps = (x - alpha x_0) / sigma
    flow          v = eps - x_0, eps = (x + alpha v) / (alpha + sigma)

    Raises:
        ValueError: another kind.
    """
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return (sigma * x + alpha * output) / (alpha**2 + sigma**2)
    if kind == "sample":
        return (x - alpha * output) / sigma
    if kind == "flow":
        return (x + alpha * output) / (alpha + sigma)
    raise ValueError(f"prediction {kind!r}: allowed are {', '.join(PREDICTIONS)}")


def slope_of(kind: str, alpha: float, sigma: float) -> float:
    """d output / d eps at a fixed x_t: what a change of the noise is in what a network predicts. Inverse of `noise_of` in eps.

    Raises:
        ValueError: another kind.
    """
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction {kind!r}: allowed are {', '.join(PREDICTIONS)}")
    slopes = {"epsilon": alpha, "v_prediction": alpha**2 + sigma**2, "sample": -sigma, "flow": alpha + sigma}
    return slopes[kind] / alpha
