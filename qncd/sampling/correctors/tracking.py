"""Trajectory tracking: an offline correction that leads the quantized run back to the full-precision one (not in the paper).

Both runs start from the same seed. At step t the quantized run is at x~ and predicts e~; the full-precision run goes on to
x_p. What e~ lacks, so that the sampler's step ends at x_p,

    y = (x_p - step(x~, e~)) / b,   step(x~, e) = a + b e,

is the error of this prediction and, beside it, all that earlier steps have left in x~. As much of y as a linear filter sees
is taken out: over the channels of e~ and x~ and 3 x 3 pixels, with a constant, another one for each step:

    e' = e~ + K_t * [e~; x~] + c_t.

Filters are fitted one step after another, on runs that earlier filters have corrected. A mean or a slope (PTQD, D2-DPM) is the
filter of 1 x 1 pixels over e~ alone, fitted to the error of one prediction; rounding noise is rough where predictions are
smooth, which only a filter over neighbours can tell apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qncd.recipe import Recipe
from qncd.sampling.corrector import Advance, Corrected, Corrector, CorrectorKind, Denoiser, Runs, check_record
from qncd.sampling.schedule import Step

TRACKED = 64  # trajectories that filters are fitted to, where twice the calibration set's are as many
SIDE = 3  # pixels of a filter
FOLDS = 4  # of cross-validation, by trajectories
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # on features of standard deviation 1
SURE = 2.0  # standard errors by which a filter has to help trajectories that it was not fitted to
PROBE = 1e-2  # by how much e is changed to see b
NEGLIGIBLE = 1e-10  # mean square of y, relative to that of e~, below which runs agree but for float error
FIELDS = ("kernels", "constants", "left")


@dataclass(frozen=True)
class TrackingFilters:
    """A filter for each of S steps.

    Attributes:
        kernels: (S, C, 2C, 3, 3), over e~ (the first C) and x~; 0 where no filter helps.
        constants: (S, C).
        left: (S,) cross-validated mean square of what the filter leaves of y, relative to y; 1 where no filter helps.
        images: trajectories that they were fitted to.
    """

    kernels: Tensor
    constants: Tensor
    left: Tensor
    images: int

    def to_tensors(self) -> tuple[dict[str, Tensor], str]:
        """The tensors by name, and the rest as JSON: what a safetensors file holds."""
        return {name: getattr(self, name).contiguous() for name in FIELDS}, json.dumps({"images": self.images})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], head: str) -> TrackingFilters:
        """The inverse of `to_tensors`. Raises KeyError for what is missing, TypeError or ValueError for something else."""
        record = cls(**{name: tensors[name] for name in FIELDS}, images=json.loads(head)["images"])
        shapes = {"constants": ("S", "C"), "left": ("S",), "kernels": ("S", "C", 2 * record.channels, SIDE, SIDE)}
        check_record(record, shapes, record.images)
        return record

    @property
    def channels(self) -> int:
        """C of the predictions that it corrects."""
        return self.constants.shape[-1]


def _padded(eps: Tensor, x: Tensor) -> Tensor:
    """e~ and x~ as (N, 2C, H + 2, W + 2): pixels beyond the edge are those at it."""
    return F.pad(torch.cat([eps, x.to(eps)], 1), [SIDE // 2] * 4, mode="replicate")


def filtered(eps: Tensor, x: Tensor, kernel: Tensor, constant: Tensor) -> Tensor:
    """K * [e~; x~] + c, (N, C, H, W). Image by image: kernels chosen for a batch size would round otherwise."""
    kernel, constant = kernel.to(eps), constant.to(eps)
    return torch.cat([F.conv2d(image[None], kernel, constant) for image in _padded(eps, x)])


class TrackingCorrector:
    """Corrects every prediction by the filter of its step; costs no network call. Args: filters of the same time steps."""

    def __init__(self, filters: TrackingFilters) -> None:
        self.filters = filters

    def begin(self, seeds: Sequence[int], device: str) -> None:
        """Nothing: the filters hold for every image."""

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        filters, i = self.filters, step.index
        if i >= len(filters.left):
            raise ValueError(f"the tracking filters have {len(filters.left)} steps, none for step {i}: made for another sampler")
        kernel = filters.kernels[i]
        return Corrected(eps + filtered(eps, x, kernel, filters.constants[i]) if bool(kernel.any()) else eps)


class TrackingFitter:
    """A corrector that makes its filters as it goes; all trajectories are one batch.

    Args:
        trajectory: what the full-precision run of the same seeds came to, (N, C, H, W) after each of the steps.
    """

    def __init__(self, trajectory: Sequence[Tensor]) -> None:
        self.trajectory = trajectory
        self.fitted: list[tuple[Tensor, Tensor, float]] = []

    def begin(self, seeds: Sequence[int], device: str) -> None:
        """Start over."""
        self.fitted = []

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        end = advance(eps).x_prev
        gain = float((advance(eps + PROBE).x_prev - end).mean()) / PROBE
        lack = (self.trajectory[step.index].to(end) - end) / gain if gain else torch.zeros_like(eps)
        if not bool(torch.isfinite(lack).all() and torch.isfinite(eps).all() and torch.isfinite(x).all()):
            raise ValueError(f"step {step.index}: what the prediction lacks is NaN or infinite")
        kernel, constant, left = fit_filter(eps, x, lack)
        self.fitted.append((kernel, constant, left))
        return Corrected(eps + filtered(eps, x, kernel, constant) if left < 1 else eps)

    def filters(self) -> TrackingFilters:
        """Of all steps that were taken."""
        kernels, constants, left = zip(*self.fitted, strict=True)
        images = len(self.trajectory[0])
        return TrackingFilters(torch.stack(kernels).cpu(), torch.stack(constants).cpu(), torch.tensor(left), images)


def fit_filter(eps: Tensor, x: Tensor, lack: Tensor) -> tuple[Tensor, Tensor, float]:
    """The filter over `eps` and `x` (N, C, H, W) that gives most of `lack` on images that it was not fitted to.

    Weighted least squares, each image by the inverse of its own mean square, so that the few that are far off do not decide
    for all. Size of the filter (1 or 3 pixels) and ridge are those of the least error in cross-validation over images; a
    filter that does not help by 2 standard errors is none.

    Returns:
        kernel (C, 2C, 3, 3), constant (C,), and the part of `lack` that it leaves, 1 with a filter of zeros.
    """
    count, channels = eps.shape[:2]
    kernel = torch.zeros(channels, 2 * channels, SIDE, SIDE, device=eps.device)
    nothing = (kernel, torch.zeros(channels, device=eps.device), 1.0)
    power = lack.double().square().mean((1, 2, 3))
    if count < FOLDS or float(power.mean()) <= NEGLIGIBLE * float(eps.double().square().mean()):
        return nothing
    floored = power.clamp(min=1e-3 * float(power.mean()))
    grams, products = _moments(eps, x, lack, 1 / floored)
    squares = (power / floored).cpu() * channels
    middle = torch.zeros(2 * channels, SIDE * SIDE, dtype=torch.bool)
    middle[:, SIDE * SIDE // 2] = True
    ones = torch.ones(1, dtype=torch.bool)
    best = (1.0, *nothing[:2])
    for chosen in (torch.cat([middle.flatten(), ones]), torch.cat([torch.ones_like(middle).flatten(), ones])):
        gram, product = grams[:, chosen][:, :, chosen], products[:, chosen]
        errors = _held_out_errors(gram, product, squares)  # (ridges, N)
        gains = squares - errors
        sure = gains.mean(1) > SURE * gains.std(1) / count**0.5
        relative = torch.where(sure, errors.sum(1) / squares.sum(), 2.0)
        left = float(relative.min())
        if left < best[0]:
            weights = torch.zeros(len(chosen), channels, dtype=torch.float64)
            weights[chosen] = _solve(gram.mean(0), product.mean(0), [RIDGES[int(relative.argmin())]])[0]
            shaped = weights[:-1].T.reshape(channels, 2 * channels, SIDE, SIDE).float().to(eps.device)
            best = (left, shaped, weights[-1].float().to(eps.device))
    return best[1], best[2], best[0]


def _moments(eps: Tensor, x: Tensor, lack: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, weighted: (N, F, F) and (N, F, C) of its features (neighbours of each pixel, and 1) and of `lack`."""
    grams, products = [], []
    for image, target, weight in zip(_padded(eps, x), lack, weights, strict=True):
        patches = F.unfold(image[None].double(), SIDE)[0]  # (2C k k, P)
        features = torch.cat([patches, torch.ones_like(patches[:1])])
        share = weight / patches.shape[1]
        grams.append((share * (features @ features.T)).cpu())
        products.append((share * (features @ target.double().flatten(1).T)).cpu())
    return torch.stack(grams), torch.stack(products)


def _solve(gram: Tensor, product: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """Ridge regression (F, C) for each of the ridges, on features scaled to mean square 1."""
    size = gram.diagonal().clamp(min=1e-30).sqrt()
    values, vectors = torch.linalg.eigh(gram / size / size[:, None])
    turned = vectors.T @ (product / size[:, None])
    return [vectors @ (turned / (values + ridge)[:, None]) / size[:, None] for ridge in ridges]


def _held_out_errors(grams: Tensor, products: Tensor, squares: Tensor) -> Tensor:
    """(ridges, N): weighted squared error of each image, by weights fitted to the other folds' images."""
    fold = torch.arange(len(grams)) % FOLDS
    errors = torch.empty(len(RIDGES), len(grams), dtype=torch.float64)
    for held in range(FOLDS):
        others, rows = fold != held, fold == held
        for index, weights in enumerate(_solve(grams[others].mean(0), products[others].mean(0), RIDGES)):
            explained = 2 * (weights * products[rows]).sum((1, 2)) - (weights * (grams[rows] @ weights)).sum((1, 2))
            errors[index, rows] = squares[rows] - explained
    return errors


def _tracked(runs: Runs) -> int:
    """Trajectories; a pipeline may hold each sample twice."""
    return max(runs.samples, min(2 * runs.samples, TRACKED))


class Tracking(CorrectorKind):
    """Trajectory tracking. Takes as many trajectories as calibration, twice as many where that has fewer than TRACKED.

    All their steps are held: trajectories * steps * C * H * W floats.
    """

    prefix, record = "tracking", TrackingFilters

    def before(self, runs: Runs, recipe: Recipe) -> list[Tensor]:
        return runs.trajectory(_tracked(runs))

    def fit(self, runs: Runs, recipe: Recipe, seen: list[Tensor]) -> TrackingFilters:
        fitter = TrackingFitter(seen)
        runs.follow(fitter, _tracked(runs))
        return fitter.filters()

    def corrector(self, recipe: Recipe, record: TrackingFilters) -> Corrector:
        return TrackingCorrector(record)
