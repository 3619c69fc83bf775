"""Noise schedules and time steps, against those of the original samplers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qncd.recipe import SamplerConfig
from qncd.sampling.process import Process
from qncd.sampling.samplers import ddim_step, ddpm_step
from qncd.sampling.schedule import betas_of, ddim_timesteps, linear_betas, make_steps

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
TIMESTEPS = json.loads((GOLDEN / "samplers_timesteps.json").read_text())
ABAR = np.cumprod(1 - linear_betas(1e-4, 0.02, 1000))
PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))


@pytest.mark.parametrize("key", TIMESTEPS)
def test_time_steps_are_the_originals(key: str) -> None:
    convention, skip_type, count = key.split("_")
    if TIMESTEPS[key][-1] >= 1000:  # the original calls its network past its last time step
        with pytest.raises(ValueError, match=r"^timesteps \d+: latent-diffusion's uniform spacing would end at time step 1000"):
            ddim_timesteps(skip_type, int(count), convention=convention)
    else:
        assert ddim_timesteps(skip_type, int(count), convention=convention) == TIMESTEPS[key]


def test_the_schedule_is_the_originals(golden: Any) -> None:
    data = golden("samplers_schedules")
    betas = linear_betas(1e-4, 0.02, 1000)
    np.testing.assert_allclose(betas, data["ddim_betas_f64"].numpy(), rtol=1e-12)
    process = Process.from_betas(betas)
    np.testing.assert_allclose(process.alpha**2, data["ddim_alphas_cumprod_f64"].numpy(), rtol=1e-12)
    np.testing.assert_allclose(process.alpha**2, data["ddim_alphas_cumprod_f32"].numpy(), atol=1e-6)
    np.testing.assert_allclose(process.alpha**2 + process.sigma**2, 1, rtol=1e-12)
    section = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": "0.02", "num_diffusion_timesteps": 1000}
    assert np.array_equal(betas_of({"diffusion": section}), betas)


@pytest.mark.parametrize("skip_type", ["uniform", "quad"])
@pytest.mark.parametrize("count", [1, 7, 10, 30, 100, 1000])
def test_steps_lead_from_noise_to_the_clean_image(skip_type: str, count: int) -> None:
    steps = make_steps(SamplerConfig("generalized", skip_type, count, eta=0.7), PROCESS)
    assert [s.index for s in steps] == list(range(len(steps)))
    assert [s.t for s in steps] == ddim_timesteps(skip_type, count)[::-1]
    assert [s.t_prev for s in steps] == [*[s.t for s in steps][1:], -1]
    assert (steps[-1].alpha_prev, steps[-1].noise_prev) == (1, 0) and steps[-1].sigma == 0
    for step in steps:
        assert step.alpha == math.sqrt(ABAR[step.t]) and step.alpha <= step.alpha_prev
        assert step.noise == math.sqrt(1 - ABAR[step.t])
        assert step.sigma >= 0 and step.sigma**2 <= 1 - step.alpha_prev**2 + 1e-12


@pytest.mark.parametrize("skip_type", ["uniform", "quad"])
@pytest.mark.parametrize(
    ("sample_type", "eta"), [("generalized", 0.0), ("generalized", 0.6), ("generalized", 1.0), ("ddpm_noisy", 0.0)]
)
def test_eps_gain_is_the_derivative_of_the_next_sample(sample_type: str, eta: float, skip_type: str) -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    function = ddpm_step if sample_type == "ddpm_noisy" else ddim_step
    for step in make_steps(SamplerConfig(sample_type, skip_type, 20, eta), PROCESS):
        small = torch.full_like(x, 1e-6)  # no x0-hat is clamped
        change = function(x, small, step, None, 0.0).x_prev - function(x, -small, step, None, 0.0).x_prev
        assert float(change) / 2e-6 == pytest.approx(step.eps_gain, rel=1e-6, abs=1e-9)


def test_sigma_at_eta_1_is_ddpms_posterior(golden: Any) -> None:
    for step in make_steps(SamplerConfig(timesteps=10, eta=1.0), PROCESS)[:-1]:
        beta = 1 - step.alpha**2 / step.alpha_prev**2
        assert step.sigma**2 == pytest.approx(beta * (1 - step.alpha_prev**2) / (1 - step.alpha**2), rel=1e-9)
    for step in make_steps(SamplerConfig("ddpm_noisy", timesteps=10), PROCESS)[:-1]:
        assert step.sigma**2 == pytest.approx(1 - step.alpha**2 / step.alpha_prev**2, rel=1e-9)


def test_ddpm_adds_noise_down_to_time_step_1() -> None:
    *_, before, last = make_steps(SamplerConfig("ddpm_noisy", timesteps=1000), PROCESS)
    assert (before.t, before.alpha_prev, last.t, last.sigma) == (1, math.sqrt(ABAR[0]), 0, 0.0)
    assert before.sigma**2 == pytest.approx(1 - ABAR[1] / ABAR[0], rel=1e-9)


@pytest.mark.parametrize("count", [0, 1001])
def test_numbers_of_steps_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^timesteps {count}: allowed are 1 to 1000$"):
        ddim_timesteps("uniform", count)


SECTION = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"^the config's diffusion section lacks or garbles 'diffusion'$"),
        (
            {"diffusion": {"beta_schedule": "linear"}},
            r"^the config's diffusion section lacks or garbles 'num_diffusion_timesteps'$",
        ),
        ({"diffusion": {**SECTION, "beta_start": "low"}}, r"^the config's diffusion section lacks or garbles could not convert"),
        ({"diffusion": {**SECTION, "beta_schedule": "cosine"}}, r"^beta_schedule 'cosine': allowed is linear$"),
        ({"diffusion": {**SECTION, "beta_end": 1e-5}}, r"^beta_start 0\.0001, beta_end 1e-05, .*: not a noise schedule$"),
        ({"diffusion": {**SECTION, "beta_end": 1.0}}, r"not a noise schedule$"),
    ],
)
def test_bad_diffusion_sections(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        betas_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_type": "ddim"}, "sample_type 'ddim': allowed are generalized, ddpm_noisy, dpm_solver, plms"),
        ({"skip_type": "cubic"}, "skip_type 'cubic': allowed are uniform, quad"),
        ({"timesteps": 0}, "timesteps 0: allowed are whole numbers, 1 or more"),
        ({"eta": 1.5}, "eta 1.5: allowed are numbers from 0 to 1"),
        ({"eta": float("nan")}, "eta nan: allowed are numbers from 0 to 1"),
        (
            {"sample_type": "dpm_solver", "eta": 0.5},
            "eta 0.5 with sample_type dpm_solver: allowed is 0 (it is deterministic)",
        ),
    ],
)
def test_bad_sampler_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplerConfig(**changes)
    assert str(caught.value) == message
