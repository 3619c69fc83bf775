"""The noise process: three ways to fill its tables, what each kind of prediction says of the noise, and sampling along them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qncd.models.network import network_of
from qncd.recipe import CorrectionConfig, SamplerConfig
from qncd.sampling.corrector import Tentative
from qncd.sampling.correctors.runtime import RuntimeNoiseCorrector, estimate_noise
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import PREDICTIONS, Process, clean_of, noise_of
from qncd.sampling.samplers import ddim_step, sample
from qncd.sampling.schedule import linear_betas, make_steps

BETAS = linear_betas(1e-4, 0.02, 1000)
SIGMAS = np.geomspace(0.01, 50, 1000)
PROCESSES = {
    "preserving": Process.from_betas(BETAS),
    "exploding": Process.exploding(SIGMAS),
    "flow": Process.rectified_flow(1000),
}
SHAPE = (3, 8, 8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_variance_preserving_by_betas_and_by_cumulative_alphas() -> None:
    process, expected = PROCESSES["preserving"], 1.0
    for t, beta in enumerate(BETAS):
        expected *= 1 - beta
        assert process.alpha[t] == pytest.approx(math.sqrt(expected), rel=1e-12)
        assert process.sigma[t] == pytest.approx(math.sqrt(1 - expected), rel=1e-9)
    again = Process.from_alphas_cumprod(np.cumprod(1 - BETAS))
    assert np.array_equal(again.alpha, process.alpha) and np.array_equal(again.sigma, process.sigma)
    assert np.array_equal(process.betas, BETAS) and again.betas is None and len(again) == 1000


def test_variance_exploding() -> None:
    process = PROCESSES["exploding"]
    assert np.array_equal(process.alpha, np.ones(1000)) and np.array_equal(process.sigma, SIGMAS) and process.betas is None


def test_rectified_flow() -> None:
    process = Process.rectified_flow(4)
    assert process.alpha.tolist() == [0.75, 0.5, 0.25, 0.0] and process.sigma.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert process.betas is None and len(PROCESSES["flow"]) == 1000


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_at_a_time_step(name: str) -> None:
    process = PROCESSES[name]
    assert process.at(-1) == (1.0, 0.0)
    assert process.at(7) == process.at(7.0) == (process.alpha[7], process.sigma[7])
    assert process.at(7.25) == pytest.approx(
        [0.75 * table[7] + 0.25 * table[8] for table in (process.alpha, process.sigma)], rel=1e-12
    )
    assert process.at(999) == (process.alpha[-1], process.sigma[-1])


# What a network of each kind says, by its definition, where x = alpha x_0 + sigma eps.
SAID = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "flow": lambda x0, eps, alpha, sigma: eps - x0,
}


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_noise_that_a_prediction_stands_for(name: str, kind: str) -> None:
    assert set(SAID) == set(PREDICTIONS)
    x0, eps = normal(0, 2, *SHAPE), normal(1, 2, *SHAPE)
    for t in (0, 10, 500, 998):
        alpha, sigma = PROCESSES[name].at(t)
        x = alpha * x0 + sigma * eps
        found = noise_of(kind, SAID[kind](x0, eps, alpha, sigma), x, alpha, sigma)
        torch.testing.assert_close(found, eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(clean_of(x, found, alpha, sigma), x0, rtol=1e-6, atol=1e-6)


def test_by_hand() -> None:
    """alpha 0.6, sigma 0.8, x_0 = 2, eps = -1: x = 0.4."""
    x = torch.tensor(0.4)
    for kind, output in (("epsilon", -1.0), ("v_prediction", -2.2), ("sample", 2.0), ("flow", -3.0)):
        assert float(noise_of(kind, torch.tensor(output), x, 0.6, 0.8)) == pytest.approx(-1, rel=1e-6)
    with pytest.raises(ValueError, match=r"^prediction 'x0': allowed are epsilon, v_prediction, sample, flow$"):
        noise_of("x0", x, x, 0.6, 0.8)


class Point(nn.Module):
    """The exact network of a distribution that is one point, of any process and any kind of prediction."""

    def __init__(self, point: Tensor, process: Process, kind: str) -> None:
        super().__init__()
        self.point, self.process, self.kind = nn.Parameter(point, requires_grad=False), process, kind
        self.layer = nn.Linear(1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        alpha, sigma = self.process.at(int(timestep[0]))
        eps = (sample - alpha * self.point) / sigma
        return (SAID[self.kind](self.point, eps, alpha, sigma).expand_as(sample),)


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_lands_on_the_point(name: str, kind: str, eta: float) -> None:
    """Rectified flow with its exact velocity field among them."""
    point, process = normal(0, 1, *SHAPE).float(), PROCESSES[name]
    config = SamplerConfig(timesteps=20, eta=eta)
    network = network_of(Point(point, process, kind), kind)
    assert network.prediction == kind
    found = Diffusion(network, process, config, SHAPE, lane=4).sample([1, 2])
    torch.testing.assert_close(found, point.expand(2, *SHAPE), rtol=1e-3, atol=1e-3)


def test_ddim_on_a_rectified_flow_is_its_euler_step() -> None:
    """x_p = x + (p - t) v."""
    process = PROCESSES["flow"]
    for step in make_steps(SamplerConfig(timesteps=8), process):
        x, v = normal(0, 1, *SHAPE), normal(1, 1, *SHAPE)
        eps = noise_of("flow", v, x, step.alpha, step.noise)
        torch.testing.assert_close(ddim_step(x, eps, step, None, 0.0).x_prev, x + (step.noise_prev - step.noise) * v)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_levels_of_renoising(name: str, eta: float) -> None:
    """x_p = alpha_p x_0 + sigma_p e and fresh noise give x_t = alpha_t x_0 + sigma_t e'."""
    for step in make_steps(SamplerConfig(timesteps=20, eta=eta), PROCESSES[name]):
        assert step.kept * step.alpha_prev == pytest.approx(step.alpha, rel=1e-12)
        assert step.kept**2 * step.noise_prev**2 + step.renoise**2 == pytest.approx(step.noise**2, rel=1e-9)
        if name == "preserving":
            ratio = (step.alpha / step.alpha_prev) ** 2
            assert (step.kept, step.renoise) == pytest.approx((math.sqrt(ratio), math.sqrt(1 - ratio)), rel=1e-6)
        elif name == "exploding":
            assert (step.kept, step.renoise) == pytest.approx((1, math.sqrt(step.noise**2 - step.noise_prev**2)))
        else:
            t, p = step.noise, step.noise_prev
            assert step.kept == pytest.approx((1 - t) / (1 - p))
            assert step.renoise == pytest.approx(math.sqrt(t**2 - ((1 - t) / (1 - p)) ** 2 * p**2))
        assert 0 <= step.sigma <= step.noise_prev + 1e-12
        if eta == 1:  # DDPM's posterior
            assert step.sigma == pytest.approx(step.noise_prev / step.noise * step.renoise, rel=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_gain_is_the_derivative_of_the_next_sample(name: str, eta: float) -> None:
    x, e = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 1e-6, dtype=torch.float64)
    for step in make_steps(SamplerConfig(timesteps=20, eta=eta), PROCESSES[name]):
        change = ddim_step(x, e, step, None, 0.0).x_prev - ddim_step(x, -e, step, None, 0.0).x_prev
        assert float(change) / 2e-6 == pytest.approx(step.eps_gain, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_an_exact_network_shows_no_quantization_noise(name: str) -> None:
    """QNCD's estimate, with the target that takes all of the noise that x0-hat says is there."""
    process, x0 = PROCESSES[name], normal(0, 2, *SHAPE)
    for step in make_steps(SamplerConfig(timesteps=10, eta=0.5), process):
        x = step.alpha * x0 + step.noise * normal(1, 2, *SHAPE)
        z, draw = normal(2, 2, *SHAPE), normal(3, 2, *SHAPE)

        def denoise(x: Tensor, t: int) -> Tensor:
            alpha, sigma = process.at(t)
            return (x - alpha * x0) / sigma

        def advance(e: Tensor, x: Tensor = x, step: Any = step, draw: Tensor = draw) -> Tentative:
            return ddim_step(x, e, step, draw, step.sigma)

        estimate = estimate_noise(step, x, denoise(x, step.t), denoise, advance, z, "consistent")
        assert estimate.d.abs().max() < 1e-6
        biased = estimate_noise(step, x, denoise(x, step.t), lambda x, t: denoise(x, t) + 0.3, advance, z, "consistent")
        torch.testing.assert_close(biased.d, torch.full_like(biased.d, 0.3), rtol=0, atol=1e-6)


def test_a_corrected_flow_lands_on_the_point() -> None:
    process, point = PROCESSES["flow"], normal(0, 1, *SHAPE).float()
    network = network_of(Point(point, process, "flow"), "flow")
    corrector = RuntimeNoiseCorrector(CorrectionConfig(interval=2, control=False, shrink=False, target="consistent"))
    found = Diffusion(network, process, SamplerConfig(timesteps=10), SHAPE, lane=2).sample([5, 6], corrector)
    torch.testing.assert_close(found, point.expand(2, *SHAPE), rtol=1e-3, atol=1e-3)


def test_what_a_process_does_not_allow() -> None:
    with pytest.raises(ValueError, match=r"^dpm_solver: allowed for processes given by their betas$"):
        sample(SamplerConfig("dpm_solver", timesteps=5), PROCESSES["flow"], lambda x, t: x, SHAPE, [0])
    with pytest.raises(ValueError, match=r"^time step 999: holds no signal, from which no clean image can be read off$"):
        make_steps(SamplerConfig(timesteps=1000), PROCESSES["flow"])
