"""Load a noise prediction network from an original checkpoint, a diffusers folder, the hub, or the models in the box."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.models.unets.unet_2d import UNet2DModel

from qncd.models.ddim import build_ddim_unet, convert_ddim_state_dict, ddim_unet_config, ddim_weights
from qncd.models.registry import fetch, load_registry
from qncd.models.unpickle import load_checkpoint

ASSETS = Path(__file__).resolve().parents[1] / "assets"
_WEIGHT_FILES = (  # in the order of preference
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin",
)  # fmt: skip
# Attention layers under the names that diffusers gave them before 0.17, as the google/ddpm-* files still have them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHOWN = 3  # keys named in an error


def load_config(path: str | Path) -> dict[str, Any]:
    """A model's yaml as a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not yaml, or has no `model` section.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}: not a yaml file{where}: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, expected sections such as model: and data:")
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path}: no model section (found: {', '.join(map(str, config)) or 'nothing'})")
    return config


def load_ddim(config: Mapping[str, Any], ckpt: str | Path | None = None, use_pretrained: bool = False) -> UNet2DModel:
    """The UNet of a DDIM config with its weights: eval mode, float32, on the CPU, no gradients.

    Args:
        config: the yaml of ermongroup/ddim as a mapping.
        ckpt: an original checkpoint, a .safetensors file (original or diffusers names), a diffusers folder (a UNet or a
            pipeline with `unet/`), or a hub id such as google/ddpm-cifar10-32, asked for only if no such path exists.
        use_pretrained: without `ckpt`, the published weights of the config's data set.
            Without both, `config["model"]["weights"]` names a model in the box.

    Raises:
        ValueError: weights and config do not fit, the file is damaged, or a weight is NaN or infinite.
        FileNotFoundError: there are no such weights.
    """
    settings = ddim_unet_config(config)
    source = str(ckpt) if ckpt is not None else str(_default_weights(config, use_pretrained))
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(source) and path.suffix not in (".ckpt", ".pth", ".pt", ".safetensors"):
        path = _download_hub_folder(source)
    if path.is_dir():
        unet = load_unet_folder(path)
        for key in ("in_channels", "out_channels", "sample_size"):
            if (found := unet.config[key]) != settings[key]:
                raise ValueError(f"{source}: {key} is {found}, the config says {settings[key]}")
        return unet
    checkpoint = load_checkpoint(path)
    try:
        state: Mapping[str, Any] = ddim_weights(checkpoint, config)
        if not any(key.startswith(("down_blocks.", "up_blocks.")) for key in state):
            state = convert_ddim_state_dict(checkpoint, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return _with_weights(build_ddim_unet(config), state, source)


def load_unet_folder(folder: str | Path) -> UNet2DModel:
    """A UNet2DModel saved by diffusers, weights of any float dtype cast to float32; eval mode, no gradients.

    Args:
        folder: with config.json and the weights, or a pipeline that has them in `unet/`.

    Raises:
        ValueError: the folder holds no UNet2DModel, or its weights do not fit its config or are not finite.
    """
    folder = Path(folder)
    root = folder / "unet" if (folder / "unet").is_dir() else folder
    config_file = root / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder}: not a diffusers folder (no config.json in it or in its unet/)")
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file}: not JSON: {error}") from None
    kind = settings.get("_class_name") if isinstance(settings, dict) else None
    if kind != "UNet2DModel":
        raise ValueError(f"{config_file}: the model is a {kind}, expected a UNet2DModel")
    weights = next((root / name for name in _WEIGHT_FILES if (root / name).is_file()), None)
    if weights is None:
        raise ValueError(f"{root}: no weights (looked for {', '.join(_WEIGHT_FILES)})")
    try:
        unet = UNet2DModel.from_config(settings)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{config_file}: no UNet2DModel can be built from it: {str(error).splitlines()[0]}") from None
    state = load_checkpoint(weights)
    if not isinstance(state, Mapping):
        raise ValueError(f"{weights}: holds a {type(state).__name__}, expected a state dict")
    return _with_weights(unet, {_current_name(key): value for key, value in state.items()}, str(weights))


def state_dict_hash(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of a model's state: name, dtype, shape and bytes of each tensor, in the order of the names.

    One tensor at a time is brought to the CPU, so no second copy of the model is needed.
    """
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():  # flat first: a tensor without dimensions cannot be viewed as bytes
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _default_weights(config: Mapping[str, Any], use_pretrained: bool) -> Path:
    data, name = config.get("data") or {}, config["model"].get("weights")
    if use_pretrained:
        published = str(data.get("dataset", "")).lower()
        if published == "lsun":  # one data set with many categories; the yaml of churches says church_outdoor
            published += "_" + str(data.get("category", "")).removesuffix("_outdoor")
        if f"ema_diffusion_{published}" in load_registry():
            return fetch(f"ema_diffusion_{published}")
        if name is None:
            known = ", ".join(sorted(load_registry()))
            raise ValueError(f"no published weights for the data set {published!r} (there are {known}): give --ckpt PATH")
    if name is None:
        raise ValueError("no weights: give --ckpt PATH or --use_pretrained, or name a model in the box as model.weights")
    folder = ASSETS / str(name)
    if not (folder / "config.json").is_file():
        boxed = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
        raise ValueError(f"model.weights {name!r} is no model in the box: allowed are {', '.join(boxed) or '(none)'}")
    return folder


def _download_hub_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    def files(*names: str) -> list[str]:
        return [prefix + name for prefix in ("", "unet/") for name in names]

    try:
        folder = Path(snapshot_download(repository, allow_patterns=files("config.json", *_WEIGHT_FILES[:2])))
        if not any((folder / name).is_file() for name in files(*_WEIGHT_FILES[:2])):
            folder = Path(snapshot_download(repository, allow_patterns=files("config.json", *_WEIGHT_FILES[2:])))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{repository}: no such path here, and not to be had from the hub ({reason}): "
            "download its folder and name that with --ckpt PATH"
        ) from None
    return folder


def _current_name(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in _OLD_ATTENTION:
        parts[-2] = _OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def _with_weights(unet: UNet2DModel, state: Mapping[str, Any], source: str) -> UNet2DModel:
    """Copy the weights into the network, after saying by name what does not fit."""
    own = unet.state_dict()
    wrong = [key for key in state.keys() & own.keys() if getattr(state[key], "shape", None) != own[key].shape]
    for what, keys in (
        ("keys are missing", own.keys() - state.keys()),
        ("keys belong to no layer", state.keys() - own.keys()),
        ("tensors have another shape than their layer", wrong),
    ):
        if found := sorted(keys):
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(f"{source}: {len(found)} {what}: {', '.join(found[:_SHOWN])}{more}")
    with torch.no_grad():
        for key, target in own.items():
            if not state[key].is_floating_point():
                raise ValueError(f"{source}: {key} holds {state[key].dtype}, expected floating point numbers")
            target.copy_(state[key])
            if not torch.isfinite(target).all():
                raise ValueError(f"{source}: {key} holds NaN or infinite values")
    return unet.float().eval().requires_grad_(False)
