"""Small latent diffusion models with random weights: configs, state dicts in the original layout, comparison."""

from __future__ import annotations

from typing import Any

import torch

from qncd.models.latent import LatentModel
from qncd.models.loading import state_dict_hash
from qncd.models.original.autoencoders import FirstStage, build_first_stage
from qncd.models.original.compvis import build_conditioner, original_state_dict
from qncd.models.original.ldm import build_ldm_unet

TEXT = {"vocab_size": 49408, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def config_of(kind: str, **params: Any) -> dict[str, Any]:
    """A small model: "none", "class" or "text"."""
    text = kind == "text"
    unet = {
        "in_channels": 3, "out_channels": 3, "model_channels": 8, "attention_resolutions": [2], "num_res_blocks": 1,
        "channel_mult": [1, 2], "num_groups": 4, "num_heads": 2,
    }  # fmt: skip
    if kind != "none":
        unet |= {"use_spatial_transformer": True, "context_dim": 8}
    dd = {
        "double_z": text, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [], "num_groups": 4,
    }  # fmt: skip
    stage = {"embed_dim": 3, "ddconfig": dd} | ({} if text else {"n_embed": 16})
    conditions: dict[str, Any] = {
        "none": "__is_unconditional__",
        "class": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": 5, "embed_dim": 8}},
        "text": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"text_config": TEXT}},
    }
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "image_size": 8, "channels": 3,
                "use_ema": kind == "none", **({"scale_factor": 0.18215} if text else {}),
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {
                    "target": f"ldm.models.autoencoder.{'AutoencoderKL' if text else 'VQModelInterface'}", "params": stage,
                },
                "cond_stage_config": conditions[kind], **params,
            },
        }
    }  # fmt: skip


def state_of(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in the original layout."""
    torch.manual_seed(seed)
    stage = FirstStage(build_first_stage(config))
    state = original_state_dict(config, build_ldm_unet(config), stage, build_conditioner(config))
    return {key: value.detach().contiguous() for key, value in state.items()}


def with_extras(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """The state dict as a Lightning checkpoint with what else the originals keep; the averaged UNet is another one."""
    prefix = "model.diffusion_model."
    average = {key.removeprefix(prefix): value + 1e-2 for key, value in state.items() if key.startswith(prefix)}
    extras = {f"model_ema.diffusion_model{key.replace('.', '')}": value for key, value in average.items()}
    extras |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3), "logvar": torch.zeros(1000)}
    extras |= {"betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, "posterior_variance": torch.zeros(1000)}
    extras |= {"first_stage_model.loss.logvar": torch.zeros(()), "first_stage_model.loss.perceptual_loss.lin0.x": torch.zeros(1)}
    if config["model"]["params"]["cond_stage_config"] != "__is_unconditional__":
        extras["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {"epoch": 1, "state_dict": {**state, **extras}, "optimizer_states": [{"state": {}}], "callbacks": {}}


def same(a: LatentModel, b: LatentModel) -> bool:
    parts = [(a.unet, b.unet), (a.first_stage.model, b.first_stage.model)]
    if a.conditioner is not None and b.conditioner is not None:
        parts.append((a.conditioner, b.conditioner))
    return (
        all(state_dict_hash(x) == state_dict_hash(y) for x, y in parts)
        and type(a.conditioner) is type(b.conditioner)
        and abs(a.betas - b.betas).max() < 1e-12
        and (a.latent_shape, a.first_stage.scale) == (b.latent_shape, b.first_stage.scale)
    )
