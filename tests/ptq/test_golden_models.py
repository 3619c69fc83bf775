"""Whole models of the original code, loaded from their checkpoints: every step of their samplers, and their images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from quantized_networks import CONTEXT
from torch import Tensor

from qncd.models.latent import LatentModel, load_latent_model
from qncd.models.loading import load_config
from qncd.models.network import network_of
from qncd.models.original.conditioning import ClassConditioner, TextConditioner
from qncd.recipe import SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process
from qncd.sampling.samplers import StepState, sample_ddim, sample_plms

from ..conftest import FAR


class Replay:
    """Noise that was drawn before, in place of an ImageNoise."""

    def __init__(self, draws: Any) -> None:
        self.draws = list(draws)

    def normal(self, shape: Any, device: Any = "cpu") -> Tensor:
        return self.draws.pop(0)


def load(name: str) -> LatentModel:
    checkpoint = FAR / f"{name}.ckpt"
    if not checkpoint.is_file():
        pytest.skip(f"{name}.ckpt is not here")
    config = load_config(FAR / f"{name}.yaml")
    if (fields := FAR / f"{name}_clip_text_config.json").is_file():
        config["model"]["params"]["cond_stage_config"]["params"] = {"text_config": json.loads(fields.read_text())}
    return load_latent_model(config, checkpoint)


@torch.no_grad()
def trajectory(
    model: LatentModel, config: SamplerConfig, x: Tensor, conditions: Conditions | None, noise: Any
) -> tuple[list[StepState], Tensor]:
    """Every step from x_T and the images in [0, 1]."""
    diffusion = Diffusion(network_of(model.unet), Process.from_betas(model.betas), config, model.latent_shape, lane=len(x))
    seen: list[StepState] = []
    denoise = diffusion.denoiser(conditions)
    if config.sample_type == "plms":
        last = sample_plms(denoise, x, diffusion.steps, callback=seen.append)
    else:
        last = sample_ddim(denoise, x, diffusion.steps, Replay(noise), callback=seen.append)  # type: ignore[arg-type]
    return seen, ((model.first_stage.decode(last) + 1) / 2).clamp(0, 1)


def check(data: Any, name: str, seen: list[StepState], images: Tensor, atol: float, image: str | None = None) -> None:
    expected, x0 = data[f"{name}_x"], data[f"{name}_pred_x0"]
    assert len(seen) == len(expected) - 1
    for i, state in enumerate(seen):
        torch.testing.assert_close(state.x_prev, expected[i + 1], rtol=0, atol=atol)
        torch.testing.assert_close(state.x0, x0[i], rtol=1e-4, atol=5 * atol)
    torch.testing.assert_close(images, data[image or f"{name}_image"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0, 1])
def test_unconditional_latent_diffusion(golden: Any, eta: int) -> None:
    model, data = load("ldm_uncond"), golden("ldm_uncond_io")
    config = SamplerConfig(timesteps=10, eta=float(eta), convention="ldm")
    seen, images = trajectory(model, config, data["x_T"], None, data[f"ddim10_eta{eta}_noise"] if eta else [])
    assert [s.step.t for s in seen] == data["ddim10_timesteps"].tolist()[::-1]
    check(data, f"ddim10_eta{eta}", seen, images, 2e-4)


def test_class_conditional_latent_diffusion_with_guidance(golden: Any) -> None:
    model, data = load("ldm_class_cond"), golden("ldm_class_cond_io")
    assert isinstance(model.conditioner, ClassConditioner)
    uncond = model.conditioner.unconditional(1)
    assert torch.equal(uncond.expand(2, -1, -1), data["uncond_context"])
    conditions = Conditions({CONTEXT: model.conditioner(data["class_label"])}, {CONTEXT: uncond}, 3.0)
    assert torch.equal(conditions.inputs[CONTEXT], data["context"])
    config = SamplerConfig(timesteps=20, convention="ldm")
    seen, images = trajectory(model, config, data["x_T"], conditions, [])
    assert [s.step.t for s in seen] == data["ddim20_timesteps"].tolist()[::-1]
    check(data, "ddim20_cfg3", seen, images, 1e-3)


@pytest.mark.parametrize(("kind", "count"), [("plms", 10), ("plms", 25), ("ddim", 10), ("ddim", 25)])
def test_stable_diffusion_with_guidance(golden: Any, kind: str, count: int) -> None:
    model, data = load("sd_txt2img"), golden("sd_txt2img_io")
    assert isinstance(model.conditioner, TextConditioner)
    cond, uncond = (model.conditioner.encode(data[key]) for key in ("tokens", "uncond_tokens"))
    torch.testing.assert_close(cond, data["context"], rtol=0, atol=1e-5)
    config = SamplerConfig("plms" if kind == "plms" else "generalized", timesteps=count, convention="ldm")
    seen, images = trajectory(model, config, data["x_T"], Conditions({CONTEXT: cond}, {CONTEXT: uncond[:1]}, 7.5), [])
    assert np.array_equal([s.step.t for s in seen], data[f"{kind}{count}_timesteps"].numpy()[::-1])
    check(data, f"{kind}{count}", seen, images, 1e-3)
