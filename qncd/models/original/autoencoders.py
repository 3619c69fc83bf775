"""First stages of latent diffusion (VQModelInterface, AutoencoderKL of CompVis) as diffusers' VQModel and AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from qncd.models.original.key_tables import Layout, Pointwise, Renamed
from qncd.models.schema import DDCONFIG, FIRST_STAGE, FIRST_STAGE_PARAMS, SCALE, Section, check, one_line

Autoencoder = VQModel | AutoencoderKL

# Names inside a module: original -> diffusers.
_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",  # only where a block changes the number of channels
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# What diffusers called these before 0.17; converters left both kinds of names in original checkpoints.
_OLD_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_TO_ORIGINAL = {new: old for old, new in _ATTENTION.items()} | _OLD_ATTENTION
_LEFT = re.compile(rf"(\.attn(?:_1|\.\d+)?\.)({'|'.join(map(re.escape, _TO_ORIGINAL))})\.(weight|bias)")
_TARGETS = {"VQModelInterface": VQModel, "VQModel": VQModel, "AutoencoderKL": AutoencoderKL}

# Parameters that only matter in training.
_IGNORED = {
    "lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "scheduler_config", "lr_g_factor",
    "batch_resize_range", "use_ema",
}  # fmt: skip
# What must have one value, or be absent.
_FIXED = {"remap": None, "sane_index_shape": False}
_FIXED_DD = {"resamp_with_conv": True, "use_linear_attn": False, "give_pre_end": False, "tanh_out": False}


@dataclass(frozen=True)
class _Architecture:
    kind: type[VQModel] | type[AutoencoderKL]
    resolution: int
    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    middle_attends: bool
    z_channels: int
    embed_dim: int
    codes: int
    groups: int


def _architecture(config: Mapping[str, Any]) -> _Architecture:
    check(config, Section({"model": Section({"params": Section({"first_stage_config": FIRST_STAGE})})}))
    stage = config["model"]["params"]["first_stage_config"]
    target, params = stage["target"], stage["params"]
    dd, name = params["ddconfig"], target.rpartition(".")[2]
    if name not in _TARGETS:
        raise ValueError(f"first_stage_config.target {target} is not supported: allowed are {', '.join(_TARGETS)}")
    kind = _TARGETS[name]
    no_codes = set() if kind is VQModel else {"n_embed"}
    _check("first_stage_config", params, (FIRST_STAGE_PARAMS.keys | _IGNORED) - no_codes, _FIXED)
    _check("ddconfig", dd, DDCONFIG.keys, _FIXED_DD)
    if kind is VQModel and "n_embed" not in params:
        raise ValueError(f"first_stage_config.params.n_embed is missing: a {name} has so many codes")
    if (attention_type := dd.get("attn_type", "vanilla")) not in ("vanilla", "none"):
        raise ValueError(f"ddconfig.attn_type {attention_type!r} is not supported: allowed are vanilla, none")
    resolution, multipliers, at = dd["resolution"], dd["ch_mult"], set(dd["attn_resolutions"])
    result = _Architecture(
        kind=kind,
        resolution=resolution,
        in_channels=dd["in_channels"],
        out_channels=dd["out_ch"],
        widths=tuple(dd["ch"] * m for m in multipliers),
        blocks=dd["num_res_blocks"],
        attends=tuple(resolution // 2**i in at and attention_type != "none" for i in range(len(multipliers))),
        middle_attends=attention_type != "none",
        z_channels=dd["z_channels"],
        embed_dim=params["embed_dim"],
        codes=params["n_embed"] if kind is VQModel else 0,
        groups=dd.get("num_groups", 32),
    )
    if bool(dd.get("double_z", True)) != (kind is AutoencoderKL):
        raise ValueError(f"ddconfig.double_z {dd.get('double_z', True)} does not fit the target {target}")
    if any(width % result.groups for width in result.widths):
        raise ValueError(f"ddconfig: num_groups {result.groups} must divide every width: {list(result.widths)}")
    return result


def _check(section: str, params: Mapping[str, Any], known: Set[str], fixed: Mapping[str, Any]) -> None:
    if unknown := sorted(map(str, params.keys() - known - fixed.keys())):
        raise ValueError(f"{section} has parameters that are not supported: {', '.join(unknown)}")
    for name, allowed in fixed.items():
        if params.get(name, allowed) != allowed:
            raise ValueError(f"{section}.{name} {one_line(params[name])} is not supported: allowed is {allowed}")


def check_first_stage(config: Mapping[str, Any]) -> None:
    """Raise ValueError where the yaml's autoencoder cannot be built, without building it."""
    _architecture(config)
    scale_factor(config)


def build_first_stage(config: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder of a latent diffusion yaml with fresh weights.

    `ddconfig.num_groups` (not in the original, which has 32) sets the number of GroupNorm groups. diffusers' AutoencoderKL
    has as many latent channels as `z_channels`; where `embed_dim` is another number its two 1x1 convolutions are replaced,
    which its own config cannot tell.

    Raises:
        ValueError: a setting is missing or not supported.
    """
    a = _architecture(config)
    settings: dict[str, Any] = {
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "block_out_channels": a.widths,
        "layers_per_block": a.blocks,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if at else "DownEncoderBlock2D" for at in a.attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if at else "UpDecoderBlock2D" for at in reversed(a.attends)),
        "mid_block_add_attention": a.middle_attends,
        "latent_channels": a.z_channels,
        "norm_num_groups": a.groups,
        "sample_size": a.resolution,
        "act_fn": "silu",
        "scaling_factor": scale_factor(config),
    }
    if a.kind is VQModel:
        return VQModel(**settings, num_vq_embeddings=a.codes, vq_embed_dim=a.embed_dim)
    model = AutoencoderKL(**settings)
    if a.embed_dim != a.z_channels:
        model.quant_conv = nn.Conv2d(2 * a.z_channels, 2 * a.embed_dim, 1)
        model.post_quant_conv = nn.Conv2d(a.embed_dim, a.z_channels, 1)
    return model


def scale_factor(config: Mapping[str, Any]) -> float:
    """`model.params.scale_factor`, what latents are multiplied by for the UNet (1.0 without; ValueError if no such number)."""
    value = config["model"]["params"].get("scale_factor", 1.0)
    check(value, SCALE, "model.params.scale_factor")
    return float(value)


def first_stage_key_map(config: Mapping[str, Any]) -> dict[str, Layout]:
    """Every key of the original autoencoder's state dict -> where its tensor goes in `build_first_stage(config)`; one to one.

    The decoder numbers its up blocks by resolution, diffusers in the order of the forward pass. Losses are not included.

    Raises:
        ValueError: as `build_first_stage`.
    """
    a = _architecture(config)
    with torch.device("meta"):
        parameters = build_first_stage(config).state_dict().keys()
    levels, modules = len(a.widths), {}

    def add(original: str, ours: str, names: Mapping[str, str]) -> None:
        modules.update({f"{original}.{old}": f"{ours}.{new}" for old, new in names.items()})

    for i in range(levels):
        for side, theirs, mine, count in (
            ("encoder", f"down.{i}", f"down_blocks.{i}", a.blocks),
            ("decoder", f"up.{i}", f"up_blocks.{levels - 1 - i}", a.blocks + 1),
        ):
            for j in range(count):
                add(f"{side}.{theirs}.block.{j}", f"{side}.{mine}.resnets.{j}", _RESNET)
                add(f"{side}.{theirs}.attn.{j}", f"{side}.{mine}.attentions.{j}", _ATTENTION)
        modules[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        modules[f"decoder.up.{i}.upsample.conv"] = f"decoder.up_blocks.{levels - 1 - i}.upsamplers.0.conv"
    for side in ("encoder", "decoder"):
        add(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _RESNET)
        add(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _ATTENTION)
        add(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _RESNET)
        add(side, side, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"})
    modules |= {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}
    names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in modules.items() for kind in ("weight", "bias")}
    return {
        old: Pointwise(new) if "attentions" in new and new.endswith(_LINEAR) else Renamed(new)
        for old, new in names.items()
        if new in parameters
    }


def original_stage_key(key: str) -> str:
    """An autoencoder's key in the original's words, where a converter has left diffusers' names of attention layers in it."""
    match = _LEFT.search(key)
    return key if match is None else f"{key[: match.start()]}{match[1]}{_TO_ORIGINAL[match[2]]}.{match[3]}"


_LINEAR = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder between images and the latents that a UNet works on.

    Args:
        model: diffusers' autoencoder.
        scale: what latents are multiplied by for the UNet (LDM's `scale_factor`).
    """

    model: Autoencoder
    scale: float = 1.0

    @property
    def quantizes(self) -> bool:
        """Whether latents are vectors of a codebook."""
        return isinstance(self.model, VQModel)

    @property
    def factor(self) -> int:
        """The side of an image over the side of its latent."""
        return 2 ** (len(self.model.config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, as the UNet sees it."""
        convolution = self.model.post_quant_conv
        return int(self.model.config["latent_channels"] if convolution is None else convolution.in_channels)

    @torch.no_grad()
    def decode(self, latents: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (N, C, H, W) of the UNet -> images (N, channels, fH, fW), nominally in [-1, 1], not clamped.

        Args:
            force_not_quantize: do not replace latents by their nearest codes (only where there is a codebook).
        """
        z = latents / self.scale
        if isinstance(self.model, VQModel):
            return self.model.decode(z, force_not_quantize=force_not_quantize).sample
        return self.model.decode(z).sample

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, channels, fH, fW) in [-1, 1] -> latents (N, C, H, W) of the UNet.

        With a codebook: before it, as LDM diffuses them. With a KL autoencoder: the mode of the distribution, or a sample
        from it where there is a generator.
        """
        if isinstance(self.model, VQModel):
            return self.model.encode(images).latents * self.scale
        distribution = self.model.encode(images).latent_dist
        return (distribution.mode() if generator is None else distribution.sample(generator)) * self.scale
