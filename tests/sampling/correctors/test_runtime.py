"""Runtime noise estimation: what it recovers, exactly, where the true noise is known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qncd.recipe import CorrectionConfig, SamplerConfig
from qncd.rng import CORRECTOR_STREAM, ImageNoise
from qncd.sampling.corrector import Corrected, Tentative
from qncd.sampling.correctors.runtime import (
    SHRINK_SPREADS,
    TABLE_TENSORS,
    Estimate,
    NoiseRecorder,
    NoiseTable,
    RuntimeNoiseCorrector,
    estimate_noise,
    is_due,
)
from qncd.sampling.process import Process
from qncd.sampling.samplers import StepState, ddim_step, reduced_sigma, sample
from qncd.sampling.schedule import Step, linear_betas, make_steps

BETAS = linear_betas(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
PROCESS = Process.from_betas(BETAS)
SHAPE = (3, 16, 16)
ETAS = [0.0, 0.5, 1.0]
BARE = {"control": False, "shrink": False, "interval": 1, "target": "consistent"}


def steps_of(eta: float = 0.0, count: int = 20) -> list[Step]:
    return make_steps(SamplerConfig(timesteps=count, eta=eta), PROCESS)


def step_of(index: int, t: int, t_prev: int, abar: float, abar_prev: float) -> Step:
    """Of a variance-preserving process, by its cumulative alphas."""
    levels = [math.sqrt(level) for level in (abar, 1 - abar, abar_prev, 1 - abar_prev)]
    return Step(index, t, t_prev, *levels, 0.0, 0.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_for(x0: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The exact noise prediction where every image is x0."""
    return lambda x, t: (x - math.sqrt(ABAR[t]) * x0) / math.sqrt(1 - ABAR[t])


def exact_for_gaussian(variance: float) -> Callable[[Tensor, int], Tensor]:
    """The exact noise prediction where images are N(0, variance I): k_t x."""
    return lambda x, t: slope(t, variance) * x


def slope(t: int, variance: float) -> float:
    return math.sqrt(1 - ABAR[t]) / (ABAR[t] * variance + 1 - ABAR[t])


def constant_table(
    steps: Sequence[Step], value: float = 0.0, spread: float = 0.0, variance: float = 0.0, images: int = 10**9
) -> NoiseTable:
    """A table of 3 channels whose row i predicts value * (i + 1), whatever x^_t and z are; of so many images that it is sure."""
    count = len(steps)
    coefficients = torch.zeros(count, 3, 3)
    coefficients[:, :, 0] = value * torch.arange(1, count + 1)[:, None]
    spreads = torch.full((count, 3), spread)
    return NoiseTable(
        indices=tuple(range(count)),
        coefficients=coefficients,
        spread=spreads,
        coefficients_all=coefficients[:, 0].clone(),
        spread_all=spreads[:, 0].clone(),
        variance=torch.full((count,), variance),
        images=images,
        target="consistent",
    )


@pytest.mark.parametrize("interval", range(1, 13))
def test_estimates_are_due_as_in_the_released_code(interval: int) -> None:
    for step_number in range(1, 101):
        assert is_due(step_number - 1, interval) == ((step_number - 2) % interval == interval // 2 % interval)
    if interval >= 2:  # the same without the inner remainder, as it was published
        assert [is_due(i, interval) for i in range(60)] == [(i - 1) % interval == interval // 2 for i in range(60)]
    due = [i for i in range(1000) if is_due(i, interval)]
    assert all(b - a == interval for a, b in itertools.pairwise(due)) and due[0] <= interval


@pytest.mark.parametrize("eta", ETAS)
def test_an_exact_prediction_has_no_difference(eta: float) -> None:
    """All noise in the re-noised sample is known, so that the consistent target is what an exact network predicts there."""
    x0 = normal(0, 2, *SHAPE)
    for step in steps_of(eta):
        x = step.alpha * x0 + step.noise * normal(1, 2, *SHAPE)
        denoise, z, draw = exact_for(x0), normal(2, 2, *SHAPE), normal(3, 2, *SHAPE)
        eps = denoise(x, step.t)

        def advance(e: Tensor, x: Tensor = x, step: Step = step, draw: Tensor = draw) -> Tentative:
            return ddim_step(x, e, step, draw, step.sigma)

        d = estimate_noise(step, x, eps, denoise, advance, z, "consistent").d
        assert d.abs().max() < 1e-9


@pytest.mark.parametrize("sample_type", ["generalized", "ddpm_noisy", "dpm_solver"])
def test_the_corrector_leaves_an_exact_network_as_it_is(sample_type: str) -> None:
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    config = SamplerConfig(sample_type, timesteps=20, eta=0.5 if sample_type == "generalized" else 0.0)
    corrector = RuntimeNoiseCorrector(CorrectionConfig(**BARE))
    plain = sample(config, PROCESS, exact_for(x0), SHAPE, [1, 2])
    corrected = sample(config, PROCESS, exact_for(x0), SHAPE, [1, 2], corrector=corrector)
    torch.testing.assert_close(plain, x0.expand(2, *SHAPE), rtol=0, atol=1e-3)
    torch.testing.assert_close(corrected, plain, rtol=0, atol=1e-3)


class KnownTrial:
    """A step at which the clean image and the noise in the trial step are known, whatever the network says."""

    def __init__(self, eta: float, index: int = 8, count: int = 4) -> None:
        self.step = steps_of(eta)[index]
        self.x0, noise = normal(0, count, 3, 64, 64), normal(1, count, 3, 64, 64)
        self.x = self.step.alpha * self.x0 + self.step.noise * noise
        self.true_eps = exact_for(self.x0)(self.x, self.step.t)
        self.draw = normal(2, count, 3, 64, 64)
        self.exact = exact_for(self.x0)

    def advance(self, _: Tensor) -> Tentative:
        return ddim_step(self.x, self.true_eps, self.step, self.draw, self.step.sigma)

    def correct(self, denoise: Callable[[Tensor, int], Tensor], table: NoiseTable | None = None, **config: Any) -> Corrected:
        corrector = RuntimeNoiseCorrector(CorrectionConfig(**{**BARE, **config}), table)
        corrector.begin(range(len(self.x)), "cpu")
        return corrector.correct(self.step, self.x, denoise(self.x, self.step.t), denoise, self.advance)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("statistics", ["sample", "batch"])
def test_a_constant_bias_is_recovered(eta: float, statistics: str) -> None:
    trial = KnownTrial(eta)
    corrected = trial.correct(lambda x, t: trial.exact(x, t) + 0.3, statistics=statistics)
    torch.testing.assert_close(corrected.eps, trial.true_eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", ETAS)
def test_a_bias_of_each_image_and_channel_is_recovered(eta: float) -> None:
    trial = KnownTrial(eta)
    by_image, by_channel = torch.linspace(-0.2, 0.3, 4).view(4, 1, 1, 1), torch.tensor([0.1, -0.4, 0.02]).view(1, 3, 1, 1)
    both = by_image + by_channel

    def biased(bias: Tensor) -> Callable[[Tensor, int], Tensor]:
        return lambda x, t: trial.exact(x, t) + bias

    torch.testing.assert_close(trial.correct(biased(both), statistics="channel").eps, trial.true_eps, rtol=0, atol=1e-6)
    by_sample = trial.correct(biased(both), statistics="sample").eps - trial.true_eps
    torch.testing.assert_close(by_sample, (by_channel - by_channel.mean()).double().expand_as(by_sample), rtol=0, atol=1e-6)
    by_batch = trial.correct(biased(both), statistics="batch").eps - trial.true_eps
    torch.testing.assert_close(by_batch, (both - both.mean()).double().expand_as(by_batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("statistics", ["sample", "batch", "channel"])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_the_variance_of_added_noise_is_recovered(tau: float, statistics: str) -> None:
    trial = KnownTrial(1.0)
    seeds = iter(range(100, 200))

    def noisy(x: Tensor, t: int) -> Tensor:
        return trial.exact(x, t) + 0.2 + tau * normal(next(seeds), *x.shape)

    variance = trial.correct(noisy, statistics=statistics).variance
    assert (
        variance is not None
        and variance.shape == {"sample": (4, 1, 1, 1), "batch": (1, 1, 1, 1), "channel": (4, 3, 1, 1)}[statistics]
    )
    torch.testing.assert_close(variance, torch.full_like(variance, tau**2), rtol=0.1, atol=0)
    assert trial.correct(noisy, statistics=statistics, correct_variance=False).variance is None
    known = trial.correct(noisy, constant_table(steps_of(), variance=tau**2 / 2), statistics=statistics, control=True).variance
    assert known is not None
    torch.testing.assert_close(known, torch.full_like(known, tau**2 / 2), rtol=0.2, atol=0)


@pytest.mark.parametrize("target", ["consistent", "paper"])
@pytest.mark.parametrize("eta", ETAS)
def test_what_a_bias_does_to_the_difference_while_sampling(eta: float, target: str) -> None:
    """With the trial step built from the biased prediction, the difference moves by g*b, not by b.

    Images N(0, v I), so that the exact network is k x with k = s/(abar v + s^2), s = sqrt(1-abar_t). The trial carries
    the bias on: x0-hat by -s/sqrt(abar) b and x^_t by (m - s) b with m = r sqrt(1-abar_p-sigma^2). Hence
    g = 1 + k (m - s) for the target z, and (1 - k s)(1 - m/s) for the consistent one, whose own n moves by m/s b.
    """
    v, bias = 0.25, 0.3
    gains = []
    for step in steps_of(eta):
        if step.t == 0:
            continue
        exact, x, z, draw = exact_for_gaussian(v), normal(1, 2, *SHAPE), normal(2, 2, *SHAPE), normal(3, 2, *SHAPE)

        def advance(e: Tensor, x: Tensor = x, step: Step = step, draw: Tensor = draw) -> Tentative:
            return ddim_step(x, e, step, draw, step.sigma)

        def difference(b: float, x: Tensor = x, step: Step = step, z: Tensor = z) -> Tensor:
            def denoise(x: Tensor, t: int) -> Tensor:
                return exact(x, t) + b  # noqa: B023

            return estimate_noise(step, x, denoise(x, step.t), denoise, advance, z, target).d

        s, k = step.noise, slope(step.t, v)
        m = math.sqrt(step.alpha**2 / step.alpha_prev**2 * (step.noise_prev**2 - step.sigma**2))
        gain = 1 + k * (m - s) if target == "paper" else (1 - k * s) * (1 - m / s)
        moved = difference(bias) - difference(0.0)
        torch.testing.assert_close(moved, torch.full_like(moved, gain * bias), rtol=1e-6, atol=1e-9)
        gains.append(gain)
    assert all(0 < gain <= 1 for gain in gains)


def test_what_added_noise_does_to_the_variance_while_sampling() -> None:
    """White noise tau*xi in both predictions: the trial carries the first on by g - 1, so that var(d) = (1 + (1-g)^2) tau^2."""
    v, tau = 0.25, 0.4
    for step in steps_of(0.0)[4:-1:5]:
        x, z = normal(1, 1, 3, 128, 128), normal(2, 1, 3, 128, 128)
        s, k = step.noise, slope(step.t, v)
        m = math.sqrt(step.alpha**2 / step.alpha_prev**2 * step.noise_prev**2)
        gain = (1 - k * s) * (1 - m / s)

        def advance(e: Tensor, x: Tensor = x, step: Step = step) -> Tentative:
            return ddim_step(x, e, step, None, 0.0)

        def difference(tau: float, x: Tensor = x, step: Step = step, z: Tensor = z) -> Tensor:
            seeds = iter((5, 6))

            def denoise(x: Tensor, t: int) -> Tensor:
                return exact_for_gaussian(v)(x, t) + tau * normal(next(seeds), *x.shape)

            return estimate_noise(step, x, denoise(x, step.t), denoise, advance, z, "consistent").d

        variance = float((difference(tau) - difference(0.0)).var())
        assert variance == pytest.approx((1 + (1 - gain) ** 2) * tau**2, rel=0.03)


@pytest.mark.parametrize("row", range(8))
def test_the_papers_estimate_is_the_released_codes(golden: Any, row: int) -> None:
    """sample_reverse of the original: re-noised sample, prediction there, and the mean of the difference to z."""
    data = golden("qncd_plms_reverse")
    _, t, abar, abar_prev, guidance, mean, std_4, _ = data["sr_rows"][row].tolist()
    z = data["sr_noise"][row]
    step = step_of(0, int(t), 0, abar, abar_prev)

    def network(x: Tensor, t: int, cond: Tensor) -> Tensor:
        e = (t / 1000) * x + 0.1 * (1 - t / 1000) * torch.sin(3 * x)
        e = e + 0.1 * cond.view(-1, 1, 1, 1) * (1 - t / 1000) * torch.cos(x)
        return torch.round(8 * e) / 8 + 0.03

    seen: list[Tensor] = []

    def guided(x: Tensor, t: int) -> Tensor:
        plain, conditional = network(x, t, data["sr_uncond"]), network(x, t, data["sr_cond"])
        seen.append(conditional if guidance == 1 else plain + guidance * (conditional - plain))
        return seen[-1]

    def advance(_: Tensor) -> Tentative:
        return Tentative(data["sr_x"], torch.zeros_like(data["sr_x"]))

    d = estimate_noise(step, data["sr_x"], torch.zeros_like(z), guided, advance, z, "paper").d
    # The network rounds to eighths, so that an element within float error of a tie may be a whole step off.
    assert ((seen[0] - data["sr_e_t"][row]).abs() > 1e-4).float().mean() < 0.01
    assert float(d.mean()) == pytest.approx(mean, abs=2e-3)
    assert float(d.std()) / 4 == pytest.approx(std_4, rel=0.01)


@pytest.mark.parametrize("target", ["paper", "consistent"])
def test_both_targets_by_hand(target: str) -> None:
    step = step_of(3, 500, 450, 0.3, 0.4)
    x_prev, x0, z, prediction = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0), 0.7
    asked: list[tuple[float, int]] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        asked.append((float(x), t))
        return torch.full_like(x, prediction)

    estimate = estimate_noise(step, x_prev, x_prev, denoise, lambda _: Tentative(x_prev, x0), z, target)
    renoised = math.sqrt(0.75) * 2 + 0.5 * -1
    assert asked == [(pytest.approx(renoised), 500)]
    expected = 0.7 + 1 if target == "paper" else 0.7 - (renoised - math.sqrt(0.3) * 0.5) / math.sqrt(0.7)
    assert float(estimate.d) == pytest.approx(expected)
    assert float(estimate.renoised) == pytest.approx(renoised) and float(estimate.z) == -1
    assert estimate.predictors().flatten().tolist() == [1, pytest.approx(renoised), -1]


def test_predictors_are_the_means_of_each_image_and_channel() -> None:
    renoised, z = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5)
    predictors = Estimate(z - renoised, renoised, z).predictors()
    assert predictors.shape == (2, 3, 3) and bool((predictors[:, :, 0] == 1).all())
    for image, channel in itertools.product(range(2), range(3)):
        expected = [renoised[image, channel].sum() / 20, z[image, channel].sum() / 20]
        torch.testing.assert_close(predictors[image, channel, 1:], torch.stack(expected))


def test_the_last_estimate_is_used_in_between_and_forgotten_at_the_next_batch() -> None:
    x0 = torch.zeros(SHAPE)
    corrector = RuntimeNoiseCorrector(CorrectionConfig(target="paper", control=False, shrink=False, interval=4))
    seen: list[StepState] = []
    calls: list[int] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return exact_for(x0)(x, t) + 0.2 + t / 1000

    def run() -> list[Tensor]:
        seen.clear()
        sample(SamplerConfig(timesteps=10), PROCESS, denoise, SHAPE, [1, 2], corrector=corrector, callback=seen.append)
        return [state.eps - state.corrected for state in seen]

    first = run()
    assert len(calls) == 10 + 2 and [t for t in calls if calls.count(t) == 2] == [600, 600, 200, 200]
    for i, correction in enumerate(first):
        if i < 3:
            assert correction.abs().max() == 0
        else:
            held = first[3 if i < 7 else 7]
            torch.testing.assert_close(correction, held, rtol=0, atol=1e-5)
    assert first[3].abs().min() > 0.05 and (first[7] - first[3]).abs().min() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), "something of the last batch survived"


def test_an_estimate_draws_from_a_stream_of_its_own() -> None:
    """Turning the correction on leaves the sampler's draws, and so the image but for the correction, as they were."""
    config = SamplerConfig(timesteps=6, eta=1.0)
    recorder = NoiseRecorder(CorrectionConfig(interval=1))
    plain = sample(config, PROCESS, exact_for_gaussian(0.2), SHAPE, [3])
    watched = sample(config, PROCESS, exact_for_gaussian(0.2), SHAPE, [3], corrector=recorder)
    assert torch.equal(plain, watched)
    corrector = RuntimeNoiseCorrector(CorrectionConfig(**BARE))
    corrector.begin([3], "cpu")
    assert torch.equal(corrector.noise.normal(SHAPE), ImageNoise([3], CORRECTOR_STREAM).normal(SHAPE))


@pytest.mark.parametrize("statistics", ["sample", "channel"])
def test_an_image_does_not_depend_on_its_batch_mates(statistics: str) -> None:
    config = SamplerConfig(timesteps=8, eta=0.5)
    corrector = RuntimeNoiseCorrector(CorrectionConfig(statistics=statistics, **BARE))

    def biased(x: Tensor, t: int) -> Tensor:
        return exact_for_gaussian(0.2)(x, t) + 0.1 * x.mean((1, 2, 3), keepdim=True)

    together = sample(config, PROCESS, biased, SHAPE, [3, 4, 5], corrector=corrector)
    alone = sample(config, PROCESS, biased, SHAPE, [4], corrector=corrector)
    assert torch.equal(together[1:2], alone)


def recorded(
    target: str, denoise: Callable[[Tensor, int], Tensor], eta: float = 0.0, interval: int = 3
) -> tuple[NoiseTable, NoiseRecorder]:
    """Of 6 images, in two batches."""
    config, correction = SamplerConfig(timesteps=10, eta=eta), CorrectionConfig(interval=interval, target=target)
    recorder = NoiseRecorder(correction)
    for seeds in ([0, 1, 2, 3], [4, 5]):
        sample(config, PROCESS, denoise, SHAPE, seeds, corrector=recorder)
    return recorder.table(), recorder


def crooked(x: Tensor, t: int) -> Tensor:
    """Far from exact, so that its own estimate is large; not linear, so that no regression on means explains all of it."""
    return 0.1 * x + 0.2 * torch.cos(x) + 0.4 + 0.2 * torch.linspace(-1, 1, 3).view(1, 3, 1, 1)


def regression(predictors: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """By numpy: coefficients, and the standard deviation of the rest with N - 3 degrees of freedom."""
    a, y = predictors.double().numpy(), means.double().numpy()
    solution = np.linalg.solve(a.T @ a, a.T @ y)
    return torch.tensor(solution), torch.tensor(math.sqrt(((y - a @ solution) ** 2).sum() / (len(y) - 3)))


@pytest.mark.parametrize("target", ["paper", "consistent"])
def test_the_table_is_the_regression_over_images(target: str) -> None:
    table, recorder = recorded(target, crooked)
    assert table.indices == (2, 5, 8) == tuple(i for i in range(10) if is_due(i, 3))
    assert (table.target, table.images) == (target, 6)
    assert table.coefficients.shape == (3, 3, 3) and table.coefficients_all.shape == (3, 3)
    assert table.spread.shape == (3, 3) and table.spread_all.shape == table.variance.shape == (3,)
    for row, index in enumerate(table.indices):
        means, predictors = torch.cat(recorder.means[index]), torch.cat(recorder.predictors[index])
        assert means.shape == (6, 3) and predictors.shape == (6, 3, 3)
        cases = [(means[:, c], predictors[:, c], table.coefficients[row, c], table.spread[row, c]) for c in range(3)]
        cases.append((means.mean(1), predictors.mean(1), table.coefficients_all[row], table.spread_all[row]))
        for mean, predictor, coefficients, spread in cases:
            expected, rest = regression(predictor, mean)
            torch.testing.assert_close(coefficients, expected.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(spread, rest.float(), rtol=1e-3, atol=1e-6)
            assert rest > 1e-4
        torch.testing.assert_close(table.variance[row], torch.cat(recorder.variances[index]).mean())
    assert table.at(5) == 1 and bool((table.variance > 0).all())
    with pytest.raises(
        ValueError, match=r"^the noise table has no step 4: it was made for other time steps or another interval$"
    ):
        table.at(4)


def test_the_regression_of_a_linear_model_is_the_model() -> None:
    """e = k x gives mean(e^ - z) = k mean(x^_t) - mean(z): coefficients 0, k, -1, and nothing is left."""
    table, _ = recorded("paper", exact_for_gaussian(0.3), interval=1)
    steps = steps_of(count=10)
    for row, index in enumerate(table.indices):
        expected = torch.tensor([0.0, float(slope(steps[index].t, 0.3)), -1.0])
        torch.testing.assert_close(table.coefficients[row], expected.expand(3, 3), rtol=0, atol=1e-4)
        torch.testing.assert_close(table.coefficients_all[row], expected, rtol=0, atol=1e-4)
    assert table.spread.max() < 1e-5 and table.spread_all.max() < 1e-5


def test_the_regression_of_images_that_do_not_differ() -> None:
    """One image four times leaves the coefficients open; they stay finite and predict that image's own mean."""
    config, recorder = SamplerConfig(timesteps=10), NoiseRecorder(CorrectionConfig(interval=3))
    sample(config, PROCESS, crooked, SHAPE, [7] * 4, corrector=recorder)
    table = recorder.table()
    assert bool(torch.isfinite(table.coefficients).all()) and table.spread.max() < 1e-5
    for row, index in enumerate(table.indices):
        predicted = (recorder.predictors[index][0] * table.coefficients[row]).sum(2)
        torch.testing.assert_close(predicted, recorder.means[index][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("statistics", ["sample", "batch", "channel"])
@pytest.mark.parametrize("target", ["paper", "consistent"])
def test_the_control_takes_out_what_the_full_precision_model_shows(target: str, statistics: str) -> None:
    """On the model and the seeds that made the table, the corrections of the first estimate cancel over the images."""
    table, _ = recorded(target, crooked)

    def correction(control: bool) -> Tensor:
        config = CorrectionConfig(interval=3, target=target, statistics=statistics, control=control, shrink=False)
        corrector, seen = RuntimeNoiseCorrector(config, table), list[StepState]()
        sample(SamplerConfig(timesteps=10), PROCESS, crooked, SHAPE, range(6), corrector=corrector, callback=seen.append)
        return seen[2].eps - seen[2].corrected

    controlled = correction(True)
    assert correction(False).mean((0, 2, 3)).abs().max() > 0.05
    assert controlled.mean((0, 2, 3)).abs().max() < 1e-5
    if statistics != "batch":
        assert controlled.abs().max() > 1e-4


class Pictures:
    """Images N(0, v I + w u u^T), u a smooth picture that is not constant, and their exact noise prediction.

    e = s (abar Sigma + s^2 I)^-1 x. Images differ in brightness by far more than independent pixels do, and mean(e) is
    not a function of mean(x) alone, so the regression leaves something over, as it does on real images.
    """

    def __init__(self, v: float = 0.05, w: float = 8.0) -> None:
        ramp = torch.linspace(-1, 1, SHAPE[1])
        u = 1 + 0.4 * ramp.view(1, -1, 1) + 0.3 * torch.cos(3 * ramp).view(1, 1, -1) + torch.zeros(SHAPE)
        self.u, self.v, self.w = u / u.norm(), v, w

    def __call__(self, x: Tensor, t: int) -> Tensor:
        within, along = slope(t, self.v), slope(t, self.v + self.w)
        return within * x + (along - within) * (x * self.u).sum((1, 2, 3), keepdim=True) * self.u


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("statistics", ["sample", "batch", "channel"])
def test_the_papers_target_with_control_recovers_a_constant_bias_while_sampling(statistics: str, eta: float) -> None:
    """Every estimate of the first quarter of a whole trajectory, of every image (and channel), lies within 10 % of the bias.

    The trial step carries the bias on, which moves x^_t; the regression knows how mean(d) follows mean(x^_t) and
    mean(z). Subtracting the plain mean of the full-precision model's estimates misses by far more.
    Later, k grows, and what the brightness does not tell of a picture with it.
    """
    exact, bias = Pictures(), 0.05
    config, settings = SamplerConfig(timesteps=20, eta=eta), CorrectionConfig(interval=1, statistics=statistics, shrink=False)
    assert settings.target == "paper" and settings.control
    recorder = NoiseRecorder(settings)
    sample(config, PROCESS, exact, SHAPE, range(1000, 1064), corrector=recorder)
    table = recorder.table()
    means = torch.stack([torch.cat(recorder.means[i]).mean(0) for i in table.indices])  # (S, C)
    nothing = torch.zeros_like(means)
    plain = dataclasses.replace(
        table,
        coefficients=torch.stack([means, nothing, nothing], 2),
        coefficients_all=torch.stack([means.mean(1), nothing[:, 0], nothing[:, 0]], 1),
    )

    def worst(reference: NoiseTable) -> Tensor:
        """Largest relative error of any estimate, (S,)."""
        seen: list[StepState] = []

        def biased(x: Tensor, t: int) -> Tensor:
            return exact(x, t) + bias

        corrector = RuntimeNoiseCorrector(settings, reference)
        sample(config, PROCESS, biased, SHAPE, range(8), corrector=corrector, callback=seen.append)
        assert len(seen) == 20
        return torch.stack([((s.eps - s.corrected) / bias - 1).abs().max() for s in seen])

    by_regression, by_mean = worst(table), worst(plain)
    early = slice(0, 5)
    print(f"{statistics}, eta {eta}: {by_regression.max():.3f} {by_regression[early].max():.4f}, {by_mean[early].min():.3f}")
    assert by_regression[early].max() < 0.1
    assert by_mean[early].min() > 0.25 and bool((by_mean[early] > 20 * by_regression[early]).all())


@pytest.mark.parametrize("statistics", ["sample", "batch", "channel"])
@pytest.mark.parametrize("images", [4, 10**9])
def test_shrinking(statistics: str, images: int) -> None:
    """m -> m max(0, 1 - (3 sd/m)^2), sd^2 = spread^2 (1/N + 3/images): of a batch's mean N images, else 1, and of the table."""
    trial = KnownTrial(0.0)
    spread = 0.05
    table = constant_table(steps_of(), spread=spread, images=images)
    (table.spread_all if statistics == "channel" else table.spread).fill_(9.0)  # not asked for
    noise = 3 * spread * math.sqrt((1 / 4 if statistics == "batch" else 1) + 3 / images)
    for bias in (0.5 * noise, 0.99 * noise, 1.5 * noise, 10 * noise, -1.5 * noise):

        def biased(x: Tensor, t: int, bias: float = bias) -> Tensor:
            return trial.exact(x, t) + bias

        removed = biased(trial.x, trial.step.t) - trial.correct(biased, table, shrink=True, statistics=statistics).eps
        expected = bias * max(0.0, 1 - (noise / bias) ** 2)
        torch.testing.assert_close(removed, torch.full_like(removed, expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("statistics", ["sample", "batch", "channel"])
def test_an_estimate_within_three_spreads_corrects_exactly_nothing(statistics: str) -> None:
    trial, spread = KnownTrial(0.0), 0.05
    table = constant_table(steps_of(), spread=spread, images=64)
    averaged = 4 if statistics == "batch" else 1
    edge = SHRINK_SPREADS * spread / math.sqrt(averaged)
    assert SHRINK_SPREADS == 3
    for bias, corrects in ((edge, False), (-edge, False), (0.3 * edge, False), (0.0, False), (1.1 * edge * math.sqrt(1.2), True)):

        def biased(x: Tensor, t: int, bias: float = bias) -> Tensor:
            return trial.exact(x, t) + bias

        corrected = trial.correct(biased, table, shrink=True, statistics=statistics).eps
        assert torch.equal(corrected, biased(trial.x, trial.step.t)) != corrects, bias


def test_shrinking_looks_at_each_image_and_channel_alone() -> None:
    trial, bias = KnownTrial(0.0), torch.tensor([0.1, 0.4, -0.4])
    table = constant_table(steps_of())
    table.spread[trial.step.index] = torch.tensor([0.1, 0.1, 0.2])

    def biased(x: Tensor, t: int) -> Tensor:
        return trial.exact(x, t) + bias.view(1, 3, 1, 1)

    removed = biased(trial.x, trial.step.t) - trial.correct(biased, table, shrink=True, statistics="channel").eps
    expected = torch.tensor([0.0, 0.4 * (1 - 0.75**2), 0.0]).double().view(1, 3, 1, 1).expand_as(removed)
    torch.testing.assert_close(removed, expected, rtol=0, atol=1e-5)


def test_a_table_comes_back_from_its_tensors() -> None:
    table, _ = recorded("consistent", crooked)
    table = dataclasses.replace(table, spread=table.spread.T.contiguous().T)  # strided, which safetensors refuses
    tensors, head = table.to_tensors()
    assert tuple(tensors) == TABLE_TENSORS and all(value.is_contiguous() for value in tensors.values())
    assert json.loads(head) == {"indices": [2, 5, 8], "images": 6, "target": "consistent"}
    back = NoiseTable.from_tensors(tensors, head)
    for field in dataclasses.fields(NoiseTable):
        found, expected = getattr(back, field.name), getattr(table, field.name)
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected, field.name
    assert isinstance(back.indices, tuple) and back.at(8) == 2
    for name in TABLE_TENSORS:
        with pytest.raises(KeyError, match=f"^'{name}'$"):
            NoiseTable.from_tensors({key: value for key, value in tensors.items() if key != name}, head)
    for name in ("indices", "images", "target"):
        with pytest.raises(KeyError, match=f"^'{name}'$"):
            NoiseTable.from_tensors(tensors, json.dumps({k: v for k, v in json.loads(head).items() if k != name}))
    with pytest.raises(json.JSONDecodeError):
        NoiseTable.from_tensors(tensors, head[:-1])


@pytest.mark.parametrize("statistics", ["sample", "batch", "channel"])
def test_control_subtracts_the_prediction_from_this_images_own_means(statistics: str) -> None:
    trial = KnownTrial(0.0)
    table = constant_table(steps_of())
    row, seen = trial.step.index, list[Tensor]()
    by_channel, pooled = 0.1 * normal(7, 3, 3).float(), 0.1 * normal(8, 3).float()
    table.coefficients[row], table.coefficients_all[row] = by_channel, pooled

    def biased(x: Tensor, t: int) -> Tensor:
        seen.append(x)
        return trial.exact(x, t) + 0.5

    corrected = trial.correct(biased, table, control=True, statistics=statistics).eps
    removed = trial.exact(trial.x, trial.step.t) + 0.5 - corrected
    x, z = seen[1].mean((2, 3)), ImageNoise(range(4), CORRECTOR_STREAM).normal((3, 64, 64)).double().mean((2, 3))  # (N, C)
    if statistics == "channel":
        expected = 0.5 - (by_channel[:, 0] + by_channel[:, 1] * x + by_channel[:, 2] * z)
    else:
        expected = (0.5 - (pooled[0] + pooled[1] * x.mean(1) + pooled[2] * z.mean(1)))[:, None]
    if statistics == "batch":
        expected = expected.mean(0, keepdim=True)
    torch.testing.assert_close(removed, expected[:, :, None, None].expand_as(removed), rtol=0, atol=1e-5)


def test_control_by_channel_subtracts_each_channels_own_mean() -> None:
    trial = KnownTrial(0.0)
    table = constant_table(steps_of())
    known = torch.tensor([0.1, 0.2, -0.6])
    table.coefficients[trial.step.index, :, 0] = known
    table.coefficients_all[trial.step.index, 0] = known.mean()

    def biased(x: Tensor, t: int) -> Tensor:
        return trial.exact(x, t) + 0.5

    for statistics, expected in (("channel", 0.5 - known), ("sample", (0.5 - known.mean()).expand(3))):
        removed = biased(trial.x, trial.step.t) - trial.correct(biased, table, control=True, statistics=statistics).eps
        torch.testing.assert_close(removed, expected.double().view(1, 3, 1, 1).expand_as(removed), rtol=0, atol=1e-5)


def test_variance_never_makes_the_sampler_add_negative_noise() -> None:
    """A table with more variance than there is gives 0, and the sampler's sigma stays as it is."""
    trial = KnownTrial(1.0)
    variance = trial.correct(lambda x, t: trial.exact(x, t), constant_table(steps_of(), variance=5.0), control=True).variance
    assert variance is not None and variance.abs().max() == 0
    torch.testing.assert_close(
        torch.as_tensor(reduced_sigma(trial.step, variance)).flatten(), torch.full((4,), trial.step.sigma).double()
    )


def test_refusals() -> None:
    for changes in ({"control": True, "shrink": False}, {"control": False, "shrink": True}):
        with pytest.raises(ValueError, match=r"^control and shrink need the full-precision model's noise table$"):
            RuntimeNoiseCorrector(CorrectionConfig(**changes))
    with pytest.raises(ValueError, match=r"^the noise table was made for target 'consistent', not 'paper'$"):
        RuntimeNoiseCorrector(CorrectionConfig(target="paper"), constant_table(steps_of()))
    with pytest.raises(ValueError, match=r"^interval 50: no step makes an estimate; allowed are intervals below the steps$"):
        NoiseRecorder(CorrectionConfig(interval=50)).table()


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_table_of_too_few_images_is_refused(images: int) -> None:
    config = SamplerConfig(timesteps=2)
    recorder = NoiseRecorder(CorrectionConfig(interval=1))
    sample(config, PROCESS, exact_for_gaussian(1.0), SHAPE, range(images), corrector=recorder)
    message = rf"^the full-precision noise table needs 4 images or more, not {images}$"
    with pytest.raises(ValueError, match=message):
        recorder.table()
    with pytest.raises(ValueError, match=message):  # at once, where the number is known
        NoiseRecorder(CorrectionConfig(interval=1), images)
    sample(config, PROCESS, exact_for_gaussian(1.0), SHAPE, range(images, 4), corrector=recorder)
    assert recorder.table().images == 4
    NoiseRecorder(CorrectionConfig(interval=1), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 0}, "interval 0: allowed are whole numbers, 1 or more"),
        ({"target": "z"}, "target 'z': allowed are consistent, paper"),
        ({"statistics": "pixel"}, "statistics 'pixel': allowed are sample, batch, channel"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        CorrectionConfig(**changes)
    assert str(caught.value) == message
