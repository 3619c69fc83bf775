"""What the commands for latent models share: find model and yaml, conditions of images, latents to pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.io.images import to_uint8
from qncd.models.latent import LatentModel, load_latent_model
from qncd.models.loading import load_config, state_dict_hash
from qncd.models.network import network_of
from qncd.models.original.conditioning import ClassConditioner, TextConditioner
from qncd.models.safety import Finisher
from qncd.models.schema import COMPVIS, expect_layout
from qncd.models.single_files import yaml_of
from qncd.recipe import SamplerConfig
from qncd.sampling.diffusion import Diffusion, fill_up
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process

log = logging.getLogger("qncd")
CONTEXT = "encoder_hidden_states"  # the networks' name for it
TEXT_LANE = 16  # prompts that the text model sees at a time, always exactly


def find_model(config: Path | None, ckpt: str | None, default_config: Path) -> tuple[dict[str, Any], str | None]:
    """The yaml and the weights that the flags mean.

    A checkpoint without --config brings its yaml along: of its name, config.yaml, or another single yaml in its folder; Stable
    Diffusion v1 at full size needs none. Without both, the bundled model.

    Raises:
        ValueError, FileNotFoundError: there is no yaml for the checkpoint, or no such file.
    """
    if ckpt is None:
        return load_config(config or default_config), None
    path = Path(ckpt)
    if path.is_dir() and (path / "model.ckpt").is_file():
        path = path / "model.ckpt"
    if config is not None:
        return load_config(config), str(path) if path.exists() else ckpt
    if not path.exists():
        raise FileNotFoundError(f"{ckpt}: no such checkpoint")
    if path.is_dir():
        raise ValueError(f"{ckpt}: neither a pipeline's folder (no model_index.json in it) nor one with model.ckpt")
    return load_config(yaml_of(path)), str(path)


def load_model(args: argparse.Namespace, default_config: Path, device: str) -> tuple[LatentModel, dict[str, Any]]:
    """The latent model that --config, the checkpoint flag and --use_pretrained name, on `device`, and its yaml."""
    config, ckpt = find_model(args.config, args.ckpt, default_config)
    expect_layout(config, args.config or ckpt, COMPVIS)
    return load_latent_model(config, ckpt, args.use_pretrained, args.sha256).to(device), config


def tell_model(model: LatentModel) -> None:
    """Say which model it is; before all is checked, this would be a second line beside an error."""
    log.info("model: %s, latents %s", model.source, "x".join(map(str, model.latent_shape)))


def recommended_scale(config: Mapping[str, Any], fallback: float) -> float:
    """The guidance that the model's yaml recommends as sampling.scale, else `fallback`."""
    scale = (config.get("sampling") or {}).get("scale")
    return fallback if scale is None else float(scale)


def model_hashes(model: LatentModel) -> dict[str, Any]:
    """SHA-256 of each part's weights."""
    conditioner = model.conditioner
    return {
        "model": state_dict_hash(model.unet),
        "first_stage": state_dict_hash(model.first_stage.model),
        "scale_factor": model.first_stage.scale,
        "conditioner": state_dict_hash(conditioner) if conditioner is not None else None,
    }


def latent_lane(side: int, guided: bool) -> int:
    """Images in each network call by the side of the latents, so that a call's activations stay near those of 16x16."""
    images = 16 if side <= 16 else 4 if side <= 32 else 2
    return max(1, images // 2) if guided and side > 16 else images


def build_diffusion(
    model: LatentModel, sampler: SamplerConfig, shape: tuple[int, int, int], lane: int | None, guided: bool, precision: str
) -> Diffusion:
    """The model's UNet with its schedule and the sampler. Raises ValueError for steps that the schedule does not have."""
    lane = lane or latent_lane(max(shape[1:]), guided)
    diffusion = Diffusion(network_of(model.unet), Process.from_betas(model.betas), sampler, shape, lane, precision)
    log.debug("%d steps: %s", len(diffusion.steps), diffusion.times)
    return diffusion


def make_decoder(model: LatentModel, lane: int, finish: Finisher = lambda images: images) -> Callable[[Tensor], np.ndarray]:
    """latents (N, C, h, w) -> images uint8 (N, H, W, C), in lanes of one size: an image does not depend on its batch."""

    @torch.no_grad()
    def decode(latents: Tensor) -> np.ndarray:
        parts = []
        for start in range(0, len(latents), lane):
            part = latents[start : start + lane]
            parts.append(to_uint8(model.first_stage.decode(fill_up(part, lane - len(part))))[: len(part)])
        return finish(np.concatenate(parts))

    return decode


def check_guidance(model: LatentModel, scale: float | None, default: float) -> float:
    """The guidance scale: `default` for a conditional model, 1 for another. Raises ValueError where that takes none."""
    if model.conditioner is None:
        if scale not in (None, 1.0):
            raise ValueError(f"--scale {scale:g}: {model.source} is unconditional; allowed is 1")
        return 1.0
    return default if scale is None else scale


def in_context(cond: Tensor, uncond: Tensor | None, scale: float) -> Conditions:
    """Contexts (N, L, D), and one (1, L, D) of "nothing", as what a network with cross-attention is conditioned on."""
    return Conditions({CONTEXT: cond}, None if uncond is None else {CONTEXT: uncond}, scale)


def class_conditions(model: LatentModel, labels: Sequence[int], scale: float) -> Conditions:
    """Contexts of class labels with guidance."""
    conditioner = model.conditioner
    assert isinstance(conditioner, ClassConditioner)
    with torch.no_grad():
        uncond = conditioner.unconditional(1) if scale != 1 else None
        return in_context(conditioner(torch.tensor(list(labels))), uncond, scale)


class PromptEncoder:
    """Contexts of prompts, each computed among a fixed number of others, so that it does not depend on them."""

    def __init__(self, model: LatentModel, scale: float) -> None:
        if not isinstance(model.conditioner, TextConditioner):
            raise ValueError(f"{model.source} takes no text: scripts/sample_diffusion_ldm.py samples it")
        self.conditioner, self.scale = model.conditioner, scale
        self.uncond = self._encode([""]) if scale != 1 else None

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Contexts (N, 77, D) of N prompts with guidance."""
        return in_context(self._encode(prompts), self.uncond, self.scale)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(prompts), TEXT_LANE):
            part = list(prompts[start : start + TEXT_LANE])
            parts.append(self.conditioner([*part, *[""] * (TEXT_LANE - len(part))])[: len(part)])
        return torch.cat(parts)
