"""The bundled models: their sizes, and that they draw what they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qncd.benchmark.subjects import load_subject
from qncd.models.loading import load_config
from qncd.ptq.evaluation import sample_images
from qncd.recipe import SamplerConfig

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "qncd" / "assets"


def test_sizes() -> None:
    sizes = {path.name: sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
             for path in ASSETS.iterdir()}  # fmt: skip
    assert {"fashion_mnist_ddim", "fashion_mnist_ldm.safetensors", "scenes.safetensors"} <= sizes.keys()
    assert max(sizes.values()) <= 8e6 and sum(sizes.values()) <= 40e6


@pytest.mark.parametrize(
    ("name", "figure", "sampler", "images", "least"),
    [
        ("fashion_mnist_ldm.yaml", "class_accuracy", SamplerConfig(timesteps=10, convention="ldm"), 32, 75),
        ("scenes.yaml", "caption_accuracy", SamplerConfig(timesteps=20, convention="ldm"), 32, 90),
        ("fashion_mnist_dit.yaml", "class_accuracy", SamplerConfig(timesteps=8), 32, 85),
        ("scenes_mmdit.yaml", "caption_accuracy", SamplerConfig(timesteps=8), 32, 90),
    ],
)
def test_conditions_are_obeyed(name: str, figure: str, sampler: SamplerConfig, images: int, least: float) -> None:
    """In full precision, with guidance; the captions are ones that training never saw."""
    subject = load_subject(load_config(ROOT / "configs" / name), None, sampler, None, "cpu")
    pictures = sample_images(subject.sampler, range(images), 16, None, None, subject.conditions, subject.decode)
    figures = subject.score(pictures)
    assert figures[figure] >= least and np.isfinite(list(figures.values())).all()
