"""The training scripts of the latent models: first stage, then UNet and conditioner, then a model that loads; tiny sizes."""

from __future__ import annotations

import re
import runpy
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from qncd.models.latent import load_latent_model
from qncd.models.loading import load_config

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., None]


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a script in this process on tiny.yaml and little data."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "t10k"):
        write_idx(data / f"{split}-images-idx3-ubyte", np.random.default_rng(0).integers(0, 256, (48, 28, 28)))
        write_idx(data / f"{split}-labels-idx1-ubyte", np.arange(48) % 10)

    def script(name: str, *arguments: str) -> None:
        fixed = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--data", str(data)]
        fixed += ["--images", "48", "--precision", "32-true"]
        monkeypatch.setattr(sys, "argv", [name, *fixed, *arguments])
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")

    return script


def tiny(name: str) -> dict[str, Any]:
    """The config of a bundled model with everything narrow."""
    config: dict[str, Any] = load_config(ROOT / "configs" / name)
    params = config["model"]["params"]
    params["unet_config"]["params"] |= {"model_channels": 8, "num_groups": 2, "context_dim": 8, "num_heads": 1}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 4, "num_groups": 2}
    condition = params["cond_stage_config"]["params"]
    if "text_config" in condition:
        condition["text_config"] |= {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8, "num_hidden_layers": 1}
    else:
        condition["embed_dim"] = 8
    for section in config["training"].values():
        section |= {"batch_size": 16, "snapshot_freq": 2, **({"codebook_from": 1} if "codebook_from" in section else {})}
    return config


@pytest.mark.parametrize("name", ["fashion_mnist_ldm.yaml", "scenes.yaml"])
def test_train_resume_and_load(name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(name)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        run("train_latent_diffusion", "--max_steps", "2")
    assert "run tools/train_first_stage.py" in capsys.readouterr().err

    run("train_first_stage", "--max_steps", "3")
    said = capsys.readouterr().out
    factor = float(said.rpartition("scale_factor: ")[2])
    assert 0 < factor < 1000 and "PSNR" in said
    config["model"]["params"]["scale_factor"] = factor
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))

    weights, written = [], set()
    for steps in ("2", "4"):
        run("train_latent_diffusion", "--max_steps", steps)
        model = load_latent_model(config, out / "model.safetensors")
        assert model.conditioner is not None
        weights += [model.unet.conv_in.weight.clone(), next(model.conditioner.parameters()).clone()]
        assert torch.load(out / "diffusion_run" / "last.ckpt", weights_only=True)["global_step"] == int(steps)
        written.add((out / "latents.safetensors").stat().st_mtime_ns)
    assert len(written) == 1, "the second run took the first one's latents"
    assert not torch.equal(weights[0], weights[2])  # the second run was a run, and trained both networks
    assert not torch.equal(weights[1], weights[3])
    said = capsys.readouterr().out
    assert re.search(r"48 latents, mean .*, standard deviation (1\.[01]|0\.[89])", said)
    with safe_open(out / "model.safetensors", framework="pt") as stream:
        dtypes = {stream.get_tensor(key).dtype for key in stream.keys()}  # noqa: SIM118
    assert dtypes == {torch.float16}


def test_latents_are_bound_to_their_autoencoder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny("fashion_mnist_ldm.yaml")))
    found = []
    for steps in ("2", "4"):
        run("train_first_stage", "--max_steps", steps)
        run("train_latent_diffusion", "--max_steps", steps)
        found.append((tmp_path / "run" / "latents.safetensors").read_bytes())
    assert found[0] != found[1]
