"""Small pipelines of diffusers as one checkpoint file in the layout of CompVis' and Stability's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from small_pipelines import KINDS, text_model, xl
from torch import Tensor

from qncd.models.original.autoencoders import first_stage_key_map
from qncd.models.original.conditioning import bare_text_key
from qncd.models.original.key_tables import Renamed, to_original
from qncd.models.original.ldm import ldm_unet_key_map

State = dict[str, Tensor]
# Text models of two widths: by them diffusers tells SDXL's two apart.
MAKE = {
    **{name: kind.make for name, kind in KINDS.items()},
    "SDXL": lambda: xl(text_encoder=text_model(12), text_encoder_2=text_model(20, 16)),
}
LAYERS = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
IN_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def made_for_files(kind: str) -> Any:
    """The pipeline of a kind, no two of whose tensors are equal."""
    torch.manual_seed(0)
    pipe = MAKE[kind]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_state(network: Any) -> State:
    """The keys of CompVis' UNetModel, and SDXL's label_emb."""
    depth = network.config.transformer_layers_per_block
    params = {
        "in_channels": 4, "out_channels": 4, "model_channels": 16, "attention_resolutions": [2], "num_res_blocks": 1,
        "channel_mult": [1, 2], "num_groups": 4, "num_heads": 2, "use_spatial_transformer": True,
        "context_dim": network.config.cross_attention_dim, "transformer_depth": depth if isinstance(depth, int) else depth[-1],
        "use_linear_in_transformer": network.config.use_linear_projection,
    }  # fmt: skip
    table = ldm_unet_key_map({"model": {"params": {"unet_config": {"params": params}, "image_size": 8}}})
    if network.config.addition_embed_type is not None:
        added = DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
        table |= {old: Renamed(new) for new, old in added.items()}
    return to_original(network.state_dict(), table, "UNet")


def vae_state(network: Any) -> State:
    dd = {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "num_groups": 4,
    }  # fmt: skip
    stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": dd}}
    table = first_stage_key_map({"model": {"params": {"first_stage_config": stage}}})
    return to_original(network.state_dict(), table, "autoencoder")


def clip_state(network: Any) -> State:
    """The keys of transformers before version 5."""
    return {f"transformer.text_model.{bare_text_key(key)}": value for key, value in network.state_dict().items()}


def open_clip_state(network: Any) -> State:
    """The keys of open_clip's text model: queries, keys and values in one matrix, the projection transposed."""
    state = {bare_text_key(key): value for key, value in network.state_dict().items()}
    projection = state.get("text_projection.weight", torch.eye(network.config.hidden_size))
    result = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": projection.T,
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(network.config.num_hidden_layers):
        old, new = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            joint = [state[f"{new}.self_attn.{name}.{kind}"] for name in LAYERS]
            result[f"{old}.attn.in_proj_{kind}"] = torch.cat(joint)
            result |= {f"{old}.{theirs}.{kind}": state[f"{new}.{ours}.{kind}"] for ours, theirs in IN_BLOCK.items()}
    return result


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def single_file_state(pipe: Any) -> State:
    """All networks of the pipeline under the keys of the original code."""
    state = prefixed("model.diffusion_model.", unet_state(pipe.unet)) | prefixed("first_stage_model.", vae_state(pipe.vae))
    second, first = getattr(pipe, "text_encoder_2", None), pipe.text_encoder
    if second is not None:
        number = 0 if first is None else 1
        state |= prefixed(f"conditioner.embedders.{number}.model.", open_clip_state(second))
    if first is not None:
        if second is not None:
            state |= prefixed("conditioner.embedders.0.", clip_state(first))
        elif pipe.unet.config.use_linear_projection:  # Stable Diffusion 2
            state |= prefixed("cond_stage_model.model.", open_clip_state(first))
        else:
            state |= prefixed("cond_stage_model.", clip_state(first))
    state["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return {key: value.contiguous().clone() for key, value in state.items()}


def configs_alone(pipe: Any, folder: Path) -> Path:
    """The folder of the pipeline without weights, as the hub has it for those who load single files."""
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder
