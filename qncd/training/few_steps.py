"""Distillation of a text-to-image model into one of few steps: a student that follows its teacher's path in long strides.

The teacher's deterministic sampler (DDIM) takes every noise to one image along one path. The student learns, for each of its few
steps, the velocity that leads from where it is to where the teacher is at the step's end (progressive distillation,
arXiv 2202.00512, with the whole path of the teacher at hand), guidance included. Its schedule ends in pure noise (zero-terminal
SNR, arXiv 2305.08891); the levels between are the teacher's at the same signal-to-noise ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Strides:
    """The few steps of a student, the noisiest first.

    Attributes:
        times: its time steps, (K,).
        alpha, sigma: levels at the K time steps and at the end, the clean image: (K + 1,).
    """

    times: tuple[int, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> Strides:
        """Those that a variance-preserving scheduler of diffusers takes in so many steps."""
        scheduler.set_timesteps(steps)
        times = [int(t) for t in scheduler.timesteps]
        abar = np.append(scheduler.alphas_cumprod.double().numpy()[times], 1.0)
        return cls(tuple(times), tuple(np.sqrt(abar).tolist()), tuple(np.sqrt(1 - abar).tolist()))

    def __len__(self) -> int:
        return len(self.times)


@torch.no_grad()
def teacher_path(
    noise: Tensor, predict: Callable[[Tensor, int], Tensor], abar: np.ndarray, strides: Strides, substeps: int
) -> Tensor:
    """Where the teacher is at the beginning of each of the student's steps and at the end, (N, K + 1, C, H, W).

    Args:
        noise: (N, C, H, W), the start of both.
        predict: (x, time step of the teacher) -> noise, guidance included.
        abar: the teacher's cumulative alphas, (T,).
        substeps: DDIM steps of the teacher in each of the student's.
    """
    ratio = np.log(abar) - np.log1p(-abar)  # falls with t

    def time_at(alpha: float, sigma: float) -> float:
        """The teacher's time step, a fraction, of the same signal-to-noise ratio; -1 is the clean image."""
        if sigma == 0:
            return -1.0
        if alpha == 0:
            return len(abar) - 1.0
        return float(np.interp(-2 * (np.log(alpha) - np.log(sigma)), -ratio, np.arange(len(abar))))

    borders = [time_at(*level) for level in zip(strides.alpha, strides.sigma, strict=True)]
    x, kept = noise, [noise]
    for first, last in pairwise(borders):
        times = np.linspace(first, last, substeps + 1)
        levels = np.interp(times, np.arange(-1, len(abar)), [1.0, *abar])
        for time, now, then in zip(times, levels, levels[1:], strict=False):
            eps = predict(x, max(0, round(float(time))))
            clean = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
            x = np.sqrt(then) * clean + np.sqrt(1 - then) * eps
        kept.append(x)
    return torch.stack(kept, 1)


class StrideDistillation(nn.Module):
    """The squared error of the student's velocity, from points of the teacher's path and from where the student itself gets.

    Attributes:
        unet: the student, a UNet2DConditionModel that predicts v.
        text: a module, token ids of each text encoder (N, L) -> (context (N, L, D), pooled (N, P)).
    """

    alpha: Tensor
    sigma: Tensor
    times: Tensor
    time_ids: Tensor

    def __init__(self, unet: nn.Module, text: nn.Module, time_ids: Sequence[float], strides: Strides, own_share: float) -> None:
        """
        Args:
            time_ids: SDXL's sizes and crop, the same for all images.
            own_share: share of the batch that begins where one step of the student from the point before leads.
        """
        super().__init__()
        self.unet, self.text, self.own_share = unet, text, own_share
        self.register_buffer("alpha", torch.tensor(strides.alpha))
        self.register_buffer("sigma", torch.tensor(strides.sigma))
        self.register_buffer("times", torch.tensor(strides.times))
        self.register_buffer("time_ids", torch.tensor([time_ids], dtype=torch.float32))

    def forward(self, path: Tensor, *tokens: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            path: of the teacher, (N, K + 1, C, H, W).
            tokens: ids for each text encoder, (N, L).
        """
        rows, steps = torch.arange(len(path), device=path.device), path.shape[1] - 1
        step = torch.randint(steps, (len(path),), device=path.device)
        context, pooled = self.text(*tokens)
        x = path[rows, step]
        own = (torch.rand(len(path), device=path.device) < self.own_share) & (step > 0)
        if own.any():
            with torch.no_grad():
                before = step[own] - 1
                x = x.clone()
                x[own] = self._stride(path[rows[own], before], before, context[own], pooled[own])
        target = self._velocity(x, path[rows, step + 1], step)
        return (self._predict(x, step, context, pooled) - target).square().mean()

    def _predict(self, x: Tensor, step: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(len(x), -1)}
        return self.unet(x, self.times[step], context, added_cond_kwargs=added).sample.float()

    def _levels(self, step: Tensor) -> tuple[Tensor, ...]:
        """alpha and sigma at the beginning and at the end of steps (N,), each (N, 1, 1, 1)."""
        return tuple(
            level.view(-1, 1, 1, 1) for level in (self.alpha[step], self.sigma[step], self.alpha[step + 1], self.sigma[step + 1])
        )

    def _stride(self, x: Tensor, step: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Where a step of the student leads."""
        alpha, sigma, alpha_then, sigma_then = self._levels(step)
        v = self._predict(x, step, context, pooled)
        return alpha_then * (alpha * x - sigma * v) + sigma_then * (sigma * x + alpha * v)

    def _velocity(self, x: Tensor, then: Tensor, step: Tensor) -> Tensor:
        """The v with which a step leads from x to `then`; inverse of `_stride` in v."""
        alpha, sigma, alpha_then, sigma_then = self._levels(step)
        # then = (alpha' alpha + sigma' sigma) x + (sigma' alpha - alpha' sigma) v
        return (then - (alpha_then * alpha + sigma_then * sigma) * x) / (sigma_then * alpha - alpha_then * sigma)


class TwoTextEncoders(nn.Module):
    """SDXL's conditioning: penultimate hidden states of both text encoders side by side, the second's pooled projection."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (N, L) each -> context (N, L, D1 + D2), pooled (N, P)."""
        one = self.first(first, output_hidden_states=True)
        two = self.second(second, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two[0]
