"""tools/train_ddim.py: trains, goes on from its snapshot, and writes weights that the sampler loads."""

from __future__ import annotations

import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qncd.models.loading import load_config, load_ddim

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "train_ddim.py"


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes())


def test_train_resume_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (48, 28, 28))
    write_idx(data / "train-images-idx3-ubyte", images)
    write_idx(data / "train-labels-idx1-ubyte", np.arange(48) % 10)
    config = load_config(SCRIPT.parents[1] / "configs" / "fashion_mnist.yml")
    config["model"] |= {"ch": 8, "ch_mult": [1, 2], "num_groups": 2}
    config["training"] |= {"batch_size": 16, "snapshot_freq": 2}
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    weights = []
    for steps in ("2", "4"):
        arguments = ["--config", str(tmp_path / "tiny.yml"), "--out", str(out), "--data", str(data), "--precision", "32-true"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--max_steps", steps])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        unet = load_ddim(config, out / "unet")
        weights.append(unet.conv_in.weight.clone())
        snapshot = torch.load(out / "last.ckpt", weights_only=True)
        assert snapshot["global_step"] == int(steps)
    assert not torch.equal(*weights)
    metrics = (out / "log" / "version_1").is_dir()
    assert metrics  # the second run had a separate log: it was a run, not a no-op
