"""What a command reads: good files, made once, and what becomes of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bad_inputs.edits import ARRAYS, JSON_EDITS, arrays, edited, edited_folders, weights_elsewhere
from bad_inputs.pipelines import broken_pipelines, make_text_pipeline

BINARY = ("missing", "empty", "torn", "text", "zeros", "folder", "pipe", "unreadable", "picture")
TEXTUAL = ("missing", "empty", "folder", "pipe", "unreadable", "zeros", "picture", "not UTF-8")
STRUCTURED = (*TEXTUAL, "torn", "list", "deep", "huge number")
JSON = (*STRUCTURED, "two marks")
NOBODY = ("unreadable",)


def spoil(good: Path, kind: str, place: Path) -> None:
    """Put at `place` what is wrong in the way of `kind` with the file `good`."""
    content = good.read_bytes()
    texts = {
        "empty": b"", "torn": content[: len(content) * 2 // 3], "text": b"nothing of this kind\n" * 20,
        "zeros": bytes(max(512, len(content))), "not UTF-8": b"\xff\xfe\xfa" + content, "list": b"[1, 2, 3]\n",
        "deep": b"[" * 50_000 + b"]" * 50_000, "huge number": b'{"a": ' + b"9" * 6000 + b"}\n",
        "unreadable": content, "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
        "two marks": b"\xef\xbb\xbf" * 2 + content,
    }  # fmt: skip
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind != "missing":
        place.write_bytes(texts[kind])
    if kind == "unreadable":
        place.chmod(0)


def spoiled(folder: Path, good: Path, kinds: tuple[str, ...]) -> None:
    """FOLDER/KIND/NAME for each kind, spaces made lines."""
    for kind in kinds:
        spoil(good, kind, folder / kind.replace(" ", "_") / good.name)


def spoiled_folders(folder: Path, good: Path, name: str, kinds: tuple[str, ...]) -> None:
    """The same of a whole folder, one file of which is bad: FOLDER/KIND."""
    for kind in kinds:
        copy = folder / kind.replace(" ", "_")
        shutil.copytree(good, copy)
        (copy / name).unlink()
        spoil(good / name, kind, copy / name)


def make_materials(folder: Path) -> None:
    """All of it, below `folder`; some seconds."""
    good = folder / "good"
    good.mkdir()
    _make_models(good)
    make_text_pipeline(good)
    _make_measured(good)
    _make_onnx(good / "onnx")
    for path in good.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # diffusers' weights are their owner's alone
    _spoil_all(folder, good)
    (folder / "other").mkdir()
    (folder / "other" / "letter.txt").write_text("somebody's\n")
    (folder / "taken").write_text("a file where a folder is wanted\n")
    shutil.copytree(folder / "other", folder / "locked")
    (folder / "locked").chmod(0o555)


def make_ddim(folder: Path) -> Any:
    """The UNet of a small DDIM model with random weights; written as FOLDER/tiny.yml and the diffusers folder FOLDER/pipeline."""
    import torch
    import yaml

    from qncd.models.loading import load_config, save_ddim
    from qncd.models.original.ddim import build_ddim_unet

    config = load_config("fashion_mnist.yml")
    config["model"] |= {"ch": 8, "ch_mult": [1, 1], "num_groups": 2, "num_res_blocks": 1, "attn_resolutions": []}
    config["model"].pop("weights", None)
    (folder / "tiny.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    torch.manual_seed(0)
    unet = build_ddim_unet(config)
    save_ddim(unet, config, folder / "pipeline")
    return unet


def _make_models(good: Path) -> None:
    """A DDIM model as yaml, checkpoints (zip, legacy), diffusers folder, and what its quantization makes."""
    import torch

    from qncd.models.network import network_of
    from qncd.ptq.checkpoint import save_quantized
    from qncd.ptq.data import CalibrationSet
    from qncd.ptq.pipeline import calibrate_
    from qncd.ptq.stages.prepare import quantize_
    from qncd.recipe import QuantConfig

    unet = make_ddim(good)
    state = {f"conv{i}.weight": torch.zeros(2, 2) for i in range(50)}
    torch.save(state, good / "zip.ckpt")
    torch.save(state, good / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"x": torch.zeros(2, 1, 32, 32), "t": torch.tensor([1, 2])}, good / "set.pt")
    torch.save({"model": state}, good / "qdiffusion.pth")
    network, recipe = network_of(unet), QuantConfig(4, 8)
    quantize_(network, recipe)
    calibrate_(network, CalibrationSet(torch.randn(2, 1, 32, 32), torch.tensor([1, 500])), recipe)
    save_quantized(network, good / "w4a8.safetensors", recipe, "0" * 64, {"sampler": {}}, None)


def _make_onnx(good: Path) -> None:
    """An ONNX model of nobody's: the identity."""
    import onnx

    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 1, 32, 32)) for name in ("sample", "noise")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["sample"], ["noise"])], "identity", sides[:1], sides[1:])
    good.mkdir()
    onnx.save(onnx.helper.make_model(graph), good / "model.onnx")


def _make_measured(good: Path) -> None:
    """Images, statistics, prompts, annotations, a recipe and a run."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (good / "pictures").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(good / "pictures" / f"{i}.png")
    np.savez(good / "images.npz", arr_0=rng.integers(0, 256, (2, 8, 8, 3), np.uint8))
    np.savez(good / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    (good / "prompts.txt").write_text("a red circle\na blue square\n")
    (good / "prompts.jsonl").write_text('{"file": "images/0.png", "prompt": "a red circle"}\n')
    (good / "recipe.yaml").write_text("mode: qncd\nwidth: W4A8\n")
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    (good / "captions.json").write_text(json.dumps(coco))
    run = {"settings": {}, "environment": {}, "versions": {}, "resumed": [], "finished": None, "figures": {}}
    (good / "run").mkdir()
    (good / "run" / "run.json").write_text(json.dumps(run))


def _spoil_all(folder: Path, good: Path) -> None:
    for name in ("zip.ckpt", "legacy.ckpt", "set.pt", "qdiffusion.pth", "w4a8.safetensors", "images.npz", "statistics.npz"):
        spoiled(folder / name, good / name, BINARY)
    for name in ("tiny.yml", "recipe.yaml"):
        spoiled(folder / name, good / name, STRUCTURED)
    spoiled(folder / "captions.json", good / "captions.json", JSON)
    edited(folder / "captions.json", good / "captions.json", JSON_EDITS["captions.json"])
    for name, made in ARRAYS.items():
        arrays(folder / name, name, made)
    for name in ("prompts.txt", "prompts.jsonl"):
        spoiled(folder / name, good / name, TEXTUAL)
    spoiled_folders(folder / "run.json", good / "run", "run.json", JSON[2:])
    edited_folders(folder / "run.json", good / "run", "run.json", JSON_EDITS["run.json"])
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        place = name.replace("/", "_")
        spoiled_folders(folder / place, good / "pipeline", name, JSON)
        edited_folders(folder / place, good / "pipeline", name, JSON_EDITS[place])
    weights_elsewhere(folder, good / "pipeline")
    broken_pipelines(folder / "broken", good / "pipeline")
    spoiled_folders(folder / "onnx", good / "onnx", "model.onnx", BINARY)
    shutil.copytree(good / "onnx", folder / "onnx" / "foreign")
    weights = next((good / "pipeline" / "unet").glob("*.safetensors")).name
    spoiled_folders(folder / "weights", good / "pipeline", f"unet/{weights}", BINARY)
    for kind in BINARY[1:]:
        shutil.copytree(good / "pictures", folder / "pictures" / kind)
        (folder / "pictures" / kind / "0.png").unlink()
        if kind not in ("folder", "pipe"):
            spoil(good / "pictures" / "0.png", kind, folder / "pictures" / kind / "0.png")
    (folder / "scenes").mkdir()
    for kind in TEXTUAL[1:]:
        spoil(good / "prompts.jsonl", kind, folder / "scenes" / kind.replace(" ", "_") / "prompts.jsonl")
