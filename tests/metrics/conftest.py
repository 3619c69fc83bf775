"""Random Inception weights, made once a session, small CLIP models, and a cache of features that ends with each test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def random_inception_state(seed: int = 5000) -> dict[str, torch.Tensor]:
    """Random weights by the recipe behind metrics_inception.npz: one generator for each key, keys in sorted order."""
    from torchvision.models import inception_v3

    # torchvision's network has the same names and shapes; the ports differ from it in their pooling only.
    shapes = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    state = {}
    for i, key in enumerate(sorted(shapes)):
        value = shapes[key]
        generator = torch.Generator().manual_seed(seed + i)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros_like(value)
        elif key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator) * 0.5 + 0.75
        else:
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 4:
                state[key] = noise * math.sqrt(2 / value[0].numel())
            elif value.ndim == 2:
                state[key] = noise / math.sqrt(value.shape[1])
            else:
                state[key] = 1 + 0.1 * noise if key.endswith("bn.weight") else 0.1 * noise
    return state


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights that torch-fidelity and pytorch-fid load as their own."""
    pytest.importorskip("torch_fidelity")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_inception_state(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small open_clip model with random weights, for `local-dir:`."""
    import json

    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of features is a folder of this test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QNCD_CACHE", str(folder))
    yield folder


def write_images(
    folder: Path, count: int = 12, seed: int = 0, shape: tuple[int, ...] = (32, 32), smooth: bool = False
) -> np.ndarray:
    """Grey or RGB noise named as the sampler does; returns it as uint8 (count, ...).

    `smooth` enlarges coarse noise of 6x6, which looks more like pictures to a network.
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if smooth:
            coarse = rng.integers(0, 256, (6, 6, *shape[2:]), np.uint8)
            images[i] = np.asarray(Image.fromarray(coarse).resize(shape[1::-1], Image.Resampling.BICUBIC))
        Image.fromarray(images[i]).save(folder / f"{i:06d}_seed{1234 + i}.png")
    return images


@pytest.fixture(scope="session")
def make_images():
    """make_images(folder, count, seed, shape, smooth): see `write_images`."""
    return write_images
