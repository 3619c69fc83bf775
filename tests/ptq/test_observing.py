"""Passes over the calibration set, and the ranges that they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_networks import CONTEXT, calibrate_with_
from torch import Tensor

from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.quant.quantizers import Stage
from qncd.recipe import QuantConfig

from .test_data import make_set


def ranges(unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (q.scale.clone(), q.zero_point.clone()) for name, q in act_quantizers(unet).items()}


def calibrated(unet: Any, data: CalibrationSet, act_range: str, batch_size: int, act_bits: int = 8) -> Any:
    quantize_(unet, QuantConfig(4, act_bits, act_range=act_range, weight_range="max"))
    calibrate_with_(unet, data, batch_size)
    return unet


@pytest.mark.parametrize("act_range", ["max", "mse"])
def test_ranges_are_of_the_whole_set_for_any_batch_size(make_unet: Any, act_range: str) -> None:
    data = make_set()
    expected = ranges(calibrated(make_unet(), data, act_range, 64))
    for batch_size in (1, 4, 12):
        found = ranges(calibrated(make_unet(), data, act_range, batch_size))
        for name, (scale, zero_point) in expected.items():
            torch.testing.assert_close(found[name][0], scale, rtol=1e-4, atol=0, msg=lambda m, name=name: f"{name}: {m}")
            assert (found[name][1] - zero_point).abs().max() <= 1, name
    first = ranges(calibrated(make_unet(), CalibrationSet(data.x[:4], data.t[:4]), act_range, 4))
    assert first["conv_in.act"][0] < 0.7 * expected["conv_in.act"][0]


def test_max_is_the_range_of_what_a_layer_receives(make_unet: Any) -> None:
    data = make_set()
    unet = make_unet()
    seen: list[Tensor] = []
    handle = unet.conv_out.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    unet(data.x, data.t)
    handle.remove()
    calibrated(unet, data, "max", 5)
    for name, x in (("conv_in", data.x), ("conv_out", seen[0])):
        quantizer = unet.get_submodule(name).act
        torch.testing.assert_close(quantizer.scale[0], (x.max() - x.min()) / 255, rtol=1e-5, atol=0)
        torch.testing.assert_close(quantizer.zero_point[0], torch.round(-x.min() / quantizer.scale[0]))


def test_it_switches_everything_over_and_reports_progress(make_unet: Any) -> None:
    unet, data, seen = quantize_(make_unet(), QuantConfig(4, 8)).module, make_set(), []
    before = unet(data.x, data.t).sample
    calibrate_with_(unet, data, 5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 13), (10, 13), (13, 13)]
    assert {q.stage for q in act_quantizers(unet).values()} == {Stage.QUANTIZE}
    assert all(layer.weight_scale is not None for layer in quant_layers(unet).values())
    assert not any(q.observers for q in act_quantizers(unet).values())
    after = unet(data.x, data.t).sample
    assert 0.001 < (after - before).abs().max() / before.abs().max() < 0.5


def test_bias_correction_takes_the_mean_error_out(make_unet: Any) -> None:
    """Measured at the first layer, whose input is the same in both models; weights and scales stay as they are."""
    data = make_set(24)
    unets = []
    for correction in (False, True):
        config = QuantConfig(4, 4, edge_bits=3, bias_correction=correction)
        unets.append(quantize_(make_unet(), config).module)
        calibrate_(unets[-1], data, config, 8)
    exact = make_unet().conv_in(data.x)
    errors = [(unet.conv_in(data.x) - exact).mean((0, 2, 3)).abs().max() for unet in unets]
    assert errors[0] > 0.005 and errors[1] < 1e-5
    plain, corrected = (quant_layers(unet) for unet in unets)
    assert all(torch.equal(plain[name].weight, corrected[name].weight) for name in plain)
    assert all(torch.equal(plain[name].act.scale, corrected[name].act.scale) for name in plain)
    assert not any(layer._forward_pre_hooks for layer in corrected.values())


def test_weights_alone_need_no_forward_pass(make_unet: Any) -> None:
    config = QuantConfig(4, None, weight_range="max", bias_correction=False)
    unet = quantize_(make_unet(), config).module
    unet.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    calibrate_(unet, make_set(), config)
    assert len(unet.mid_block.resnets[0].conv1.weight[0].unique()) <= 16


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_weight_is_named(make_unet: Any, act_bits: int | None, value: float) -> None:
    unet = make_unet()
    unet.mid_block.resnets[0].conv1.weight[3, 2, 1, 1] = value
    quantize_(unet, QuantConfig(4, act_bits))
    with pytest.raises(ValueError, match=r"^mid_block\.resnets\.0\.conv1: a weight is NaN or infinite$"):
        calibrate_(unet, make_set(), QuantConfig(4, act_bits))


def test_a_bad_activation_is_named(make_unet: Any) -> None:
    unet = make_unet()
    unet.mid_block.resnets[0].norm1.bias[3] = torch.nan
    quantize_(unet, QuantConfig(4, 8))
    message = r"^mid_block\.resnets\.0\.conv1\.act: an activation is NaN or infinite while calibrating$"
    with pytest.raises(ValueError, match=message):
        calibrate_(unet, make_set(), QuantConfig(4, 8))


def test_context_reaches_the_network(make_cross_unet: Any) -> None:
    data = make_set(4, 4)
    contexts = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0))
    wide = CalibrationSet(data.x, data.t, {CONTEXT: contexts}, {CONTEXT: 10 * contexts})
    narrow = CalibrationSet(data.x, data.t, {CONTEXT: contexts})
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.act"
    scales = [ranges(calibrated(make_cross_unet(), data, "max", 3))[name][0] for data in (wide, narrow)]
    torch.testing.assert_close(scales[0], 10 * scales[1])


def test_running_ranges_move_once_for_16_inputs_in_mixed_order(make_unet: Any) -> None:
    """Neither the batch size nor the order of the time steps decides them: an average of single inputs' extremes clips."""
    data = make_set(32)  # from small to large inputs, as along a trajectory
    expected = ranges(calibrated(make_unet(), data, "running", 16))
    for batch_size in (1, 4):
        found = ranges(calibrated(make_unet(), data, "running", batch_size))
        for name, (scale, _) in expected.items():
            torch.testing.assert_close(found[name][0], scale, rtol=1e-4, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    few = CalibrationSet(data.x[:3], data.t[:3])  # fewer than 16 move them once
    for name, (scale, _) in ranges(calibrated(make_unet(), few, "max", 1)).items():
        torch.testing.assert_close(ranges(calibrated(make_unet(), few, "running", 1))[name][0], scale, rtol=1e-4, atol=0)
        break
    widest = ranges(calibrated(make_unet(), data, "max", 16))["conv_in.act"][0]
    assert 0.8 * widest < expected["conv_in.act"][0] <= widest
