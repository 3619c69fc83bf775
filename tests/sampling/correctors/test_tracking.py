"""Trajectory tracking: errors that a filter sees are taken out, and a model without errors is left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qncd.recipe import Recipe, SamplerConfig
from qncd.sampling.correctors.registry import corrector_of
from qncd.sampling.correctors.tracking import (
    SURE,
    TrackingCorrector,
    TrackingFilters,
    TrackingFitter,
    _held_out_errors,
    filtered,
    fit_filter,
)
from qncd.sampling.process import Process
from qncd.sampling.samplers import sample
from qncd.sampling.schedule import linear_betas

BETAS = list(linear_betas(1e-4, 0.02, 1000))
PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
SHAPE = (3, 12, 12)


def exact(x: Tensor, t: int) -> Tensor:
    """Smooth over pixels, as predictions of networks are but for what is noise in x."""
    return 0.9 * x + 0.1 * F.avg_pool2d(F.pad(torch.sin(2 * x), [1] * 4, mode="replicate"), 3, 1)


def run(denoise: Any, config: SamplerConfig, seeds: range, corrector: Any = None, callback: Any = None) -> Tensor:
    return sample(config, PROCESS, denoise, SHAPE, seeds, "cpu", corrector, callback)


def fitted(rough: Any, config: SamplerConfig, images: int = 32) -> TrackingFilters:
    trajectory: list[Tensor] = []
    seeds = range(1000, 1000 + images)
    run(exact, config, seeds, callback=lambda state: trajectory.append(state.x_prev))
    fitter = TrackingFitter(trajectory)
    run(rough, config, seeds, fitter)
    return fitter.filters()


CONFIGS = [SamplerConfig(kind, timesteps=5, eta=eta, convention=convention) for kind, eta, convention in (
    ("generalized", 0.0, "ddim"), ("generalized", 1.0, "ddim"), ("ddpm_noisy", 0.0, "ddim"), ("plms", 0.0, "ldm"),
    ("dpm_solver", 0.0, "ldm"),
)]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.sample_type}-{config.eta:g}")
def test_the_full_precision_model_is_left_alone(config: SamplerConfig) -> None:
    filters = fitted(exact, config)
    assert not filters.kernels.any() and bool((filters.left == 1).all())
    assert run(exact, config, range(4), TrackingCorrector(filters)).equal(run(exact, config, range(4)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.sample_type}-{config.eta:g}")
def test_known_gain_bias_and_channel_errors_are_taken_out(config: SamplerConfig) -> None:
    shift = torch.tensor([0.05, -0.02, 0.0]).view(3, 1, 1)

    def rough(x: Tensor, t: int) -> Tensor:
        return 0.97 * exact(x, t) + shift

    corrector, seeds = TrackingCorrector(fitted(rough, config)), range(8)
    reference = run(exact, config, seeds)
    plain, tracked = ((run(rough, config, seeds, c) - reference).square().mean() for c in (None, corrector))
    assert tracked < 0.02 * plain


def test_rough_noise_on_a_smooth_prediction_is_filtered() -> None:
    """What no mean and no slope can take out: noise of single pixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(32, 3, 2, 2, generator=generator)
    smooth = F.interpolate(coarse, size=SHAPE[1:], mode="bilinear", align_corners=True)
    rough = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    lack, x = smooth - rough, torch.zeros_like(smooth)
    kernel, constant, left = fit_filter(rough, x, lack)
    rest = lack - filtered(rough, x, kernel, constant)
    assert rest.square().mean() < 0.4 * lack.square().mean()
    assert left == pytest.approx(float(rest.square().mean() / lack.square().mean()), rel=0.1)


def test_an_error_that_no_filter_sees_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    eps, x, lack = torch.randn(3, 32, *SHAPE, generator=generator)
    kernel, constant, left = fit_filter(eps, x, lack)
    assert left > 0.99 and kernel.abs().max() < 0.05 and constant.abs().max() < 0.05
    assert SURE >= 2


def test_held_out_errors_are_those_of_ridge_regression_without_the_fold() -> None:
    """By the normal equations, from the features themselves: six ridges on features of mean square 1, every fourth image out."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(8, 50, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 3.0])
    targets = torch.randn(8, 50, 2, generator=generator, dtype=torch.float64) + features[..., :2]
    grams, products = (features.mT @ other / 50 for other in (features, targets))
    found = _held_out_errors(grams, products, targets.square().sum((1, 2)) / 50)
    for row, ridge in zip(found, (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0), strict=True):
        for image, error in enumerate(row):
            others = [i for i in range(8) if i % 4 != image % 4]
            gram = grams[others].mean(0)
            weights = torch.linalg.solve(gram + ridge * gram.diagonal().diag(), products[others].mean(0))
            expected = (targets[image] - features[image] @ weights).square().sum() / 50
            assert float(error) == pytest.approx(float(expected), rel=1e-9)


def test_few_images_get_no_filter() -> None:
    eps, x = torch.randn(2, 3, *SHAPE)
    kernel, _, left = fit_filter(eps, x, 0.1 * eps)
    assert left == 1 and not kernel.any()


def test_an_image_does_not_depend_on_its_batch() -> None:
    eps, x = torch.randn(2, 7, *SHAPE, generator=torch.Generator().manual_seed(0))
    kernel, constant = torch.randn(3, 6, 3, 3), torch.randn(3)
    alone = torch.cat([filtered(eps[i : i + 1], x[i : i + 1], kernel, constant) for i in range(7)])
    assert alone.equal(filtered(eps, x, kernel, constant))


def test_one_far_trajectory_does_not_decide_for_all() -> None:
    """Thirty images lack a tenth of e; one is off by a hundred times as much, and by something else."""
    generator = torch.Generator().manual_seed(0)
    eps, x = torch.randn(2, 31, *SHAPE, generator=generator)
    lack = 0.1 * eps
    lack[0] = -10 * eps[0]
    kernel, _, left = fit_filter(eps, x, lack)
    middle = torch.stack([kernel[i, i, 1, 1] for i in range(3)])
    torch.testing.assert_close(middle, torch.full((3,), 0.1), rtol=0, atol=0.03)
    assert left < 0.3


def test_filters_are_kept_and_refused_where_they_do_not_fit() -> None:
    config = CONFIGS[0]
    filters = fitted(lambda x, t: 1.1 * exact(x, t), config)
    tensors, head = filters.to_tensors()
    again = TrackingFilters.from_tensors(tensors, head)
    assert again.images == 32 and again.kernels.equal(filters.kernels)
    longer = SamplerConfig(timesteps=8)
    with pytest.raises(ValueError, match="have 5 steps, none for step 5"):
        run(exact, longer, range(2), TrackingCorrector(filters))
    with pytest.raises(ValueError, match="ptqd: made for another correction"):
        corrector_of(Recipe(offline="ptqd"), filters)
    assert math.isclose(float(filters.left[0]), 0.0, abs_tol=1e-3)
