"""Rotations of a whole network: which layers, in which blocks, and what the ranges are found on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from quantized_networks import TIMES, inputs
from small_pipelines import KINDS, made

import qncd
from qncd.models.network import network_of
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.rotation import rotate_network_, rotates
from qncd.ptq.stages.temporal import set_stepwise_ranges_
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig

CONFIG = QuantConfig(4, 4, gptq=True, rotation=True)


def test_inner_layers_in_the_largest_blocks(make_cross_unet: Any, caplog: pytest.LogCaptureFixture) -> None:
    unet, data = make_cross_unet(), inputs(make_cross_unet())
    network = quantize_(unet, CONFIG)
    before = network.predict(data.x, data.t, data.inputs)
    with caplog.at_level(logging.DEBUG, "qncd"):
        blocks = rotate_network_(network, CONFIG)
    layers = quant_layers(unet)
    narrow = {name for name, layer in layers.items() if layer.weight.shape[1] == 12}  # of contexts: no power of two above 4
    assert narrow and blocks.keys() == layers.keys() - narrow - {"conv_in", "conv_out"}
    assert {name: layer.rotation for name, layer in layers.items() if layer.rotation} == blocks
    assert blocks["mid_block.resnets.0.conv1"] == 32 and blocks["down_blocks.0.resnets.0.conv1"] == 16
    assert blocks["up_blocks.1.resnets.0.conv_shortcut"] == 16  # [h; skip] of 32 and 16 channels
    assert f"{len(narrow)} layers are not rotated, no block of 8 channels fits: " in caplog.text
    assert all(name in caplog.text for name in narrow)
    torch.testing.assert_close(network.predict(data.x, data.t, data.inputs), before, rtol=1e-4, atol=1e-4)
    assert "conv_in" not in rotate_network_(quantize_(make_cross_unet(), QuantConfig(4, 4, edge_bits=None)), CONFIG)  # 4 channels
    assert "conv_out" in rotate_network_(
        quantize_(make_cross_unet(), QuantConfig(4, 4, edge_bits=None)), QuantConfig(4, 4, edge_bits=None)
    )


def test_a_wide_channel_costs_less(make_unet: Any) -> None:
    """One channel 30 times as wide as the others takes the codes of all of them; rotated, it shares its width with 32."""
    data, errors = inputs(make_unet()), {}
    for rotation in (False, True):
        unet = make_unet()
        unet.mid_block.resnets[0].norm2.weight[0] = 30.0
        exact: list[torch.Tensor] = []
        unet.mid_block.resnets[0].conv2.register_forward_hook(lambda *args, into=exact: into.append(args[2]))
        seen: list[torch.Tensor] = []
        unet.mid_block.resnets[0].conv2.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0]))
        network_of(unet).predict(data.x, data.t)
        config = QuantConfig(8, 4, bias_correction=False, rotation=rotation)
        calibrate_(quantize_(unet, config), data, config)
        found = quant_layers(unet)["mid_block.resnets.0.conv2"](seen[0])
        errors[rotation] = float((found - exact[0]).square().mean())
    assert errors[True] < 0.7 * errors[False]


def test_ranges_of_the_embedding_are_those_of_rotated_inputs(make_unet: Any) -> None:
    unet = make_unet()
    network = quantize_(unet, CONFIG)
    rotate_network_(network, CONFIG)
    set_stepwise_ranges_(network, TIMES)
    layer = unet.time_embedding.linear_1
    assert layer.rotation == 16
    path = network.time_path()
    assert path is not None
    rotated = layer.operand(path.sinusoid(TIMES))
    codes = layer.act.codes
    highest = ((codes.qmax - layer.act.zero_point) * layer.act.scale)[:, 0]
    lowest = ((codes.qmin - layer.act.zero_point) * layer.act.scale)[:, 0]
    step = layer.act.scale[:, 0]
    assert bool((rotated.amax(1) <= highest + step).all()) and bool((rotated.amin(1) >= lowest - step).all())
    spans = rotated.amax(1).clamp(min=0) - rotated.amin(1).clamp(max=0)
    assert bool((highest - lowest < 1.7 * spans).all())


@pytest.mark.parametrize(("asked", "unet", "transformer"), [(None, False, True), (True, True, True), (False, False, False)])
def test_the_family_says_whether_to_rotate(asked: bool | None, unet: bool, transformer: bool, make_unet: Any) -> None:
    config = QuantConfig(4, 8, rotation=asked)
    for network, expected in ((network_of(make_unet()), unet), (network_of(made("SD3").transformer), transformer)):
        assert rotates(network, config) is expected
    on_grid = QuantConfig(4, None, weight_grid="gguf", rotation=None, bias_correction=False)
    assert not rotates(network_of(made("SD3").transformer), on_grid)


def test_in_mode_qncd_plus_transformers_are_rotated() -> None:
    call = KINDS["PixArt alpha"].call
    for width, options, expected in (("W4A8", {}, True), ("W4A8", {"rotation": False}, False), ("W4A16", {}, False)):
        pipe = made("PixArt alpha")
        qncd.quantize(pipe, width, "qncd+", calls=[call], steps=2, **options)
        assert any(layer.rotation for layer in quant_layers(pipe.transformer).values()) is expected
