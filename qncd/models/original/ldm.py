"""The UNets of CompVis' latent-diffusion and Stable Diffusion v1 as diffusers models: settings from the yaml, keys, betas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from qncd.models.original.key_tables import FusedHeads, KeyTable, Layout, Pointwise, Renamed
from qncd.models.original.unet_names import Plan, module_names, renamed, renamed_inside
from qncd.models.schema import SCHEDULE, UNET_PARAMS, Section, check, one_line

LdmUNet = UNet2DModel | UNet2DConditionModel

# Parameters of UNetModel that must have one of these values, or be absent.
_FIXED: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "num_classes": (None,),
    "n_embed": (None,),
    "disable_self_attentions": (None,),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False,),
}


@dataclass(frozen=True)
class _Architecture:
    """UNetModel's parameters, checked; level i works on widths[i] channels."""

    image_size: int | None
    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    heads: tuple[int, ...]  # of each level, also where it has no attention
    head_channels: int  # of the original; -1: the number of heads is fixed instead
    groups: int
    dropout: float
    scale_shift: bool
    resblock_updown: bool
    heads_first: bool  # the rows of qkv are grouped by head, then by q, k, v
    context_dim: int | None  # with cross-attention
    depth: int
    linear_projection: bool


def _unet_params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        unet = config["model"]["params"]["unet_config"]
        target, params = str(unet.get("target", "UNetModel")), unet["params"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the config has no model.params.unet_config.params: not the yaml of a latent diffusion model") from None
    if target.rpartition(".")[2] != "UNetModel":
        raise ValueError(f"unet_config.target {target}: allowed is ldm.modules.diffusionmodules.openaimodel.UNetModel")
    if not isinstance(params, Mapping):
        raise ValueError(f"unet_config.params is a {type(params).__name__}, expected a mapping")
    return params


def _architecture(config: Mapping[str, Any]) -> _Architecture:
    params = _unet_params(config)
    where = "model.params.unet_config.params"
    if unknown := sorted(map(str, params.keys() - UNET_PARAMS.keys - _FIXED.keys())):
        raise ValueError(f"unet_config has parameters that are not supported: {', '.join(unknown)}")
    for name, allowed in _FIXED.items():
        if params.get(name, allowed[0]) not in allowed:
            raise ValueError(f"unet_config.{name} {one_line(params[name])} is not supported: allowed is {allowed[0]}")
    check(params, UNET_PARAMS, where)
    image_size = config["model"]["params"].get("image_size", params.get("image_size"))
    check(image_size, UNET_PARAMS.optional["image_size"], "model.params.image_size")
    multipliers, resolutions = list(params.get("channel_mult", (1, 2, 4, 8))), set(params["attention_resolutions"])
    widths = tuple(params["model_channels"] * m for m in multipliers)
    heads, head_channels = params.get("num_heads", -1), params.get("num_head_channels", -1)
    if 0 in (heads, head_channels) or (heads < -1 and head_channels < 1):
        raise ValueError(f"{where}.num_heads {heads}, num_head_channels {head_channels}: allowed are whole numbers from 1")
    spatial, context = params.get("use_spatial_transformer", False), params.get("context_dim")
    upsample_heads = params.get("num_heads_upsample", -1)
    attends = tuple(2**i in resolutions for i in range(len(widths)))
    result = _Architecture(
        image_size=image_size,
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        widths=widths,
        blocks=params["num_res_blocks"],
        attends=attends,
        heads=tuple(max(1, heads if head_channels == -1 else width // head_channels) for width in widths),
        head_channels=head_channels,
        groups=params.get("num_groups", 32),
        dropout=float(params.get("dropout", 0.0)),
        scale_shift=params.get("use_scale_shift_norm", False),
        resblock_updown=params.get("resblock_updown", False),
        heads_first=not params.get("use_new_attention_order", False),
        context_dim=context,
        depth=params.get("transformer_depth", 1),
        linear_projection=params.get("use_linear_in_transformer", False),
    )
    if heads == -1 and head_channels == -1:
        raise ValueError("unet_config has neither num_heads nor num_head_channels")
    if multipliers[0] != 1:
        raise ValueError(f"{where}.channel_mult {multipliers}: allowed are lists that begin with 1 (else the original fails)")
    if spatial != (context is not None):
        raise ValueError("unet_config: use_spatial_transformer and context_dim need one another")
    if spatial and result.resblock_updown:
        raise ValueError("unet_config.resblock_updown with use_spatial_transformer is not supported: allowed is false")
    if upsample_heads not in (-1, heads) and head_channels == -1 and not spatial:
        raise ValueError(f"unet_config.num_heads_upsample {upsample_heads} is not supported: allowed is num_heads, {heads}")
    if any(width % result.groups for width in widths):
        raise ValueError(f"{where}.num_groups {result.groups} must divide every width: {list(widths)}")
    for width, n, attention in zip(widths, result.heads, (*attends[:-1], True), strict=True):  # the middle attends always
        if attention and (width % n if head_channels == -1 else width % head_channels):
            what = f"num_heads {n}" if head_channels == -1 else f"num_head_channels {head_channels}"
            raise ValueError(f"unet_config.{what} must divide the width of each level with attention: {width}")
    return result


def unet_settings(config: Mapping[str, Any]) -> tuple[type[UNet2DModel] | type[UNet2DConditionModel], dict[str, Any]]:
    """The diffusers class and settings that compute what CompVis' `UNetModel` computes with this yaml.

    `unet_config.params.num_groups` (not in the original, which has 32) sets the number of GroupNorm groups.

    Raises:
        ValueError: a setting is missing, contradictory or not supported.
    """
    a = _architecture(config)
    settings: dict[str, Any] = {
        "sample_size": a.image_size,
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "block_out_channels": a.widths,
        "layers_per_block": a.blocks,
        "dropout": a.dropout,
        "norm_num_groups": a.groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "act_fn": "silu",
        "resnet_time_scale_shift": "scale_shift" if a.scale_shift else "default",
    }
    if a.context_dim is not None:
        return UNet2DConditionModel, settings | {
            "down_block_types": tuple("CrossAttnDownBlock2D" if at else "DownBlock2D" for at in a.attends),
            "up_block_types": tuple("CrossAttnUpBlock2D" if at else "UpBlock2D" for at in reversed(a.attends)),
            "cross_attention_dim": a.context_dim,
            "attention_head_dim": a.heads[0] if len(set(a.heads)) == 1 else a.heads,  # the NUMBER of heads, despite its name
            "transformer_layers_per_block": a.depth,
            "use_linear_projection": a.linear_projection,
        }
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if a.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    return UNet2DModel, settings | {
        "down_block_types": tuple("AttnDownBlock2D" if at else plain_down for at in a.attends),
        "up_block_types": tuple("AttnUpBlock2D" if at else plain_up for at in reversed(a.attends)),
        "attention_head_dim": _channels_per_head(a),
        "attn_norm_num_groups": a.groups,  # without it, scale-shift drops the middle attention's GroupNorm
        "downsample_type": "resnet" if a.resblock_updown else "conv",
        "upsample_type": "resnet" if a.resblock_updown else "conv",
    }


def _channels_per_head(a: _Architecture) -> int | None:
    """UNet2DModel's `attention_head_dim`: one number for all levels, or None for one head in each."""
    if a.head_channels != -1:
        return a.head_channels
    sizes = {w // n for w, n, at in zip(a.widths, a.heads, (*a.attends[:-1], True), strict=True) if at}
    return sizes.pop() if len(sizes) == 1 else None


def build_ldm_unet(config: Mapping[str, Any]) -> LdmUNet:
    """The UNet of a latent diffusion yaml with fresh weights. Raises ValueError as `unet_settings`.

    UNet2DModel's config holds the channels of a head, not the number of heads. Where a yaml fixes the number (`num_heads`)
    for levels of several widths, as LSUN churches does, the heads are set in the network and its config does not tell.
    """
    kind, settings = unet_settings(config)
    unet = kind(**settings)
    if kind is UNet2DModel and settings["attention_head_dim"] is None:
        set_heads_(unet, _architecture(config).heads[0])
    return unet


def set_heads_(network: nn.Module, heads: int) -> None:
    """Divide the channels of each attention layer in the network among this many heads."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = heads
            module.scale = (module.inner_dim // heads) ** -0.5


def ldm_betas(config: Mapping[str, Any]) -> np.ndarray:
    """The variances (T,) float64 of the config's noise schedule.

    LDM's "linear" is linear in the square root: beta_t = linspace(sqrt(start), sqrt(end), T)^2, `scaled_linear` in diffusers.

    Raises:
        ValueError: another schedule, or numbers that make none.
    """
    check(config, Section({"model": Section({"params": SCHEDULE})}))
    params = config["model"]["params"]
    if (schedule := params.get("beta_schedule", "linear")) != "linear":
        raise ValueError(f"model.params.beta_schedule {schedule!r} is not supported: allowed is linear")
    start, end = float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2))
    steps = params.get("timesteps", 1000)
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def ldm_unet_key_map(config: Mapping[str, Any]) -> dict[str, Layout]:
    """Every key of the original UNetModel's state dict -> where its tensor goes in `build_ddim_unet(config)`; one to one.

    The names inside a SpatialTransformer are the same in both; an AttentionBlock's fused `qkv` becomes three layers.

    Raises:
        ValueError: as `unet_settings`.
    """
    a = _architecture(config)
    with torch.device("meta"):
        parameters = set(build_ldm_unet(config).state_dict())
    modules, attentions = module_names(Plan(a.attends, a.blocks, a.resblock_updown))
    table = renamed(modules, parameters)
    if a.context_dim is not None:
        return table | renamed_inside(attentions, parameters)
    for old, new in attentions.items():
        width = a.widths[-1] if new.startswith("mid") else a.widths[_level(new, len(a.widths))]
        table.update(_attention_block(old, new, _heads_at(a, width)))
    return table


def _level(module: str, levels: int) -> int:
    side, index = module.split(".")[:2]
    return int(index) if side == "down_blocks" else levels - 1 - int(index)


def _heads_at(a: _Architecture, width: int) -> int:
    return (a.heads[0] if a.head_channels == -1 else width // a.head_channels) if a.heads_first else 1


def _attention_block(old: str, new: str, heads: int) -> KeyTable:
    def qkv(kind: str) -> Sequence[str]:
        return tuple(f"{new}.to_{x}.{kind}" for x in "qkv")

    return {
        f"{old}.norm.weight": Renamed(f"{new}.group_norm.weight"),
        f"{old}.norm.bias": Renamed(f"{new}.group_norm.bias"),
        f"{old}.qkv.weight": FusedHeads(tuple(qkv("weight")), heads),
        f"{old}.qkv.bias": FusedHeads(tuple(qkv("bias")), heads),
        f"{old}.proj_out.weight": Pointwise(f"{new}.to_out.0.weight", dims=1),
        f"{old}.proj_out.bias": Renamed(f"{new}.to_out.0.bias"),
    }
