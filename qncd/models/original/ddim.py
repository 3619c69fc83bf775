"""DDIM UNets (ermongroup/ddim `Model`) as diffusers' UNet2DModel: settings from the original yaml, keys of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from qncd.models.original.key_tables import (
    KeyTable,
    Pointwise,
    Renamed,
    check_original,
    from_original,
    plain_keys,
    shapes_of,
    to_original,
)
from qncd.models.schema import DDIM, check

# Names inside a module: original -> diffusers.
_TOP = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
_SHORTCUT = {"nin_shortcut": "conv_shortcut"}  # only where a block changes the number of channels
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LINEAR_ATTENTION = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
_KIND = "DDIM model"  # in errors


def ddim_unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """UNet2DModel settings that compute what ermongroup/ddim's `Model(config)` computes.

    Args:
        config: the original yaml as a mapping with `model` and `data` sections. `model.num_groups` (not in the
            original, whose GroupNorm always has 32 groups) sets the number of GroupNorm groups.

    Raises:
        ValueError: a setting is missing or outside what the original network allows.
    """
    check(config, DDIM)
    model, image_size = config["model"], config["data"]["image_size"]
    base, multipliers, attention = model["ch"], model["ch_mult"], set(model["attn_resolutions"])
    if not model.get("resamp_with_conv", True):
        raise ValueError("model.resamp_with_conv false is not supported: allowed is true (every published DDIM model)")
    groups, levels = model.get("num_groups", 32), len(multipliers)
    if any(base * m % groups for m in multipliers):
        raise ValueError(f"model.num_groups {groups} must divide every width: {[base * m for m in multipliers]}")
    if image_size % 2 ** (levels - 1):
        halvings = f"{levels} levels of model.ch_mult halve it {levels - 1} times"
        raise ValueError(f"data.image_size {image_size}: allowed are multiples of {2 ** (levels - 1)}, as {halvings}")
    at_level = [image_size // 2**i in attention for i in range(levels)]
    return {
        "sample_size": image_size,
        "in_channels": model["in_channels"],
        "out_channels": model["out_ch"],
        "block_out_channels": tuple(base * m for m in multipliers),
        "layers_per_block": model["num_res_blocks"],
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at_level),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at_level)),
        "dropout": float(model.get("dropout", 0.0)),
        "norm_num_groups": groups,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "act_fn": "silu",
    }


def build_ddim_unet(config: Mapping[str, Any]) -> UNet2DModel:
    """A UNet2DModel with fresh weights for an ermongroup/ddim config. Raises ValueError as `ddim_unet_config`."""
    return UNet2DModel(**ddim_unet_config(config))


def ddim_key_map(config: Mapping[str, Any]) -> dict[str, str]:
    """Every key of the original `Model(config).state_dict()` -> its key in the UNet2DModel; one to one.

    The original numbers its up blocks by resolution, diffusers in the order of the forward pass: `up.i` is
    `up_blocks[L - 1 - i]`. Everything else is a change of names.

    Raises:
        ValueError: as `ddim_unet_config`.
    """
    settings = ddim_unet_config(config)
    widths, blocks = settings["block_out_channels"], settings["layers_per_block"]
    levels = len(widths)
    modules = dict(_TOP)

    def add(original: str, ours: str, names: Mapping[str, str]) -> None:
        modules.update({f"{original}.{old}": f"{ours}.{new}" for old, new in names.items()})

    skips = [widths[0]]  # channels of the activations that the up path concatenates, in the order they are made
    channels = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            add(f"down.{i}.block.{j}", f"down_blocks.{i}.resnets.{j}", _RESNET | (_SHORTCUT if channels != width else {}))
            if settings["down_block_types"][i].startswith("Attn"):
                add(f"down.{i}.attn.{j}", f"down_blocks.{i}.attentions.{j}", _ATTENTION)
            channels = width
            skips.append(width)
        if i < levels - 1:
            modules[f"down.{i}.downsample.conv"] = f"down_blocks.{i}.downsamplers.0.conv"
            skips.append(width)
    for j in (0, 1):
        add(f"mid.block_{j + 1}", f"mid_block.resnets.{j}", _RESNET)
    add("mid.attn_1", "mid_block.attentions.0", _ATTENTION)
    for i in reversed(range(levels)):
        ours = f"up_blocks.{levels - 1 - i}"
        for j in range(blocks + 1):
            changes = channels + skips.pop() != widths[i]
            add(f"up.{i}.block.{j}", f"{ours}.resnets.{j}", _RESNET | (_SHORTCUT if changes else {}))
            if settings["down_block_types"][i].startswith("Attn"):
                add(f"up.{i}.attn.{j}", f"{ours}.attentions.{j}", _ATTENTION)
            channels = widths[i]
        if i > 0:
            modules[f"up.{i}.upsample.conv"] = f"{ours}.upsamplers.0.conv"
    return {f"{old}.{kind}": f"{new}.{kind}" for old, new in modules.items() for kind in ("weight", "bias")}


def ddim_weights(checkpoint: Any, config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The state dict inside a checkpoint of ermongroup/ddim, with its original keys.

    Args:
        checkpoint: a bare state dict (the published `ema_*` files), or the training list `[model, optimizer, epoch,
            step]` with the EMA weights as a fifth entry; those are taken where `config["model"]["ema"]` is true, as the
            original sampler does. A state dict may also lie below `state_dict`. The prefixes of DataParallel and
            torch.compile are removed.

    Raises:
        ValueError: neither of the two.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        state = checkpoint["state_dict"]
    if isinstance(checkpoint, list | tuple):
        if not checkpoint:
            raise ValueError("the checkpoint is an empty list, expected [model, optimizer, epoch, step, ema]")
        has_ema = len(checkpoint) > 4 and isinstance(checkpoint[-1], Mapping)
        state = checkpoint[-1] if has_ema and config["model"].get("ema", False) else checkpoint[0]
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"the checkpoint holds a {type(state).__name__}, expected a state dict or DDIM's list of states")
    return plain_keys(state)


def convert_ddim_state_dict(checkpoint: Any, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of an original DDIM checkpoint under the names of `build_ddim_unet(config)`.

    The 1x1 attention convolutions (C, C, 1, 1) become linear layers (C, C). Tensors share memory with the checkpoint
    and keep its dtype.

    Args:
        checkpoint: what `ddim_weights` takes.

    Raises:
        ValueError: a key is missing, left over, of another shape than the config says, or holds no tensor.
    """
    state, table = dict(ddim_weights(checkpoint, config)), ddim_key_table(config)
    check_original(state, table, shapes_of(lambda: build_ddim_unet(config)), _KIND)
    return dict(from_original(state, table))


def to_ddim_state_dict(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inverse of `convert_ddim_state_dict`: UNet2DModel weights under their names in ermongroup/ddim.

    Raises:
        ValueError: a key of `build_ddim_unet(config)` is missing or left over.
    """
    return to_original(state, ddim_key_table(config), _KIND)


def ddim_key_table(config: Mapping[str, Any]) -> KeyTable:
    names = ddim_key_map(config)
    return {old: Pointwise(new) if new.endswith(_LINEAR_ATTENTION) else Renamed(new) for old, new in names.items()}
