"""The tools that train the two bundled classifiers, on a handful of pictures."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from safetensors import safe_open
from script_runs import run_in_process

from qncd.metrics.networks.fashion_mnist_classifier import FashionMnistClassifier
from qncd.metrics.networks.scene_classifier import SceneClassifier
from qncd.metrics.report.sources import SavedStatistics


def read(path: Path) -> tuple[set[str], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata()


def test_scene_classifier(tmp_path: Path) -> None:
    run_in_process(
        "train_scene_classifier.py",
        "--out",
        tmp_path,
        "--images",
        40,
        "--test_images",
        8,
        "--epochs",
        1,
        "--batch_size",
        16,
        folder="tools",
    )
    names, metadata = read(tmp_path / "scene_classifier.safetensors")
    assert names == SceneClassifier().state_dict().keys()
    assert metadata["images"] == "40" and "all_correct" in metadata["rendered"]


def test_fashion_mnist_classifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", rng.integers(0, 256, (40, 28, 28))), ("labels-idx1", rng.integers(0, 10, 40))):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"{split}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    out = tmp_path / "out"
    run_in_process(
        "train_fashion_mnist_classifier.py", "--out", out, "--data", tmp_path, "--epochs", 1, "--batch_size", 16, folder="tools"
    )
    names, metadata = read(out / "fashion_mnist_classifier.safetensors")
    assert names == FashionMnistClassifier().state_dict().keys()
    assert 0 <= float(metadata["test_accuracy"]) <= 100
    assert SavedStatistics.open(out / "fashion_mnist_statistics.npz").features.count == 40
