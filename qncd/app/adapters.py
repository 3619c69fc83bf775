"""Adapters of a pipeline on the command line: LoRA, textual inversion, and IP-Adapter with the images that guide it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from qncd.app.pictures import pictures
from qncd.engines.registry import TORCH
from qncd.io.files import first_line
from qncd.quant.adapters import adapters_of
from qncd.sampling.pipeline import denoiser_of
from qncd.saving import state_of

ADAPTER_SCALE = "="  # between an adapter's file and its weight
# What taking in an adapter's file ends in where it is none, or one of another model.
FAULTS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, ImportError)


def take_in(args: argparse.Namespace, pipe: Any) -> None:
    """Put --lora, --embedding and --ip_adapter into a pipeline.

    A LoRA is merged into the weights before they are quantized; beside weights that are quantized already it stays apart.

    Raises:
        FileNotFoundError, ValueError: a file is not there, is none, or is one of another model.
    """
    for flag, method in (
        ("lora", "load_lora_weights"), ("embedding", "load_textual_inversion"), ("ip_adapter", "load_ip_adapter")
    ):  # fmt: skip
        if (given := getattr(args, flag)) and not hasattr(pipe, method):
            raise ValueError(f"--{flag} {given[0] if isinstance(given, list) else given}: {type(pipe).__name__} takes none")
    _take_in_loras(args, pipe)
    for path in args.embedding:
        _check_file("embedding", path)
        try:
            pipe.load_textual_inversion(path)
        except FAULTS as error:
            raise ValueError(f"--embedding {path}: is no textual inversion for this model ({first_line(error)})") from None
    _take_in_ip_adapter(args, pipe)


def _take_in_loras(args: argparse.Namespace, pipe: Any) -> None:
    quantized = state_of(pipe) is not None
    if args.lora and quantized and args.backend != TORCH:
        raise ValueError(f"--lora {args.lora[0]}: beside quantized weights, a LoRA runs with --backend {TORCH} alone")
    weights: dict[str, float] = {}
    for index, text in enumerate(args.lora):
        path, scale = _file_and_weight("lora", text)
        name = f"lora_{index}"
        try:
            pipe.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name, adapter_name=name)
            if name not in {adapter for found in pipe.get_list_adapters().values() for adapter in found}:
                raise ValueError("nothing in it is for a part of this pipeline")
            if not quantized:
                pipe.fuse_lora(lora_scale=scale, adapter_names=[name])
                pipe.unload_lora_weights()
        except FAULTS as error:
            raise ValueError(f"--lora {path}: is not a LoRA of this model ({first_line(error)})") from None
        weights[name] = scale
    if weights and quantized:
        pipe.set_adapters(list(weights), list(weights.values()))


def _take_in_ip_adapter(args: argparse.Namespace, pipe: Any) -> None:
    text = args.ip_adapter
    if text is None:
        if args.ip_adapter_image:
            raise ValueError(f"--ip_adapter_image {args.ip_adapter_image}: needs --ip_adapter")
        return
    path, scale = _file_and_weight("ip_adapter", text)
    if args.ip_adapter_image is None:
        raise ValueError(f"--ip_adapter {path}: needs --ip_adapter_image")
    if state_of(pipe) is not None:
        raise ValueError(
            f"--ip_adapter {path}: changes attention, which is quantized already in {args.ckpt}: name the original folder"
        )
    try:
        pipe.load_ip_adapter(str(Path(path).parent), subfolder="", weight_name=Path(path).name, local_files_only=True)
    except FAULTS as error:
        raise ValueError(f"--ip_adapter {path}: is not an IP-Adapter of this model ({first_line(error)})") from None
    if adapters_of(denoiser_of(pipe)[1]) or pipe.image_encoder is None:
        raise ValueError(f"--ip_adapter {path}: takes embeddings of faces, which no flag gives")
    pipe.set_ip_adapter_scale(scale)


def guiding_images(args: argparse.Namespace) -> dict[str, Any]:
    """What --ip_adapter_image adds to every call: all images of a folder guide together."""
    images = pictures(args.ip_adapter_image, "ip_adapter_image")
    return {"ip_adapter_image": [images]} if images else {}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What run.json says of adapters beside the weights, which their files change."""
    loras = {"lora_weights": [_file_and_weight("lora", text)[1] for text in args.lora]} if args.lora else {}
    return {**loras, **({"ip_adapter_scale": _file_and_weight("ip_adapter", args.ip_adapter)[1]} if args.ip_adapter else {})}


def _file_and_weight(flag: str, text: str) -> tuple[str, float]:
    """FILE or FILE=WEIGHT; the weight is 1 where none is given, as of a file whose own name holds the sign."""
    path, _, weight = (text, "", "") if Path(text).is_file() else text.rpartition(ADAPTER_SCALE)
    _check_file(flag, path or text)
    try:
        scale = float(weight or 1)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"--{flag} {text}: expected FILE or FILE=WEIGHT, the weight a finite number")
    return path, scale


def _check_file(flag: str, path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--{flag} {path}: no such file")
