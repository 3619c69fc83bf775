"""What quantizing holds in memory beside the network itself."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import CONTEXT
from torch import nn

from qncd.models.network import Network, network_of
from qncd.ptq.heap import trim_heap
from qncd.ptq.pipeline import quantize_network, sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.ptq.stages.ranges import round_
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import LayerConfig, QuantLinear
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_rounding_layer_by_layer_takes_its_codes_and_no_more() -> None:
    """32 layers of 1.3 M weights each in half precision; every one of them needs five times as much for a moment."""
    config = LayerConfig(IntegerRange(8, True), None, "max", "max")
    layers = nn.Sequential(*(QuantLinear.from_float(nn.Linear(1152, 1152, dtype=torch.bfloat16), config) for _ in range(32)))
    network = Network.__new__(Network)  # all that round_ needs of one
    network.module = layers
    for layer in quant_layers(layers).values():
        layer.search_weight_range_()
    trim_heap()
    before, codes = resident(), sum(layer.weight.numel() for layer in layers)
    round_(network)
    assert resident() - before < 1.5 * codes


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
