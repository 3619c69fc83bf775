"""Whole checkpoints of CompVis' LatentDiffusion: which key belongs where, which weights are used, what may be left over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qncd.models.files.file_kinds import newer_kind, refuse_part, stated_prediction
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.original.autoencoders import (
    FirstStage,
    build_first_stage,
    check_first_stage,
    first_stage_key_map,
    original_stage_key,
    scale_factor,
)
from qncd.models.original.conditioning import (
    ClassConditioner,
    TextConditioner,
    bare_text_key,
    build_class_conditioner,
    build_text_model,
    class_key_map,
    finish_text_model,
    text_key_map,
)
from qncd.models.original.key_tables import (
    KeyTable,
    check_original,
    from_original,
    network_with_weights,
    plain_keys,
    refuse_in,
    shapes_of,
    take_part,
    to_original,
)
from qncd.models.original.ldm import LdmUNet, build_ldm_unet, ldm_betas, ldm_unet_key_map, unet_settings
from qncd.models.schema import CLASSES, COMPVIS, CONDITION, SCALE, TEXT_CONFIG, Section, check, one_line

logger = logging.getLogger(__name__)

Conditioner = ClassConditioner | TextConditioner
Network = TypeVar("Network", bound=nn.Module)

_UNET, _EMA, _FIRST_STAGE, _CONDITION = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
_EMA_UNET = f"{_EMA}diffusion_model"
_TEXT = "transformer."  # below cond_stage_model., in front of the text model's keys
_UNCONDITIONAL = "__is_unconditional__"

# Keys that may be there and are not used; anything else that is left over is an error.
_SCHEDULE_BUFFERS = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights",
))  # fmt: skip
_UNUSED = frozenset((
    "logvar",  # the weights of the loss in training
    "scale_factor",  # is read, see `_scale`
    "denoiser.sigmas",  # the noise schedule once more, of k-diffusion's wrapper
))  # fmt: skip
_UNUSED_PREFIXES = (
    "model_ema.",  # where the raw weights are used: the average, its decay and its count of updates
    "loss.",
    "first_stage_model.loss.",  # discriminator and LPIPS
    "first_stage_model.model_ema.",
    "embedding_manager.",  # of textual inversion's code, whose checkpoints hold the text model once more
)
CONDITIONERS = {"ClassEmbedder": CLASSES, "FrozenCLIPEmbedder": Section({}, {"text_config": TEXT_CONFIG})}
AVERAGED_ALONE = "%s has averaged weights alone (model_ema.*): they are used"  # of a file, for the log
_TOLD = 20  # keys of those that are not used
_NO_WEIGHTS = "position_ids"  # 0, 1, 2, ..., which transformers saved before 4.31
_UNUSED_TEXT = ("text_projection", "text_projection.weight", "logit_scale")  # what in CLIP compares texts with images


def read_state_dict(path: Path) -> dict[str, Any]:
    """The state dict of a checkpoint file, as `state_dict_of` finds it. Raises as `load_checkpoint` and `state_dict_of` do."""
    return state_dict_of(load_checkpoint(path), path)


def state_dict_of(state: Any, path: Path) -> dict[str, Any]:
    """The state dict in what a file holds, bare or below `state_dict`, without the names that wrappers put into its keys.

    A further `state_dict` inside it is the state dict where there is no tensor beside it, and an empty shell of one that some
    tools leave behind where there are.

    Raises:
        ValueError: there is no state dict.
    """
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    while isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        inner, outer = state["state_dict"], {key: value for key, value in state.items() if key != "state_dict"}
        if inner.keys() & outer.keys():
            raise ValueError(f"{path}: holds two state dicts, one inside the other, and which one is meant cannot be told")
        state = outer if any(isinstance(value, Tensor) for value in outer.values()) else inner
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a state dict or a checkpoint with one")
    try:
        return plain_keys(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def uses_ema(config: Mapping[str, Any]) -> bool:
    """Whether the original samples with the averaged weights: `use_ema` of its yaml, true by default.

    The LSUN, CelebA-HQ and FFHQ models do; cin256-v2 and Stable Diffusion v1 say false.
    """
    return bool(config["model"]["params"].get("use_ema", True))


def load_ldm_unet(config: Mapping[str, Any], ckpt: str | Path) -> LdmUNet:
    """The UNet alone of an original checkpoint, as `load_latent_model` loads it. Keys of other networks are not looked at.

    Raises:
        ValueError: weights and config do not fit.
        FileNotFoundError: there is no such file.
    """
    return _unet(read_state_dict(Path(ckpt)), config, str(ckpt))


def _network(build: Callable[[], Network], part: dict[str, Any], table: KeyTable, prefix: str, source: str) -> Network:
    try:
        check_original(part, table, shapes_of(build), f"model ({prefix.rstrip('.')})")
    except ValueError as error:
        raise ValueError(f"{source}: {prefix.rstrip('.')}: {error}") from None
    return network_with_weights(build, from_original(part, table), source)


def _unet(state: dict[str, Any], config: Mapping[str, Any], source: str) -> LdmUNet:
    table = ldm_unet_key_map(config)
    raw, prefix = take_part(state, _UNET), _UNET
    there = any(key.startswith(_EMA_UNET) for key in state)
    if there and not raw and not uses_ema(config):
        logger.info(AVERAGED_ALONE, source)
    if there and (uses_ema(config) or not raw):
        raw, prefix = take_averaged(state, table, source, "a model of this config"), _EMA
    elif uses_ema(config):
        logger.info("%s has no averaged weights (model_ema.*): the raw ones are used", source)
    return _network(lambda: build_ldm_unet(config), raw, table, prefix, source)


def averaged_key(name: str) -> str:
    """What LitEma calls the average of a UNet's weight: its original name without dots."""
    return _EMA_UNET + name.replace(".", "")


def take_averaged(state: dict[str, Any], names: Iterable[str], source: str, kind: str) -> dict[str, Any]:
    """Take a UNet's averaged weights out of the state dict, by their original names.

    Args:
        names: of the UNet's weights in the original's layout.
        source, kind: for messages: the file, and what the UNet is.

    Raises:
        ValueError: the file has averaged weights of other names.
    """
    found = {name: state.pop(key) for name in names if (key := averaged_key(name)) in state}
    refuse_in(source, f"averaged weights that {kind} lacks", [key for key in state if key.startswith(_EMA_UNET)])
    return found


def first_stage_part(state: dict[str, Any]) -> dict[str, Any]:
    """Take the autoencoder's keys out of the state dict; what its training needed stays in it."""
    found = take_part(state, _FIRST_STAGE, but=_UNUSED_PREFIXES)
    return {original_stage_key(key): value for key, value in found.items()}


def _scale(state: Mapping[str, Any], config: Mapping[str, Any], source: str) -> float:
    """With `scale_by_std` the factor was measured in training and is in the checkpoint, else it is the yaml's."""
    stored = state.get("scale_factor")
    if not config["model"]["params"].get("scale_by_std", False) or stored is None:
        return scale_factor(config)
    if not isinstance(stored, Tensor) or stored.numel() != 1 or not SCALE.allows(float(stored)):
        told = one_line(stored.tolist() if isinstance(stored, Tensor) and stored.numel() < 9 else type(stored).__name__)
        raise ValueError(f"{source}: scale_factor {told}: allowed are {SCALE.text}")
    return float(stored)


def _condition_section(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(class name, params) of cond_stage_config; ("", {}) for an unconditional model."""
    section = config["model"]["params"].get("cond_stage_config", _UNCONDITIONAL)
    check(section, CONDITION, "model.params.cond_stage_config")
    if not isinstance(section, Mapping):
        return "", {}
    return section["target"].rpartition(".")[2], section.get("params") or {}


def build_conditioner(config: Mapping[str, Any]) -> Conditioner | None:
    """The conditioning of a latent diffusion yaml with fresh weights, None for an unconditional model.

    `text_config` in the params of a FrozenCLIPEmbedder (not in the original, which has CLIP ViT-L/14) holds fields of
    transformers' CLIPTextConfig.

    Raises:
        ValueError: another kind of conditioning.
    """
    _check_conditioning(config)
    kind, params = _condition_section(config)
    if not kind:
        return None
    if kind == "ClassEmbedder":
        return build_class_conditioner(params)
    return TextConditioner(build_text_model(params.get("text_config")))


def _conditioner(state: dict[str, Any], config: Mapping[str, Any], source: str) -> Conditioner | None:
    kind, params = _condition_section(config)
    if not kind:
        return None
    part = {key: value for key, value in take_part(state, _CONDITION).items() if not key.endswith(_NO_WEIGHTS)}
    if kind == "ClassEmbedder":
        return _network(lambda: build_class_conditioner(params), part, class_key_map(), _CONDITION, source)
    fields = params.get("text_config")
    # Some Stable Diffusion files were saved by a transformers that has no text_model. in front.
    bare = {bare_text_key(key.removeprefix(_TEXT)): value for key, value in part.items()}
    part = {f"{_TEXT}text_model.{key}": value for key, value in bare.items() if key not in _UNUSED_TEXT}
    table = {f"{_TEXT}{key}": layout for key, layout in text_key_map(fields).items()}
    text_model = _network(lambda: build_text_model(fields), part, table, _CONDITION, source)
    return TextConditioner(finish_text_model(text_model)).eval()


def _check_conditioning(config: Mapping[str, Any]) -> None:
    params, (kind, fields) = config["model"]["params"], _condition_section(config)
    if params.get("parameterization", "eps") != "eps":
        raise ValueError(f"model.params.parameterization {params['parameterization']!r} is not supported: allowed is eps")
    if params.get("conditioning_key") not in (None, "crossattn"):
        raise ValueError(f"model.params.conditioning_key {params['conditioning_key']!r} is not supported: allowed is crossattn")
    if kind not in ("", *CONDITIONERS):
        allowed = ", ".join(CONDITIONERS)
        raise ValueError(f"model.params.cond_stage_config.target {kind} is not supported: allowed are {allowed}")
    if kind:
        check(fields, CONDITIONERS[kind], "model.params.cond_stage_config.params")


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise ValueError where the yaml has a setting that is none, contradicts another or is not supported; builds nothing."""
    check(config, COMPVIS)
    ldm_betas(config)
    unet_settings(config)
    if "first_stage_config" in config["model"]["params"]:
        check_first_stage(config)
    _check_conditioning(config)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError where the yaml describes a model that is not supported, before any file is read."""
    check_settings(config)
    with torch.device("meta"):
        unet, autoencoder, conditioner = build_ldm_unet(config), build_first_stage(config), build_conditioner(config)
    channels = FirstStage(autoencoder).latent_channels
    if (conditioner is None) != (unet.config.get("cross_attention_dim") is None):
        raise ValueError("cond_stage_config and the UNet's context_dim need one another")
    if unet.config["in_channels"] != channels or unet.config["out_channels"] != channels:
        raise ValueError(f"the UNet has {unet.config['in_channels']} channels, the first stage's latents have {channels}")
    if not unet.config["sample_size"]:
        raise ValueError("the config has no model.params.image_size, the side of the latent")


def _check_schedule(state: Mapping[str, Any], betas: np.ndarray, source: str) -> None:
    """Raise ValueError where a file's noise schedule is not the config's, by the precision of the dtype it is stored in."""
    for name, expected in (("betas", betas), ("alphas_cumprod", np.cumprod(1 - betas))):
        stored = state.get(name)
        if not isinstance(stored, Tensor):
            continue
        numbers = torch.finfo(stored.dtype) if stored.is_floating_point() else torch.finfo(torch.float64)
        relative, absolute = max(1e-4, numbers.eps), numbers.tiny * numbers.eps  # the latter of subnormal numbers
        values = stored.double().numpy().ravel()
        if len(values) != len(expected) or not np.allclose(values, expected, rtol=relative, atol=absolute):
            raise ValueError(f"{source}: its noise schedule ({name}) is not the config's")


def _is_unused_text(key: str) -> bool:
    return bare_text_key(key.removeprefix(_CONDITION).removeprefix(_TEXT)) in _UNUSED_TEXT


def tell_unused(source: str, keys: Sequence[str]) -> None:
    """One line with what a file has beside the networks and the noise schedule; many below one name are told by it."""
    prefixes = {key: next((prefix for prefix in _UNUSED_PREFIXES if key.startswith(prefix)), None) for key in keys}
    told = sorted({f"{prefix}*" if prefix else key for key, prefix in prefixes.items() if key not in _SCHEDULE_BUFFERS})
    if told:
        more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        logger.info("%s: not used: %s%s", source, ", ".join(told[:_TOLD]), more)


def networks_of(path: Path, config: Mapping[str, Any]) -> tuple[LdmUNet, FirstStage, Conditioner | None]:
    """The networks of an original checkpoint, all of whose keys are accounted for.

    Raises:
        ValueError: a key is missing, left over or of another shape, a value is not finite, or the file's noise schedule is
            not the config's.
        FileNotFoundError: there is no such file.
    """
    check_config(config)
    source, state = str(path), read_state_dict(path)
    refuse_part(path, state)
    if (kind := newer_kind(state)) is not None:
        raise ValueError(f"{source}: {kind}, which no yaml describes: leave out --config, or name a diffusers folder of it there")
    settings, where = stated_prediction(path, state)
    if settings.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"{source}: predicts velocities ({where}), which no yaml describes: name a diffusers folder with --config"
        )
    _check_schedule(state, ldm_betas(config), source)
    unet = _unet(state, config, source)
    scale, table = _scale(state, config, source), first_stage_key_map(config)
    part = first_stage_part(state)
    autoencoder = _network(lambda: build_first_stage(config), part, table, _FIRST_STAGE, source)
    autoencoder.register_to_config(scaling_factor=scale)
    unused = [key for key in state if key.startswith(_CONDITION) and _is_unused_text(key)]
    conditioner = _conditioner(state, config, source)
    known = _SCHEDULE_BUFFERS | _UNUSED
    extra = [key for key in state if key not in known and not key.startswith(_UNUSED_PREFIXES)]
    refuse_in(source, "keys belong to no network of this config", extra)
    tell_unused(source, [*state, *unused])
    return unet, FirstStage(autoencoder, scale), conditioner


def original_state_dict(
    config: Mapping[str, Any], unet: LdmUNet, first_stage: FirstStage, conditioner: Conditioner | None
) -> dict[str, Tensor]:
    """The networks' weights as one state dict in the original's keys and layouts: the inverse of `networks_of`.

    Raises:
        ValueError: a network is not the config's.
    """
    parts: list[tuple[str, nn.Module, KeyTable]] = [
        (_UNET, unet, ldm_unet_key_map(config)),
        (_FIRST_STAGE, first_stage.model, first_stage_key_map(config)),
    ]
    if isinstance(conditioner, ClassConditioner):
        parts.append((_CONDITION, conditioner, class_key_map()))
    elif conditioner is not None:
        fields = _condition_section(config)[1].get("text_config")
        parts.append((f"{_CONDITION}{_TEXT}", conditioner.text_model, text_key_map(fields)))
    return {
        prefix + key: value
        for prefix, network, table in parts
        for key, value in to_original(network.state_dict(), table, f"model ({prefix.rstrip('.')})").items()
    }
