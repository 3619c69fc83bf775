"""Low-rank branches: their ranks, what they are made of, and what they leave to round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_networks import inputs

from qncd.models.network import network_of
from qncd.ptq.bits import mean_bits
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.low_rank import add_branches_, largest_directions
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.reconstruction import reconstruct_
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig, Recipe, ReconstructionConfig

from .test_compensation import errors

CONFIG = QuantConfig(3, None, edge_bits=None, rank=32)
LAYER = "mid_block.resnets.0.conv1"


def test_the_decomposition_is_the_svd(make_unet: Any) -> None:
    matrix = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    exact = (left[:, :6] * values[:6]) @ right[:6]
    torch.manual_seed(3)
    u, s, v = largest_directions(matrix, 6)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))  # nobody else's numbers are taken
    assert float((matrix - (u * s) @ v.T).norm()) < 1.001 * float((matrix - exact).norm())
    torch.testing.assert_close(s, values[:6], rtol=1e-3, atol=0)
    assert all(torch.equal(a, b) for a, b in zip((u, s, v), largest_directions(matrix, 6), strict=True))
    with pytest.raises(ValueError, match="a weight is NaN or infinite"):
        largest_directions(matrix / 0, 6)


def test_ranks_follow_from_the_layers_sizes(make_unet: Any) -> None:
    """A branch of rank r has r (O + n) numbers of 16 bits beside O n weights."""
    unet = quantize_(make_unet(), CONFIG).module
    ranks = add_branches_(network_of(unet), CONFIG)
    assert ranks[LAYER] == 32 * 288 // (16 * (32 + 288))  # 1 bit for each weight
    assert "conv_in" not in ranks  # 16 rows of 27: not one rank for 1 bit a weight
    layer = quant_layers(unet)[LAYER]
    assert layer.down is not None and layer.up is not None
    assert layer.down.shape == (1, 32, 3, 3) and layer.up.shape == (32, 1)
    assert torch.equal(layer.down, layer.down.half().float()) and torch.equal(layer.up, layer.up.half().float())
    more = add_branches_(quantize_(make_unet(), CONFIG), QuantConfig(3, None, rank=5, branch_bits=100.0))
    assert more[LAYER] == 5 and {"conv_in", "conv_out"}.isdisjoint(more)  # the edges have 8 bits of their own here


def test_storage_is_counted(make_unet: Any) -> None:
    config = QuantConfig(4, 8, rank=32, branch_bits=2.0)
    unet, data = make_unet(), inputs(make_unet(), 2)
    calibrate_(quantize_(unet, config), data, config)
    layers = quant_layers(unet)
    whole = sum(layer.weight.numel() for layer in layers.values())
    edges = sum(layers[name].weight.numel() for name in ("conv_in", "conv_out"))
    branches = sum(part.numel() for layer in layers.values() for part in (layer.down, layer.up) if part is not None)
    assert mean_bits(network_of(unet), data).weight_bits == pytest.approx(
        (4 * (whole - edges) + 8 * edges + 16 * branches) / whole
    )


def test_what_is_left_is_easier_to_round(make_unet: Any) -> None:
    """Two directions that are far larger than the rest go to the branch; the layers' outputs are nearer, more so by GPTQ."""
    generator = torch.Generator().manual_seed(5)
    reference = make_unet()
    for layer in reference.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            rows = layer.weight.view(len(layer.weight), -1)
            rows += 0.5 * torch.randn(len(rows), 1, generator=generator) * torch.randn(1, rows.shape[1], generator=generator)
    data, found = inputs(reference), {}
    for rank, gptq in ((0, False), (32, False), (32, True)):
        config = QuantConfig(3, None, edge_bits=None, rank=rank, branch_bits=2.0 if rank else 1.0, gptq=gptq)
        unet = quantize_(copy.deepcopy(reference), config).module
        calibrate_(unet, data, config)
        plain = quantize_(copy.deepcopy(reference), CONFIG).module
        found[rank, gptq] = torch.tensor([square for _, square in errors(plain, unet, data).values()]).log().mean().exp()
    assert found[32, False] < 0.5 * found[0, False] and found[32, True] < 0.8 * found[32, False]


def test_smoothing_is_judged_with_the_branch_that_follows(make_unet: Any) -> None:
    unet = make_unet()
    unet.mid_block.resnets[0].norm2.weight[0] = 60.0
    config = Recipe.of("svdquant", "W4A4", edge_bits=None, branch_bits=2.0).quant
    data, plain = inputs(unet), quantize_(copy.deepcopy(unet), config).module
    svdquant, smoothed = quantize_(copy.deepcopy(unet), config).module, quantize_(copy.deepcopy(unet), config).module
    calibrate_(svdquant, data, config)
    calibrate_(smoothed, data, Recipe.of("svdquant", "W4A4", edge_bits=None, rank=0).quant)
    layer = quant_layers(svdquant)["mid_block.resnets.0.conv2"]
    assert layer.smoothing is not None and layer.down is not None
    both = [torch.tensor([square for _, square in errors(plain, network, data).values()]) for network in (svdquant, smoothed)]
    assert both[0].log().mean() < both[1].log().mean()


def test_reconstruction_learns_beside_it(make_unet: Any) -> None:
    config = QuantConfig(3, None, rank=32, branch_bits=2.0, bias_correction=False)
    network, data = quantize_(make_unet(), config), inputs(make_unet())
    add_branches_(network, config)
    reference = network_of(copy.deepcopy(network.module))
    results = reconstruct_(network, reference, data, ReconstructionConfig(iterations=40, batch_size=8))
    better = [result for result in results if result.kept]
    assert len(better) > len(results) / 2 and all(result.after < result.before for result in better)
