"""Folders of small runs and benchmarks, written without any network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qncd.inspection.record import CONTROL, PLAIN, Histogram, Inspected, LayerRounding, NoiseAt, Search, Smoothed
from qncd.io.images import image_name, save_png
from qncd.io.runs import open_run
from qncd.ptq.layer_record import LAYERS_FILE, PRODUCT, LayerRecord, NetworkRecord
from qncd.quant.affine import SEARCH_RATIOS

COUNT = 6


def pictures(noise: float, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 (COUNT, size, size, 3): smooth pictures, the later ones off by more noise."""
    plane = np.linspace(60, 180, size * size).reshape(size, size, 1)
    clean = np.stack([np.roll(plane, 3 * i, 0) for i in range(COUNT)]).repeat(3, 3)
    strength = noise * np.arange(1, COUNT + 1).reshape(-1, 1, 1, 1)
    return np.clip(clean + strength * np.random.default_rng(seed).normal(size=clean.shape), 0, 255).astype(np.uint8)


def layers() -> NetworkRecord:
    steps = (900.0, 500.0, 1.0)
    own = [(1e-3 * (i + 1), 2e-3, 3e-3) for i in range(12)]
    found = [
        LayerRecord(f"block.{i}", "Conv2d", 1000 * (i + 1), 4, 6 - i % 2, -1.5, 2.5 + i, 3, errors, 1e-3, (4e-3,) * 3)
        for i, errors in enumerate(own)
    ]
    return NetworkRecord((*found, LayerRecord("attention.q", PRODUCT, 0, None, 8, -3.0, 3.0, 1)), steps, 2, (1e-3, 2e-3, 5e-3))


def write_run(folder: Path, mode: str | None, noise: float = 2, compared: bool = True, size: int = 32) -> Path:
    """A run of a sampling command, as it leaves its folder."""
    quantization = mode and {"mode": mode, "weight_bits": 4, "act_bits": 6}
    settings = {"model": "0" * 64, "sampler": {"timesteps": 3}, "seed": 7, "quantization": quantization}
    with open_run(folder, settings, {"device": "cpu"}) as run:
        run.finish(calibration_seconds=12.0, images_per_second=3.0)
    for side, images in (("fp", pictures(0, size)), ("images", pictures(noise, size))):
        for i, image in enumerate(images if compared or side == "images" else ()):
            save_png(image, folder / side / image_name(i, 7 + i))
    if mode:
        (folder / LAYERS_FILE).write_text(json.dumps(layers().to_json()))
    return folder


def spread(value: float) -> dict[str, float]:
    return {"mean": value, "min": value - 0.1, "max": value + 0.1, "std": 0.1}


def write_benchmark(folder: Path, sizes: bool = True) -> Path:
    """A quality benchmark, as it leaves its folder; two of its cells keep samples."""
    with open_run(folder, {"benchmark": "quality"}, {"device": "cpu"}) as run:
        run.finish(cells=3)
    keys = ("fid", "fid_difference", "sfid", "psnr", "psnr_of_mean", "psnr_p5", "poor", "lpips", "noise_error")
    rows: list[dict[str, Any]] = [{"width": "FP", "mode": "FP", "seeds": 1, **dict.fromkeys(keys), "fid": spread(2)}]
    cells: list[dict[str, Any]] = [{"cell": {"width": "FP", "mode": "FP", "seed": 0}, "samples": None}]
    for place, mode in enumerate(("linear", "qncd+")):
        row = {"width": "W4A8", "mode": mode, "seeds": 3, **{key: spread(10 * (place + 1)) for key in keys}, "lpips": None}
        if sizes:
            row |= {"megabytes": spread(3 - place), "images_per_second": {"openvino": spread(5 + place)}}
        names = [image_name(i, 7 + i) for i in range(COUNT)]
        for name, image, exact in zip(names, pictures(3 - place), pictures(0), strict=True):
            save_png(image, folder / "samples" / f"W4A8_{mode}_seed0" / name)
            save_png(exact, folder / "samples" / "FP" / name)
        rows.append(row)
        samples = {"first": names[:4], "worst": names[-2:], "median": names[2:4]}
        cells.append({"cell": {"width": "W4A8", "mode": mode, "seed": 0}, "samples": samples if sizes else None})
    content = {
        "command": "qncd benchmark quality <&>", "caption": ["how they were made"], "settings": {"images": COUNT}, "rows": rows,
        "missing": [], "cells": cells, "git_commits": [], "versions": {},
    }  # fmt: skip
    (folder / "quality.json").write_text(json.dumps(content))
    return folder


def write_inspection(folder: Path) -> Path:
    """What `qncd inspect` leaves of a model."""
    folder.mkdir()
    noise = {name: {i: NoiseAt(20.0 - i, 1e-3, 0.1, -0.2) for i in range(3)} for name in (PLAIN, CONTROL)}
    smoothed = Smoothed({"block.0": torch.tensor([1.0, 8.0])}, {"block.0": torch.tensor([1.0, 3.0])})
    values = torch.linspace(-8, 7, 64)
    search = Search("weights", torch.rand(len(SEARCH_RATIOS), 2), torch.ones(2))
    codes = torch.stack(values.round().unique(return_counts=True))
    layer = LayerRounding(
        "block.0", 4, Histogram.of(values, 10), Histogram.of(values - values.round(), 10), codes, 0.01, (search,)
    )
    Inspected("m: W4A6 qncd+", layers(), smoothed, noise, layer, {"quantization": {"act_bits": 6}}).save(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of the same full-precision images, one in full precision, a benchmark, and a model that was inspected."""
    root = tmp_path_factory.mktemp("report")
    return {
        "good": write_run(root / "good", "qncd+", 1),
        "poor": write_run(root / "poor", "linear", 6),
        "full": write_run(root / "full", None, compared=False),
        "bench": write_benchmark(root / "bench"),
        "model": write_inspection(root / "model"),
    }
