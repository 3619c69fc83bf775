"""Fixtures that several test folders share: golden files of the original code, and small networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

NEAR = Path(__file__).resolve().parent / "data" / "golden"
FAR = Path(__file__).resolve().parents[2] / "shared" / "golden"  # data too large for the repository

Golden = Callable[[str], Mapping[str, Tensor]]
MakeUNet = Callable[..., Any]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in processes that a test starts: sums in as many threads come in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The arrays of a golden file as tensors; the test is skipped where the file is not here."""

    def load(name: str) -> Mapping[str, Tensor]:
        path = next((folder / f"{name}.npz" for folder in (NEAR, FAR) if (folder / f"{name}.npz").is_file()), None)
        if path is None:
            pytest.skip(f"{name}.npz is not here")
        with np.load(path) as data:
            return {key: torch.from_numpy(data[key]) for key in data.files}

    return load


def _randomize_norms(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 0.0, 1.0)  # half of them negative
            nn.init.normal_(module.bias, 0.0, 0.2)


@pytest.fixture(scope="session")
def make_unet() -> MakeUNet:
    """make_unet(seed=0, **config): a small unconditional UNet with random weights, attention at 4x4."""

    def make(seed: int = 0, **config: Any) -> UNet2DModel:
        torch.manual_seed(seed)
        settings = {
            "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }  # fmt: skip
        unet = UNet2DModel(**{**settings, **config})
        _randomize_norms(unet)
        return unet.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_cross_unet() -> MakeUNet:
    """make_cross_unet(seed=0, **config): a small UNet with cross-attention to contexts (N, L, 12), two heads."""

    def make(seed: int = 0, **config: Any) -> UNet2DConditionModel:
        torch.manual_seed(seed)
        settings = {
            "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 12, "attention_head_dim": 2,
        }  # fmt: skip
        unet = UNet2DConditionModel(**{**settings, **config})
        _randomize_norms(unet)
        return unet.eval().requires_grad_(False)

    return make
