"""What quantizing holds in memory beside the network itself."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from quantized_networks import CONTEXT
from torch import nn

from qncd.models.network import network_of
from qncd.ptq.pipeline import quantize_network, sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.recipe import Recipe, SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas


def parameters_in_memory() -> list[nn.Parameter]:
    """All that this process holds."""
    return [part for part in gc.get_objects() if type(part) is nn.Parameter and part.device.type == "cpu"]


def bytes_of(parameters: list[nn.Parameter]) -> dict[int, int]:
    """Bytes of each storage, by its address."""
    return {part.data_ptr(): part.untyped_storage().nbytes() for part in parameters}


@pytest.mark.parametrize(("mode", "width"), [("qncd+", "W4A8"), ("d2dpm", "W8A8")])
def test_no_stage_and_no_correction_copies_the_weights(make_cross_unet: Any, mode: str, width: str) -> None:
    others = parameters_in_memory()  # they stay where they are: nothing else gets their addresses
    network = network_of(make_cross_unet().to(torch.bfloat16).requires_grad_(False))
    process = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
    diffusion = Diffusion(network, process, SamplerConfig(timesteps=2), (4, 8, 8), lane=4)
    recipe = Recipe.of(mode, width, weight_range="max").with_calibration(samples=4, steps=2, batch_size=4)
    conditions = Conditions({CONTEXT: torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(5))})
    runs = DiffusionRuns(diffusion, recipe.calibration, conditions)
    data, record = sample_calibration(runs, recipe)
    held: list[int] = []

    def look(*_: Any) -> None:
        own = bytes_of(parameters_in_memory()).items() - bytes_of(others).items()
        held.append(sum(size for _, size in own))

    network.module.register_forward_pre_hook(look)
    outcome = quantize_network(runs, recipe, data, record)
    assert outcome.record is not None and {p.dtype for p in network.module.parameters()} == {torch.bfloat16}
    weights = sum(p.numel() * 2 for p in network.module.parameters())
    assert len(held) > 4 and weights <= max(held) < 1.01 * weights
