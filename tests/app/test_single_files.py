"""Single files of SDXL through the commands: the images of the pipeline's folder, quantized, exported, or refused in one line."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from script_runs import run_in_process
from single_files import configs_alone, made_for_files, single_file_state

from qncd.app.commands.export import load_unet
from qncd.app.commands.sample import choose_sampler
from qncd.models.loading import state_dict_hash


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.ckpt, a checkpoint of SDXL; its pipeline's folder `whole`, and `configs`, which has no weights."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = made_for_files("SDXL")
    torch.save({"state_dict": single_file_state(pipe)}, folder / "m.ckpt")
    configs_alone(pipe, folder / "configs")
    pipe.save_pretrained(folder / "whole")
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(1)}, folder / "lora.safetensors")
    return folder


TEXT = ("--prompt", "a large red circle", "--n_samples", 2, "--ddim_steps", 2, "--device", "cpu", "--lane", 2)


def images(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "images").glob("*.png"))])


def test_the_images_are_the_folders(there: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((there / "m.ckpt").read_bytes()).hexdigest()
    file = ("--ckpt", there / "m.ckpt", "--config", there / "configs")
    run_in_process("txt2img.py", *file, *TEXT, "--sha256", digest, "--outdir", tmp_path / "file")
    run_in_process("txt2img.py", "--ckpt", there / "whole", *TEXT, "--outdir", tmp_path / "folder")
    assert np.array_equal(images(tmp_path / "file"), images(tmp_path / "folder")) and images(tmp_path / "file").std() > 10
    ptq = ("--ptq", "--quant_act", "--weight_bit", 4, "--cali_n", 2, "--cali_st", 2, "--quant_mode", "linear")
    run_in_process("txt2img.py", *file, *TEXT, *ptq, "--outdir", tmp_path / "quantized")
    assert not np.array_equal(images(tmp_path / "quantized"), images(tmp_path / "folder"))


def test_the_commands_find_the_model(there: Path) -> None:
    """`qncd sample` and `qncd quantize` take its text-to-image sampler, `qncd export` its UNet."""
    for config in ([], ["--config", str(there / "configs")]):
        assert choose_sampler(["--ckpt", str(there / "m.ckpt"), *config])[0].module == "txt2img"
    args = argparse.Namespace(config=there / "configs", ckpt=str(there / "m.ckpt"), use_pretrained=False, sha256=None)
    assert state_dict_hash(load_unet(args)) == state_dict_hash(made_for_files("SDXL").unet)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--ckpt", "lora.safetensors"),
            "lora.safetensors: is a LoRA (lora_unet_mid.lora_up.weight), not a whole model: give it to",
        ),
        (("--ckpt", "lora.safetensors", "--config", "configs/scenes.yaml"), "lora.safetensors: is a LoRA"),
        (("--ckpt", "m.ckpt", "--config", "configs/scenes.yaml"), "m.ckpt: Stable Diffusion XL, which no yaml describes"),
        (("--ckpt", "m.ckpt", "--config", "gone/gone/gone"), "gone/gone/gone: no such config file"),
        (("--ckpt", "m.ckpt", "--sha256", "0" * 64), "--sha256 says 000"),
        (("--ckpt", "m.ckpt", "--use_pretrained"), "--use_pretrained: allowed with original checkpoints"),
        (("--ckpt", "whole", "--config", "whole"), "--config: allowed with original checkpoints"),
    ],
)
def test_one_line_says_what_is_wrong(there: Path, flags: Any, message: str, tmp_path: Path) -> None:
    words = [there / word if (there / word).exists() else word for word in flags]
    log = run_in_process("txt2img.py", *words, *TEXT, "--outdir", tmp_path / "o", status=2)
    assert message in log.splitlines()[-1] and log.splitlines()[-1].startswith("txt2img.py: error: ")
    assert not (tmp_path / "o").exists()
