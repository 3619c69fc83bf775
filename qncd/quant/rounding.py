"""AdaRound: learned rounding of weights (arXiv 2004.10568), with BRECQ's loss and schedule (arXiv 2102.05426).

Symbols: w weight, s its scale, alpha one variable a weight, h(alpha) in [0, 1] how far it is rounded up, beta the
regularizer's exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qncd.quant.affine import IntegerRange
from qncd.quant.layers import QuantLayer
from qncd.recipe import check_int

ZETA, GAMMA = 1.1, -0.1  # the rectified sigmoid reaches 0 and 1 at finite alpha


@dataclass(frozen=True)
class RoundingSchedule:
    """How the regularizer grows: none during the warm-up, then beta falls linearly from `start` to `end`.

    Attributes:
        iterations: of the whole optimization.
        weight: of the regularizer (lambda).
        warmup: share of the iterations without it.
    """

    iterations: int
    weight: float = 0.01
    start: float = 20.0
    end: float = 2.0
    warmup: float = 0.2

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, 1)

    def beta(self, iteration: int) -> float:
        """beta at iteration 1, 2, ... The papers say cosine; every released code computes this line."""
        begin = self.warmup * self.iterations
        if iteration < begin:
            return self.start
        left = max(0.0, 1 - (iteration - begin) / max(1e-9, self.iterations - begin))
        return self.end + (self.start - self.end) * left

    def active(self, iteration: int) -> bool:
        """Whether the regularizer counts at this iteration."""
        return iteration >= self.warmup * self.iterations


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1) (AdaRound, eq. 23)."""
    return torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def initial_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """alpha at which the soft weight is the weight itself: h(alpha) = w/s - floor(w/s)."""
    fraction = weight / scale - torch.floor(weight / scale)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def rounding_regularizer(h: Tensor, beta: float) -> Tensor:
    """sum(1 - |2h - 1|^beta): 0 where every h is 0 or 1 (AdaRound, eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def reconstruction_loss(predicted: Tensor, target: Tensor, p: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """|predicted - target|^p, times weights that broadcast against it, summed over dimension 1, mean over the rest."""
    error = (predicted - target).abs().pow(p)
    return (error if weights is None else error * weights).sum(1).mean()


class LearnedRounding:
    """The rounding variables of one layer while they are learned.

    Args:
        layer: its ranges are known, its weight is still in floating point.

    Attributes:
        alpha: the variables, shape of the weight; a leaf that an optimizer moves.
    """

    def __init__(self, layer: QuantLayer) -> None:
        layer.search_weight_range_()
        codes = layer.config.weight_codes
        if not isinstance(codes, IntegerRange):
            raise ValueError("a layer without integer codes of its weights has no rounding to learn")
        self.codes = codes
        self.scale = layer.expanded_scale().detach()
        weight = layer.weight.detach()
        self.floor = torch.floor(weight / self.scale)
        self.alpha = initial_alpha(weight, self.scale).requires_grad_(True)

    def h(self) -> Tensor:
        """How far each weight is rounded up, 0 to 1."""
        return rectified_sigmoid(self.alpha)

    def soft(self, h: Tensor | None = None) -> Tensor:
        """The weight in between its two neighbours on the grid; gradients flow to alpha."""
        up = self.h() if h is None else h
        return (self.floor + up).clamp(self.codes.qmin, self.codes.qmax) * self.scale

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight on the grid: rounded up where alpha >= 0."""
        return self.hard_codes() * self.scale

    @torch.no_grad()
    def hard_codes(self) -> Tensor:
        """The codes of `hard`, floats of the weight's shape."""
        return (self.floor + (self.alpha >= 0)).clamp(self.codes.qmin, self.codes.qmax)


def backpropagate(loss: Tensor, parameters: Sequence[Tensor], average_: Callable[[Tensor], Tensor] | None) -> float:
    """Gradients of a loss, and its value; with several processes, the means of theirs.

    Args:
        parameters: leaves; their old gradients are forgotten.
        average_: of a tensor over all processes, in place; None where there is one process.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    if average_ is not None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        means = average_(torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)]))
        loss = means[0]
        for parameter, mean in zip(parameters, means[1:].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = mean.view_as(parameter)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value


def learn_roundings_(
    roundings: Mapping[str, LearnedRounding],
    iterations: int,
    lr: float,
    error: Callable[[dict[str, Tensor]], Tensor],
    average_: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Move the rounding variables of several layers so that an error of their soft weights gets small, and every h 0 or 1.

    Args:
        lr: of Adam.
        error: soft weights by the layers' names -> what is minimized beside the regularizer, 0-dim; called once an iteration.
        average_: as in `backpropagate`: the mean of the processes' errors is minimized, every process takes the same steps.

    Raises:
        FloatingPointError: the loss is NaN or infinite; names the iteration.
    """
    schedule = RoundingSchedule(iterations)
    alphas = [rounding.alpha for rounding in roundings.values()]
    optimizer = torch.optim.Adam(alphas, lr=lr)
    for iteration in range(1, iterations + 1):
        h = {name: rounding.h() for name, rounding in roundings.items()}
        loss = error({name: rounding.soft(h[name]) for name, rounding in roundings.items()})
        if schedule.active(iteration):
            beta = schedule.beta(iteration)
            loss = loss + schedule.weight * torch.stack([rounding_regularizer(value, beta) for value in h.values()]).sum()
        try:
            backpropagate(loss, alphas, average_)
        except FloatingPointError as problem:
            raise FloatingPointError(f"{problem} at iteration {iteration}") from None
        optimizer.step()
