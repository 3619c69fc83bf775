"""What a checkpoint file holds, told by the names of its tensors: a whole model, or a part of one that people share alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd.models.files.safetensors_files import read_metadata

_WHOLE = re.compile(r"model\.diffusion_model\.input_blocks\.|model_ema\.diffusion_modelinput_blocks")
_ALL_PARTS = "name a checkpoint or a folder with all parts of the model"
_READ = "read are single files of Stable Diffusion 1, 2 and XL"
PREDICTION_KEYS = ("v_pred", "ztsnr")
_PREDICTION = "modelspec.prediction_type"
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# Text models that CompVis' code does not have, and the models that have them.
_NEWER = (
    ("Stable Diffusion XL", "conditioner.embedders.1."),
    ("the refiner of Stable Diffusion XL", "conditioner."),
    ("Stable Diffusion 2", "cond_stage_model.model."),
)


@dataclass(frozen=True)
class _Part:
    """Something that is no whole model: what it is called, what to do with it, and how a key of its tensors begins."""

    name: str
    advice: str
    pattern: str


_CONTROLNET = _Part(
    "a ControlNet", "name the folder of a pipeline that has it", r"control_model\.|controlnet_|input_hint_block\."
)
_PARTS = (  # the first that fits
    _Part(
        "a LoRA", "give it to --lora, and a model to --ckpt",
        r"lora_(unet|te\d?|transformer|prior)_|.*\.(lora_[AB]|lora_up|lora_down|lora\.up|lora\.down|hada_w\d|lokr_w\d)\b",
    ),
    _CONTROLNET,
    _Part("a textual inversion", "give it to --embedding, and a model to --ckpt", r"string_to_|emb_params$|clip_[lg]$|<.*>$"),
    _Part("an IP-Adapter", "it is not read", r"image_proj\.|ip_adapter\."),
    _Part("the transformer of Stable Diffusion 3", _READ, r"(model\.diffusion_model\.)?joint_blocks\."),
    _Part("the transformer of FLUX or of its kind", _READ, r"(model\.diffusion_model\.)?(double|single)_(stream_)?blocks\."),
    _Part("the network of another model", _READ, r"model\.diffusion_model\.|net\.(blocks|x_embedder)\.|transformer_blocks\."),
    _Part(
        "an autoencoder alone", _ALL_PARTS,
        r"((first_stage_model|vae)\.)?((encoder|decoder)\.(conv_in|down|mid|up)|(post_)?quant_conv\.)",
    ),
    _Part("a UNet alone", "name its pipeline's folder, or its yaml with --config", r"(down_blocks|input_blocks)\.\d+\."),
    _Part(
        "a text encoder alone", _ALL_PARTS,
        r"((cond_stage_model|transformer|text_model)\.)*(encoder\.layers|transformer\.resblocks)\.",
    ),
)  # fmt: skip


def is_whole(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a latent diffusion model in the layout of CompVis' and Stability's code."""
    return any(_WHOLE.match(key) for key in keys)


def newer_kind(keys: Iterable[str]) -> str | None:
    """The name of a whole model with other text models than CompVis' code has, None for those of that code."""
    names = list(keys)
    return next((kind for kind, prefix in _NEWER if any(key.startswith(prefix) for key in names)), None)


def stated_prediction(path: Path, keys: Iterable[str]) -> tuple[dict[str, Any], str]:
    """(settings of a scheduler that a file asks for, where it says so); ({}, "") where it says nothing.

    The keys v_pred and ztsnr, which trainers of SDXL put beside the weights, come before the metadata of a .safetensors file,
    which merging tools copy from one of the models.

    Raises:
        ValueError: the metadata name another prediction than noise and velocity.
    """
    settings: dict[str, Any] = {}
    names = set(keys)
    said = read_metadata(path).get(_PREDICTION) if path.suffix == ".safetensors" else None
    if said is not None:
        if (known := _PREDICTIONS.get(said.strip().lower().replace("-", "_"))) is None:
            raise ValueError(f"{path}: {_PREDICTION} {said[:80]!r}: allowed are epsilon, v")
        settings["prediction_type"] = known
    where = [_PREDICTION] if settings else []
    if "v_pred" in names:
        settings["prediction_type"], where = "v_prediction", ["v_pred"]
    if "ztsnr" in names:
        settings["rescale_betas_zero_snr"] = True
        where.append("ztsnr")
    return settings, ", ".join(where)


def refuse_part(path: Path, keys: Iterable[str]) -> None:
    """Raise ValueError, in one line that says what it is, where a file has a part of a model that is known by its keys.

    Files of which nothing is known pass: those of DDIM, which only their yaml describes.
    """
    names = list(keys)
    for part in (_CONTROLNET,) if is_whole(names) else _PARTS:
        pattern = re.compile(part.pattern)
        if (found := next((key for key in names if pattern.match(key)), None)) is not None:
            raise ValueError(f"{path}: is {part.name} ({found[:80]}), not a whole model: {part.advice}")
