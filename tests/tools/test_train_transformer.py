"""The training script of the transformers: latents are kept, training goes on, and the folder is a pipeline; tiny sizes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import qncd
from qncd.app.pipelines import class_labels
from qncd.io.fashion_mnist import CLASS_NAMES
from qncd.models.configs import read_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def little_fashion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in the place of Fashion-MNIST, which is not on every machine."""

    def load(*_: object) -> Any:
        return np.random.default_rng(0).integers(0, 256, (32, 32, 32, 1), np.uint8), np.arange(32) % 10

    monkeypatch.setattr("qncd.io.datasets.load_fashion_mnist", load)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("fashion_mnist_dit", {"class_labels": [3]}),
        ("scenes_mmdit", {"prompt": "a large red circle above a small blue square", "max_sequence_length": 0}),
    ],
)
def test_train_resume_and_load(name: str, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = read_config(ROOT / "configs" / f"{name}.yaml")
    section = config["training"]["transformer"]
    section |= {"batch_size": 8, "snapshot_freq": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config))
    found, written = [], set()
    for steps in ("1", "3"):
        words = ["--config", str(path), "--out", str(out), "--images", "32", "--precision", "32-true", "--max_steps", steps]
        monkeypatch.setattr(sys, "argv", ["train_transformer", *words])
        runpy.run_path(str(ROOT / "tools" / "train_transformer.py"), run_name="__main__")
        pipe = qncd.load(out / "model")
        found.append({name: value.clone() for name, value in pipe.transformer.state_dict().items()})
        assert torch.load(out / "run" / "last.ckpt", weights_only=True)["global_step"] == int(steps)
        written.add((out / "latents.safetensors").stat().st_mtime_ns)
    assert len(written) == 1, "the second run took the first one's latents"
    last = "proj_out.weight" if "mm" in name else "proj_out_2.weight"
    assert not torch.equal(found[0][last], found[1][last])
    image = pipe(**call, num_inference_steps=2, output_type="np").images
    assert image.shape[0] == 1 and np.isfinite(image).all()
    assert class_labels(pipe) == (None if "mm" in name else list(range(len(CLASS_NAMES))))


def test_other_targets_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(ROOT / "configs" / "fashion_mnist_dit.yaml")
    config["model"]["target"] = "diffusers.FluxPipeline"
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train_transformer", "--config", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools" / "train_transformer.py"), run_name="__main__")
    assert stopped.value.code == 2 and "diffusers.FluxPipeline: allowed are diffusers.DiTPipeline" in capsys.readouterr().err
