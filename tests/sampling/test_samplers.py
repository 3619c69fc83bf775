"""Every sampler's trajectory, against the original samplers and diffusers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from qncd.models.loading import load_ddim
from qncd.recipe import SamplerConfig
from qncd.rng import CORRECTOR_STREAM, ImageNoise
from qncd.sampling.corrector import Advance, Corrected, Denoiser
from qncd.sampling.correctors.runtime import estimate_noise, is_due
from qncd.sampling.guidance import guide
from qncd.sampling.process import Process
from qncd.sampling.samplers import (
    StepState,
    ddim_step,
    ddpm_step,
    reduced_sigma,
    sample,
    sample_ddim,
    sample_dpm_solver,
    sample_plms,
)
from qncd.sampling.schedule import Step, linear_betas, make_steps

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
BETAS = linear_betas(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
PROCESS = Process.from_betas(BETAS)
TRAJECTORIES = [
    *(f"generalized_{skip}{steps}_eta{eta}" for skip in ("uniform", "quad") for steps, eta in
      [(10, "0"), (10, "0.5"), (10, "1"), (20, "0"), (20, "1"), (100, "0"), (100, "1")]),
    "ddpm_noisy_uniform20", "ddpm_noisy_quad10",
]  # fmt: skip


def analytic(x: Tensor, t: int) -> Tensor:
    """The network of the golden trajectories."""
    return (t / 1000) * x + 0.1 * (1 - t / 1000) * torch.sin(3 * x)


class Replay:
    """Noise that was drawn before, in place of an ImageNoise."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = list(draws)

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self.draws.pop(0)


class Collector:
    def __init__(self) -> None:
        self.states: list[StepState] = []

    def __call__(self, state: StepState) -> None:
        self.states.append(state)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_are_the_originals(golden: Any, name: str) -> None:
    data = golden("samplers_ddim_trajectories")
    match = re.fullmatch(r"(generalized|ddpm_noisy)_(uniform|quad)(\d+)(?:_eta([\d.]+))?", name)
    assert match is not None
    sample_type, skip_type, count, eta = match.groups()
    steps = make_steps(SamplerConfig(sample_type, skip_type, int(count), float(eta or 0)), PROCESS)
    # The original draws noise at every step; ours only where it has an effect (not at repeated time steps, nor the last).
    draws = data.get(f"{name}_noise", [])
    noise = Replay([z for z, step in zip(draws, steps, strict=bool(len(draws))) if step.sigma > 0])
    seen = Collector()
    function = {"step_function": ddpm_step} if sample_type == "ddpm_noisy" else {}
    last = sample_ddim(analytic, data["x_T"], steps, noise, callback=seen, **function)  # type: ignore[arg-type]
    expected = data[f"{name}_x"]
    assert len(seen.states) == len(expected) - 1 == len(steps) and not noise.draws
    for i, state in enumerate(seen.states):
        torch.testing.assert_close(state.x, expected[i], rtol=0, atol=5e-5)
        torch.testing.assert_close(state.x_prev, expected[i + 1], rtol=0, atol=5e-5)
        if f"{name}_x0" in data:
            torch.testing.assert_close(state.x0, data[f"{name}_x0"][i], rtol=5e-5, atol=5e-5)
    assert torch.equal(last, seen.states[-1].x_prev)


@pytest.mark.parametrize("skip_type", ["uniform", "quad"])
def test_a_converted_network_follows_the_original_trajectory(golden: Any, skip_type: str) -> None:
    data = golden("ddim_unet_small_trajectory")
    unet = load_ddim(yaml.safe_load((GOLDEN / "ddim_unet_small.yml").read_text()), GOLDEN / "ddim_unet_small.ckpt")
    steps = make_steps(SamplerConfig("generalized", skip_type, 10), PROCESS)
    assert [s.t for s in steps] == data[f"ddim10_{skip_type}_seq"].tolist()[::-1]
    seen = Collector()
    with torch.no_grad():
        last = sample_ddim(lambda x, t: unet(x, t).sample, data["x_T"], steps, Replay([]), callback=seen)  # type: ignore[arg-type]
    expected = data[f"ddim10_{skip_type}_eta0_x"]
    for state, x in zip(seen.states, expected[1:], strict=True):
        torch.testing.assert_close(state.x_prev, x, rtol=0, atol=1e-3)
    image = ((last + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(image, data[f"ddim10_{skip_type}_eta0_image"], rtol=0, atol=1e-4)


LDM_BETAS = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
SD_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def guided_analytic(data: Any, scale: float) -> Denoiser:
    """The golden network with a condition c: + 0.1 c (1 - t/1000) cos(x)."""

    def predict(x: Tensor, t: int, c: Tensor) -> Tensor:
        return analytic(x, t) + 0.1 * c.view(-1, 1, 1, 1) * (1 - t / 1000) * torch.cos(x)

    return lambda x, t: guide(predict(x, t, data["uncond"]), predict(x, t, data["cond"]), scale)


LATENT_TRAJECTORIES = [
    "ddim10_eta0_cfg1", "ddim20_eta1_cfg1", "ddim20_eta0_cfg3", "ddim30_eta0_cfg1",
    "plms10_eta0_cfg7.5", "plms25_eta0_cfg7.5", "plms50_eta0_cfg1",
]  # fmt: skip


@pytest.mark.parametrize("name", LATENT_TRAJECTORIES)
def test_latent_trajectories_are_the_originals(golden: Any, name: str) -> None:
    """CompVis' DDIMSampler and PLMSSampler: their time steps, their last alpha, their guidance."""
    data = golden("samplers_ldm_trajectories")
    kind, count, eta, scale = re.fullmatch(r"(ddim|plms)(\d+)_eta(\d)_cfg([\d.]+)", name).groups()  # type: ignore[union-attr]
    config = SamplerConfig("plms" if kind == "plms" else "generalized", timesteps=int(count), eta=float(eta), convention="ldm")
    steps = make_steps(config, Process.from_betas(SD_BETAS if kind == "plms" else LDM_BETAS))
    assert [s.t for s in steps] == data[f"{name}_timesteps"].tolist()[::-1]
    for key, values in (("alphas", [s.alpha**2 for s in steps]), ("alphas_prev", [s.alpha_prev**2 for s in steps])):
        np.testing.assert_allclose(values[::-1], data[f"{name}_{key}"].numpy(), rtol=1e-6)
    np.testing.assert_allclose([s.sigma for s in steps][::-1], data[f"{name}_sigmas"].numpy(), atol=1e-6)
    denoise = analytic if scale == "1" else guided_analytic(data, float(scale))
    seen = Collector()
    if kind == "plms":
        sample_plms(denoise, data["x_T"], steps, callback=seen)
    else:
        sample_ddim(denoise, data["x_T"], steps, Replay(list(data.get(f"{name}_noise", []))), callback=seen)  # type: ignore[arg-type]
    assert len(seen.states) == len(data[f"{name}_pred_x0"]) == len(steps)
    for i, state in enumerate(seen.states):
        torch.testing.assert_close(state.x_prev, data[f"{name}_x"][i + 1], rtol=0, atol=5e-5)
        torch.testing.assert_close(state.x0, data[f"{name}_pred_x0"][i], rtol=1e-5, atol=5e-5)


class AsPublished:
    """QNCD's released correction: one scalar for the batch, kept until the next estimate."""

    def __init__(self, interval: int, draws: Sequence[Tensor]) -> None:
        self.interval, self.draws, self.mean = interval, list(draws), 0.0
        self.means: list[float] = []

    def begin(self, seeds: Sequence[int], device: str) -> None: ...

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        if is_due(step.index, self.interval):
            self.mean = float(estimate_noise(step, x, eps, denoise, advance, self.draws.pop(0), "paper").d.mean())
            self.means.append(self.mean)
        return Corrected(eps - self.mean)


@pytest.mark.parametrize("count", [25, 50])
def test_a_corrected_plms_trajectory_is_qncds(golden: Any, count: int) -> None:
    data = golden("qncd_plms_reverse")
    steps = make_steps(SamplerConfig("plms", timesteps=count, convention="ldm"), Process.from_betas(SD_BETAS))

    def half(x: Tensor, t: int, c: Tensor) -> Tensor:
        e = analytic(x, t) + 0.1 * c.view(-1, 1, 1, 1) * (1 - t / 1000) * torch.cos(x)
        return torch.round(8 * e) / 8 + 0.03

    def denoise(x: Tensor, t: int) -> Tensor:
        return guide(half(x, t, data["sr_uncond"]), half(x, t, data["sr_cond"]), 3.0)

    corrector = AsPublished(int(data[f"tr{count}_interval"]), list(data[f"tr{count}_noise"]))
    # The golden second run starts with the first one's last mean, an error of the original that a new batch here can't make.
    expected, seen = data[f"tr{count}_run0_x"], Collector()
    sample_plms(denoise, expected[0], steps, corrector, seen)
    for state, x in zip(seen.states, expected[1:], strict=True):
        torch.testing.assert_close(state.x_prev, x, rtol=0, atol=5e-5)
    means = data[f"tr{count}_calls_index_mean_std4"][: len(corrector.means), 1]
    np.testing.assert_allclose(corrector.means, means.numpy(), atol=1e-5)
    assert len(corrector.means) == len(data[f"tr{count}_calls_index_mean_std4"]) // 2


def test_plms_averages_both_ends_of_its_first_step() -> None:
    """S steps cost S + 1 calls, and a constant noise prediction gives what DDIM gives."""
    calls: list[int] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return torch.full_like(x, 0.3)

    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = make_steps(SamplerConfig("plms", timesteps=10, convention="ldm"), PROCESS)
    found = sample_plms(denoise, x, steps)
    assert calls == [901, 801, 801, *range(701, 0, -100)]
    torch.testing.assert_close(found, sample_ddim(lambda x, t: torch.full_like(x, 0.3), x, steps, Replay([])))  # type: ignore[arg-type]


@pytest.mark.parametrize(("skip_type", "count"), [("uniform", 10), ("uniform", 20), ("quad", 10), ("quad", 100)])
def test_dpm_solver_is_diffusers(skip_type: str, count: int) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = make_steps(SamplerConfig("dpm_solver", skip_type, count), PROCESS)
    seen = Collector()
    found = sample_dpm_solver(analytic, x, steps, BETAS, callback=seen)
    scheduler = DPMSolverMultistepScheduler(trained_betas=BETAS.tolist(), algorithm_type="dpmsolver++", solver_order=2)
    times = sorted({s.t for s in steps}, reverse=True)
    scheduler.set_timesteps(timesteps=times)
    for t in times:
        x = scheduler.step(analytic(x, t), t, x).prev_sample
    assert torch.equal(found, x)
    assert [s.step.t for s in seen.states] == times


def test_dpm_solver_is_of_second_order() -> None:
    """Images N(0, v): the exact flow only scales x, by the ratio of its standard deviations. DDIM is of first order."""
    v, x = 0.25, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x: Tensor, t: int) -> Tensor:
        return x * ((1 - ABAR[t]) ** 0.5 / (ABAR[t] * v + 1 - ABAR[t]))

    errors = []
    for count in (20, 40, 80):
        steps = make_steps(SamplerConfig(skip_type="quad", timesteps=count), PROCESS)
        exact = x * (v / (steps[0].alpha ** 2 * v + 1 - steps[0].alpha ** 2)) ** 0.5
        ddim = sample_ddim(denoise, x, steps, Replay([]))  # type: ignore[arg-type]
        solver = sample_dpm_solver(denoise, x, steps, BETAS)
        errors.append([float((found / exact - 1).abs().mean()) for found in (ddim, solver)])
    for (ddim_before, before), (ddim_after, after) in itertools.pairwise(errors):
        assert before / after > 3.5 and 1.7 < ddim_before / ddim_after < 2.3
    assert errors[2][1] < 0.1 * errors[2][0]


class Recorded:
    """A corrector that says what it was asked."""

    def __init__(self, bias: float = 0.0, variance: Tensor | None = None) -> None:
        self.bias, self.variance = bias, variance
        self.calls: list[tuple[Step, Tensor, Tensor]] = []

    def begin(self, seeds: Sequence[int], device: str) -> None:
        self.seeds = list(seeds)

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        self.calls.append((step, x, advance(eps).x_prev))
        return Corrected(eps - self.bias, self.variance)


@pytest.mark.parametrize("sample_type", ["generalized", "ddpm_noisy", "dpm_solver", "plms"])
def test_a_corrector_that_takes_a_bias_out_gives_the_unbiased_images(sample_type: str) -> None:
    config = SamplerConfig(sample_type, timesteps=10, eta=0.5 if sample_type == "generalized" else 0.0)
    steps, seen = make_steps(config, PROCESS), Collector()

    def draw(denoise: Denoiser, corrector: Recorded | None = None) -> Tensor:
        return sample(config, PROCESS, denoise, (3, 8, 8), [4, 5], corrector=corrector, callback=seen)

    expected = draw(analytic)
    corrector = Recorded(0.25)
    seen.states.clear()
    corrected = draw(lambda x, t: analytic(x, t) + 0.25, corrector)
    torch.testing.assert_close(corrected, expected, rtol=1e-4, atol=1e-4)
    assert (draw(lambda x, t: analytic(x, t) + 0.25) - expected).abs().max() > 0.1
    assert corrector.seeds == [4, 5] and [call[0] for call in corrector.calls] == steps
    for state, (_, x, _) in zip(seen.states, corrector.calls, strict=False):
        assert torch.equal(state.x, x)
        torch.testing.assert_close(state.corrected, state.eps - 0.25)


@pytest.mark.parametrize("sample_type", ["generalized", "ddpm_noisy", "plms"])
def test_the_trial_step_is_the_step_taken_where_nothing_is_corrected(sample_type: str) -> None:
    """The same noise, too: a trial draws none of its own."""
    config = SamplerConfig(sample_type, timesteps=10, eta=1.0 if sample_type == "generalized" else 0.0)
    corrector, seen = Recorded(), Collector()
    with_corrector = sample(config, PROCESS, analytic, (3, 8, 8), [1], corrector=corrector, callback=seen)
    assert torch.equal(with_corrector, sample(config, PROCESS, analytic, (3, 8, 8), [1]))
    for state, (_, _, trial) in zip(seen.states, corrector.calls, strict=True):
        assert torch.equal(trial, state.x_prev)


def test_known_variance_is_taken_out_of_the_noise() -> None:
    """eps~ = eps + tau*xi at eta 1: with sigma' the next sample has the variance that the step was to have."""
    tau = 0.4
    step = make_steps(SamplerConfig(timesteps=10, eta=1.0), PROCESS)[5]
    sigma = reduced_sigma(step, torch.tensor(tau**2))
    assert isinstance(sigma, Tensor) and 0 < float(sigma) < step.sigma
    generator = torch.Generator().manual_seed(0)
    noise, error = torch.randn(2, 1, 1, 400, 400, generator=generator, dtype=torch.float64)
    out = ddim_step(torch.zeros(1, 1, 400, 400, dtype=torch.float64), tau * error[None], step, noise[None], sigma).x_prev
    assert float(out.var()) == pytest.approx(step.sigma**2, rel=0.02)


@pytest.mark.parametrize("sample_type", ["generalized", "ddpm_noisy"])
def test_the_step_taken_has_the_reduced_noise(sample_type: str) -> None:
    config = SamplerConfig(sample_type, timesteps=10, eta=1.0 if sample_type == "generalized" else 0.0)
    steps, seen = make_steps(config, PROCESS), Collector()
    variance = torch.tensor([0.0, 0.05]).view(2, 1, 1, 1)
    x, draws = torch.randn(2, 3, 8, 8), [torch.randn(2, 3, 8, 8) for step in steps if step.sigma > 0]
    function = ddim_step if sample_type == "generalized" else ddpm_step
    corrector = Recorded(variance=variance)
    sample_ddim(analytic, x, steps, Replay(draws), corrector, seen, function)  # type: ignore[arg-type]
    for state, draw, (_, _, trial) in zip(seen.states, draws, corrector.calls, strict=False):
        expected = function(state.x, state.eps, state.step, draw, reduced_sigma(state.step, variance)).x_prev
        assert torch.equal(state.x_prev, expected)
        torch.testing.assert_close(state.x_prev[0], trial[0])
        assert (state.x_prev[1] - trial[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("sample_type", "eta"), [("generalized", 0.3), ("generalized", 1.0), ("ddpm_noisy", 0.0)])
def test_reduced_sigma_is_never_negative(sample_type: str, eta: float) -> None:
    variance = torch.tensor([0.0, 1e-6, 0.01, 1.0, 1e6]).view(-1, 1, 1, 1)
    for step in make_steps(SamplerConfig(sample_type, "quad", 20, eta), PROCESS):
        sigma = torch.as_tensor(reduced_sigma(step, variance)).expand(5, 1, 1, 1).flatten()
        assert bool(torch.isfinite(sigma).all()) and bool((sigma >= 0).all()) and bool((sigma <= step.sigma * 1.000001).all())
        assert float(sigma[0]) == pytest.approx(step.sigma) and bool((sigma.diff() <= 0).all())
        assert reduced_sigma(step, None) == step.sigma


def test_a_sample_that_is_no_longer_finite_stops_the_run() -> None:
    def broken(x: Tensor, t: int) -> Tensor:
        return x * (float("inf") if t == 400 else 1.0)

    for sample_type in ("generalized", "dpm_solver", "plms"):
        with pytest.raises(FloatingPointError, match=r"^the sample is NaN or infinite after step 3 \(time step 400\)$"):
            sample(SamplerConfig(sample_type, timesteps=5), PROCESS, broken, (1, 4, 4), [0])


def test_noise_depends_on_the_seed_alone() -> None:
    together, alone = ImageNoise([3, 8, 1 << 40]), ImageNoise([8])
    for shape in ((3, 8, 8), (1, 2, 2)):
        both = together.normal(shape)
        assert both.shape == (3, *shape) and both.dtype == torch.float32
        assert torch.equal(both[1:2], alone.normal(shape))
        assert len({float(x.flatten()[0]) for x in both}) == 3
    first, other = ImageNoise([8]).normal((64, 64)), ImageNoise([8], CORRECTOR_STREAM).normal((64, 64))
    assert abs(float((first * other).mean())) < 0.1 and abs(float(first.std()) - 1) < 0.05
    # No seed's corrector draws are another seed's sampler draws.
    draws = {float(ImageNoise([s], stream).normal((1,))) for s in range(300) for stream in (0, CORRECTOR_STREAM)}
    assert len(draws) == 600
    with pytest.raises(ValueError, match=r"^seed -2: allowed are whole numbers, 0 or more$"):
        ImageNoise([1, -2])


def test_starting_noise_is_the_seeds_first_draw() -> None:
    config = SamplerConfig(timesteps=2)
    seen = Collector()
    sample(config, PROCESS, analytic, (3, 8, 8), [6, 7], callback=seen)
    assert torch.equal(seen.states[0].x, ImageNoise([6, 7]).normal((3, 8, 8)))
    assert np.isclose(seen.states[0].step.alpha ** 2, ABAR[500])
