"""Whole models in one file that CompVis' samplers do not know: Stable Diffusion 2 and XL, inpainting, velocities.

What each key means is diffusers' conversion of single files. The files are read by this package's reader, which runs nothing
that is in a pickle, and every key of a network must find its place. How the networks are made, the tokenizers and the
scheduler are in a folder of diffusers for such a model, which the file does not have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.loaders import single_file_utils as conversion
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from qncd.io.files import first_line
from qncd.models.configs import CONFIGS, INDEX, config_beside
from qncd.models.files.diffusers_folders import network_builder, read_settings
from qncd.models.files.file_kinds import PREDICTION_KEYS, is_whole, newer_kind, refuse_part, stated_prediction
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.original.compvis import (
    AVERAGED_ALONE,
    averaged_key,
    first_stage_part,
    state_dict_of,
    take_averaged,
    tell_unused,
)
from qncd.models.original.conditioning import text_model_with_weights
from qncd.models.original.key_tables import network_with_weights, refuse_in, take_part
from qncd.models.original.unet_names import stable_diffusion_key_map
from qncd.models.schema import TEXT_CONFIG

logger = logging.getLogger(__name__)

_UNET = "model.diffusion_model."
_CONDITIONS = ("cond_stage_model.", "conditioner.")
# Where the text models of a pipeline are: in the layout of transformers, and in that of open_clip (ending in "model.").
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
_NETWORKS = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
_PREFIXES = {"unet": _UNET, "vae": "first_stage_model."}
# The keys of open_clip's text model outside its transformer, by diffusers' names.
_OPEN_CLIP: Mapping[str, str] = conversion.DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]  # type: ignore[index]
_TEXT_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_UNUSED_TEXT = ("logit_scale", "attn_mask", "text_projection", "text_projection.weight", "position_ids")
# What of a pipeline on the hub tells how its parts are made, as diffusers' `from_single_file` downloads it.
_CONFIG_FILES = ["*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model"]
_NO_CONFIG = (StrictDataclassError, OSError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError)
_SD1 = {  # shapes that tell Stable Diffusion 1 at full size from other text models of CompVis' code
    f"{_UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint file with a whole model, its tensors by their original names."""

    path: Path
    state: dict[str, Any]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor; of the averaged one where the file has no other, and empty where it has none of this name."""
        value = self.state.get(key, self.state.get(averaged_key(key.removeprefix(_UNET))))
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    @property
    def channels(self) -> tuple[int, int]:
        """That the UNet takes and gives, (0, 0) where the file does not tell."""
        taken, given = self.shape(f"{_UNET}input_blocks.0.0.weight"), self.shape(f"{_UNET}out.2.weight")
        return (taken[1], given[0]) if len(taken) == len(given) == 4 else (0, 0)

    @property
    def is_original(self) -> bool:
        """Whether CompVis' samplers do all that the model needs: it predicts noise from latents, and a text by OpenAI's CLIP."""
        taken, given = self.channels
        noise = self.prediction()[0].get("prediction_type", "epsilon") == "epsilon"
        return newer_kind(self.state) is None and taken == given and noise

    @property
    def kind(self) -> str:
        """What the model is, in words."""
        name = newer_kind(self.state) or "Stable Diffusion 1"
        taken, given = self.channels
        return name if taken == given else f"{name} with {taken} input channels"

    def prediction(self) -> tuple[dict[str, Any], str]:
        """What it says of its predictions, as `stated_prediction` finds it."""
        return stated_prediction(self.path, self.state)


def find_single_file(path: Path) -> SingleFile | None:
    """The model in a file, None where it is none in the layout of CompVis' and Stability's code, such as one of DDIM.

    Raises:
        ValueError: the file is damaged, or a part of a model (a LoRA, an autoencoder, ...), which is named.
        FileNotFoundError: there is no such file.
    """
    content = load_checkpoint(path)
    if not isinstance(content, Mapping):
        return None
    state = state_dict_of(content, path) if content else {}
    refuse_part(path, state)
    if not is_whole(state):
        return None
    return SingleFile(path, state)


def is_pipeline_file(path: Path) -> bool:
    """Whether a file has a model that only a pipeline of diffusers samples. Raises as `find_single_file`."""
    file = find_single_file(path)
    return file is not None and not file.is_original


def yaml_of(path: Path) -> Path:
    """The yaml of an original checkpoint: beside it; Stable Diffusion 1 at full size needs none.

    Raises:
        ValueError: it is not clear which.
    """
    try:
        return config_beside(path)
    except ValueError:
        file = find_single_file(path)
        if file is None or any(file.shape(key) != shape for key, shape in _SD1.items()):
            raise
        found = CONFIGS / "sd-v1-inference.yaml"
        logger.info("%s: read as Stable Diffusion v1 (%s)", path, found.name)
        return found


def configs_folder(file: SingleFile, config: str | Path | None) -> Path:
    """The folder of diffusers that says how the parts of the model are made.

    Args:
        config: its path or hub id; by default the hub id that diffusers has for such keys.

    Raises:
        FileNotFoundError: the hub does not have or give it.
        ValueError: it is not the folder of a pipeline.
    """
    if config is None and not any(key.startswith(_UNET) for key in file.state):  # diffusers would take them all for v1
        raise ValueError(
            f"{file.path}: {file.kind}, with averaged weights alone (model_ema.*), of which no hub id is known: "
            "name a diffusers folder of such a model with --config (the weights in it are not needed)"
        )
    source = str(config or conversion.fetch_diffusers_config(file.state)["pretrained_model_name_or_path"])
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(file, source)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{source}: not the folder of a pipeline (no {INDEX} in it), and {file.path} needs that of {file.kind}")
    return folder


def _download(file: SingleFile, source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_CONFIG_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{file.path}: {file.kind}, and the file does not say how its parts are made: {source} is not to be had from the hub "
            f"({first_line(error)}): name a diffusers folder of such a model with --config (the weights in it are not needed)"
        ) from None


def parts_of(file: SingleFile, folder: Path, index: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The networks that the file has, by their names in the pipeline: float32, eval mode, on the CPU, no gradients.

    Args:
        folder, index: of a pipeline that has such networks, and its model_index.json.

    Raises:
        ValueError: a network is another one than the folder's, or a key of it has no place; a network is neither in the file
            nor in the folder.
    """
    state, source = dict(file.state), str(file.path)
    wanted = {name: kind for name in ("unet", "vae", *_TEXTS) if (kind := _class_of(index, name)) is not None}
    if "unet" not in wanted:
        raise ValueError(f"{folder}: a pipeline without a UNet, and {source} needs that of {file.kind}")
    found = {"unet": take_part(state, _UNET) or _averaged(state, folder / "unet", source), "vae": first_stage_part(state)}
    parts: dict[str, nn.Module] = {}
    for name, convert in (("unet", conversion.convert_ldm_unet_checkpoint), ("vae", conversion.convert_ldm_vae_checkpoint)):
        if name in wanted and found[name]:
            parts[name] = _converted(found[name], convert, folder / name, source)
    for name, prefixes in _TEXTS.items():
        prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)), None)
        if name in wanted and prefix is not None:
            parts[name] = _text_model(take_part(state, prefix), prefix, wanted[name], folder / name, source)
    left = [key for key in state if key.startswith(_CONDITIONS) and not key.endswith(_UNUSED_TEXT)]
    refuse_in(source, f"keys belong to no network of {folder}", left)
    tell_unused(source, [key for key in state if key not in PREDICTION_KEYS])
    for name in sorted(wanted.keys() - parts.keys()):
        if not any((folder / name).glob("*.safetensors")) and not any((folder / name).glob("*.bin")):
            raise ValueError(f"{source}: has no {name}, and there are no weights in {folder / name} either")
        logger.info("%s: has no %s, taken is that of %s", source, name, folder)
    return parts


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a pipeline's component, None where it has none."""
    value = index.get(name)
    return str(value[1]) if isinstance(value, list) and len(value) == 2 and value[1] is not None else None


def _averaged(state: dict[str, Any], root: Path, source: str) -> dict[str, Any]:
    """Take the averaged UNet of a file that has no other, by the original names of the UNet that the folder `root` describes."""
    with torch.device("meta"):
        network = network_builder(root, _NETWORKS[root.name])()
    logger.info(AVERAGED_ALONE, source)
    return take_averaged(state, stable_diffusion_key_map(network), source, f"the network of {root}")


def _converted(part: dict[str, Any], convert: Callable[..., dict[str, Tensor]], root: Path, source: str) -> nn.Module:
    """A UNet or an autoencoder as the folder `root` describes it, with the weights of a part of the file."""
    where = f"{source}: {root.name}"
    build = network_builder(root, _NETWORKS[root.name])
    with torch.device("meta"):
        config = build().config
    refuse_in(where, "keys that hold no tensor", [key for key, value in part.items() if not isinstance(value, Tensor)])
    weights = _renamed(where, root, lambda: convert({_PREFIXES[root.name] + key: value for key, value in part.items()}, config))
    # Diffusers' conversion drops what it does not know; all that it knows it passes on as it is, or as a view.
    used = {value.data_ptr() for value in weights.values()}
    refuse_in(
        where, f"keys that the network of {root} lacks", [key for key, value in part.items() if value.data_ptr() not in used]
    )
    return network_with_weights(build, weights.items(), f"{where}: not that of {root}")


def _text_model(part: dict[str, Any], prefix: str, kind: str, root: Path, source: str) -> nn.Module:
    """A text model as the folder `root` describes it, with the weights of a part of the file."""
    where = f"{source}: {root.name}"
    if kind not in _TEXT_MODELS:
        raise ValueError(f"{root}: the model is a {kind}, expected a {' or '.join(_TEXT_MODELS)}")
    read_settings(root / "config.json", TEXT_CONFIG)
    try:
        text_class = getattr(transformers, kind)
        config = text_class.config_class.from_pretrained(root, local_files_only=True)
        with torch.device("meta"):
            empty = text_class(config)
    except _NO_CONFIG as error:
        raise ValueError(f"{root}: no {kind} can be built from it: {first_line(error)}") from None
    state = part
    if prefix.endswith(".model."):  # open_clip's: queries, keys and values in one matrix
        outside = [key for key in part if not key.startswith("transformer.") and key not in _OPEN_CLIP.values()]
        refuse_in(where, "keys that no text model has", [key for key in outside if not key.endswith(_UNUSED_TEXT)])
        whole = {prefix + key: value for key, value in part.items()}
        state = _renamed(where, root, lambda: conversion.convert_open_clip_checkpoint(empty, whole, prefix))
    known = empty.state_dict().keys()
    state = {key: value for key, value in state.items() if key in known or not key.endswith(_UNUSED_TEXT)}
    return text_model_with_weights(lambda: text_class(config), state, f"{where}: not that of {root}")


def _renamed(where: str, root: Path, convert: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a conversion of diffusers makes of a network's tensors. Raises ValueError where they are not those of `root`."""
    try:
        return convert()
    except (KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: is another network than that of {root} ({first_line(error)})") from None
