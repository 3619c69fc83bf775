"""Small random latent models in the original layout, and a way to run a script in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from script_runs import run_in_process

from qncd.models.original.autoencoders import FirstStage, build_first_stage
from qncd.models.original.compvis import build_conditioner, original_state_dict
from qncd.models.original.ldm import build_ldm_unet

RunScript = Callable[..., str]


@pytest.fixture(scope="session")
def run_script() -> RunScript:
    """run_script(name, *arguments, status=0): `run_in_process`."""
    return run_in_process


def latent_config(kind: str) -> dict[str, Any]:
    """A yaml in CompVis' layout: "class" (VQ, 4 classes and none), "none" (VQ, unconditional) or "text" (KL, CLIP)."""
    unet: dict[str, Any] = {
        "image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 16, "attention_resolutions": [2],
        "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2, "num_groups": 4,
    }  # fmt: skip
    first = {"z_channels": 3, "resolution": 16, "in_channels": 1, "out_ch": 1, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1}
    first |= {"attn_resolutions": [], "dropout": 0.0, "double_z": kind == "text", "num_groups": 4}
    if kind != "none":
        unet |= {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 16}
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    conditions: dict[str, Any] = {
        "none": "__is_unconditional__",
        "class": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": 5, "embed_dim": 16}},
        "text": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"text_config": text}},
    }
    vq = {"embed_dim": 3, "n_embed": 16, "ddconfig": first}
    target = "ldm.models.autoencoder.AutoencoderKL" if kind == "text" else "ldm.models.autoencoder.VQModelInterface"
    if kind == "text":
        vq = {"embed_dim": 3, "ddconfig": first | {"in_channels": 3, "out_ch": 3}}
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "channels": 3, "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": target, "params": vq},
        "cond_stage_config": conditions[kind],
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


@pytest.fixture(scope="session")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """latent_folder(kind): a folder with a random model's model.ckpt and config.yaml, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            config = latent_config(kind)
            conditioner = build_conditioner(config)
            if kind == "class":
                torch.nn.init.normal_(conditioner.embedding.weight, std=3.0)  # type: ignore[union-attr, arg-type]
            stage = FirstStage(build_first_stage(config), 1.0)
            state = original_state_dict(config, build_ldm_unet(config), stage, conditioner)
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            made[kind].mkdir()
            torch.save({"state_dict": {key: value.detach().clone() for key, value in state.items()}}, made[kind] / "model.ckpt")
            (made[kind] / "config.yaml").write_text(yaml.safe_dump(config))
        return made[kind]

    return make
