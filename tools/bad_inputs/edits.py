"""What is wrong inside files that are whole: JSON with another value, arrays of another kind, weights in other places."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Edit = Callable[[Any], Any]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
NOT_A_NUMBER = float("nan")  # which Python writes, and JSON does not know


def _without(key: str) -> Edit:
    return lambda content: {name: value for name, value in content.items() if name != key}


def _annotations(**changes: Any) -> Edit:
    return lambda content: content | {"annotations": [content["annotations"][0] | changes]}


# By the folder among the materials, and by what is wrong.
JSON_EDITS: Mapping[str, Mapping[str, Edit]] = {
    "unet_config.json": {
        "NaN": lambda c: c | {"norm_eps": NOT_A_NUMBER}, "other class": lambda c: c | {"_class_name": "Transformer2DModel"},
        "negative": lambda c: c | {"block_out_channels": [-8, 8]}, "endless": lambda c: c | {"layers_per_block": 1_000_000},
        "other width": lambda c: c | {"block_out_channels": [16, 16]}, "text": lambda c: c | {"in_channels": "1"},
    },
    "scheduler_scheduler_config.json": {
        "NaN": lambda c: c | {"beta_start": NOT_A_NUMBER}, "text": lambda c: c | {"beta_end": "small"},
        "no steps": lambda c: c | {"num_train_timesteps": 0}, "velocity": lambda c: c | {"prediction_type": "v_prediction"},
        "other schedule": lambda c: c | {"beta_end": 0.5}, "other class": lambda c: c | {"_class_name": "EulerDiscreteScheduler"},
    },
    "model_index.json": {
        "NaN": lambda c: c | {"x": NOT_A_NUMBER}, "number": lambda c: c | {"_class_name": 3},
    },
    "run.json": {
        "NaN": lambda c: c | {"figures": {"seconds": NOT_A_NUMBER}}, "settings list": lambda c: c | {"settings": []},
        "no settings": _without("settings"), "other settings": lambda c: c | {"settings": {"seed": 0}},
    },
    "captions.json": {
        "NaN": _annotations(image_id=NOT_A_NUMBER), "images number": lambda c: c | {"images": 5},
        "no annotations": _without("annotations"), "caption number": _annotations(caption=5),
        "file outside": lambda c: c | {"images": [{"id": 1, "file_name": "../1.jpg"}]},
    },
}  # fmt: skip

# Of numpy -> members of an .npz file.
ARRAYS: Mapping[str, Mapping[str, Edit]] = {
    "images.npz": {
        "no member": lambda np: {"other": np.zeros((2, 8, 8, 3), np.uint8)},
        "no images": lambda np: {"arr_0": np.zeros((0, 8, 8, 3), np.uint8)},
        "channels": lambda np: {"arr_0": np.zeros((2, 8, 8, 7), np.uint8)},
        "objects": lambda np: {"arr_0": np.array([{}, []], object)}, "flat": lambda np: {"arr_0": np.zeros((2, 8), np.uint8)},
        "complex": lambda np: {"arr_0": np.zeros((2, 8, 8, 3), complex)},
    },
    "statistics.npz": {
        "NaN": lambda np: {"mu": np.full(2048, np.nan), "sigma": np.eye(2048, dtype=np.float32)},
        "no sigma": lambda np: {"mu": np.zeros(2048)}, "oblong": lambda np: {"mu": np.zeros(4), "sigma": np.zeros((4, 5))},
        "lopsided": lambda np: {"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))},
        "negative": lambda np: {"mu": np.zeros(4), "sigma": -np.eye(4)},
    },
}  # fmt: skip

# The `weight_map` of an index beside the weights, by one of its keys.
INDEX_EDITS: Mapping[str, Callable[[str], Any]] = {
    "absent part": lambda key: {"weight_map": {key: "diffusion_pytorch_model-00001-of-00002.safetensors"}},
    "part outside": lambda key: {"weight_map": {key: "../../../good/w4a8.safetensors"}},
    "part number": lambda key: {"weight_map": {key: 1}},
    "no map": lambda key: {"metadata": {}},
    "map list": lambda key: {"weight_map": [key]},
    "few keys": lambda key: {"weight_map": {key: "diffusion_pytorch_model.safetensors"}},
    "NaN": lambda key: {"metadata": {"total_size": NOT_A_NUMBER}, "weight_map": {key: "diffusion_pytorch_model.safetensors"}},
}


def edited(folder: Path, good: Path, edits: Mapping[str, Edit]) -> None:
    """FOLDER/EDIT/NAME of a JSON file whose content an edit has changed."""
    for name, edit in edits.items():
        place = folder / name.replace(" ", "_") / good.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(edit(json.loads(good.read_text(encoding="utf-8")))), encoding="utf-8")


def edited_folders(folder: Path, good: Path, name: str, edits: Mapping[str, Edit]) -> None:
    """FOLDER/EDIT: the same of a file NAME inside a whole folder."""
    for edit, change in edits.items():
        copy = folder / edit.replace(" ", "_")
        shutil.copytree(good, copy)
        (copy / name).write_text(json.dumps(change(json.loads((good / name).read_text(encoding="utf-8")))), encoding="utf-8")


def arrays(folder: Path, name: str, made: Mapping[str, Edit]) -> None:
    """FOLDER/EDIT/NAME of an .npz file with other members."""
    import numpy as np

    for edit, members in made.items():
        place = folder / edit.replace(" ", "_") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez(place, **members(np))


def weights_elsewhere(folder: Path, pipeline: Path) -> None:
    """FOLDER/index/EDIT: a pipeline whose weights have a faulty index; FOLDER/variant: only weights of a variant."""
    unet, weights = Path("unet"), "diffusion_pytorch_model.safetensors"
    for edit, index in INDEX_EDITS.items():
        copy = folder / "index" / edit.replace(" ", "_")
        shutil.copytree(pipeline, copy)
        (copy / unet / INDEX).write_text(json.dumps(index("conv_in.weight")), encoding="utf-8")
    shutil.copytree(pipeline, folder / "variant")
    (folder / "variant" / unet / weights).rename(folder / "variant" / unet / "diffusion_pytorch_model.non_ema.safetensors")
