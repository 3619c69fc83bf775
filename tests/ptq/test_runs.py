"""Calibration runs of a sampler."""

from __future__ import annotations

from typing import Any

import torch

from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.recipe import CalibrationConfig, Recipe, SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))


def test_a_set_is_sampled_along_the_models_own_trajectories(make_unet: Any) -> None:
    diffusion = Diffusion(network_of(make_unet()), PROCESS, SamplerConfig(timesteps=5), (3, 8, 8), lane=4)

    def sampled(config: CalibrationConfig, model_hash: str | None = None) -> tuple[CalibrationSet, Any]:
        return sample_calibration(DiffusionRuns(diffusion, config), Recipe(correction=None, calibration=config), model_hash)

    data, table = sampled(CalibrationConfig(samples=6, steps=2, batch_size=4), "h")
    assert table is None and data.model_hash == "h" and data.t.tolist() == [600] * 6 + [200] * 6
    again, _ = sampled(CalibrationConfig(samples=6, steps=2, batch_size=6))
    torch.testing.assert_close(again.x, data.x, rtol=0, atol=0)
    other, _ = sampled(CalibrationConfig(samples=6, steps=2, seed=1))
    assert not torch.allclose(other.x, data.x, atol=0.1)
