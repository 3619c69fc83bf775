"""Pipelines of diffusers with something wrong in their folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bad_inputs.edits import INDEX, Edit

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def _index(edit: Edit) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")

    return change


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


def _weights(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return change


def _parts(folder: Path) -> None:
    """Weights in two parts, of which there is one."""
    from safetensors.torch import load_file

    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    keys = sorted(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "unet" / names[0])
    places = {key: names[place % 2] for place, key in enumerate(keys)}
    (folder / "unet" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}), encoding="utf-8")


# What is done to a whole DDIMPipeline's folder.
BROKEN: Mapping[str, Callable[[Path], None]] = {
    "no unet": _without("unet"),
    "no scheduler": _without("scheduler"),
    "unet not named": _index(lambda c: {name: value for name, value in c.items() if name != "unet"}),
    "unknown pipeline": _index(lambda c: c | {"_class_name": "NoSuchPipeline"}),
    "unknown scheduler": _index(lambda c: c | {"scheduler": ["diffusers", "NoSuchScheduler"]}),
    "unet as scheduler": _index(lambda c: c | {"scheduler": c["unet"]}),
    "absent part": _parts,
    "key missing": _weights(lambda state: {key: value for key, value in state.items() if key != "conv_in.weight"}),
    "other shape": _weights(lambda state: state | {"conv_in.weight": state["conv_in.weight"][:, :, :1].contiguous()}),
    "NaN": _weights(lambda state: state | {"conv_in.weight": state["conv_in.weight"] * float("nan")}),
}


def broken_pipelines(folder: Path, good: Path) -> None:
    """FOLDER/KIND for each of BROKEN, spaces made lines."""
    for kind, change in BROKEN.items():
        copy = folder / kind.replace(" ", "_")
        shutil.copytree(good, copy)
        change(copy)


def make_text_pipeline(good: Path) -> None:
    """A whole text-to-image pipeline, GOOD/text, and a LoRA for another one, GOOD/foreign_lora.safetensors."""
    import torch
    from safetensors.torch import save_file

    from qncd.models.pipelines import load_pipeline

    load_pipeline("scenes.yaml").save_pretrained(good / "text")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{name}.lora_A.weight": torch.zeros(2, 7), f"{name}.lora_B.weight": torch.zeros(7, 2)}
    save_file(state, good / "foreign_lora.safetensors")
