"""The search for each layer's smoothing: what it keeps is the nearest in output, and floating point stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_networks import calibrate_with_

from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages import smoothing_search
from qncd.ptq.stages.compensation import compensate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing import smooth_
from qncd.ptq.stages.smoothing_search import STRENGTHS, channel_ratios, search_smoothing_
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig

from .test_compensation import errors, inputs

CONFIG = QuantConfig(8, 4, edge_bits=None, gptq=True, smoothing_search=True)
WIDE = "mid_block.resnets.0.conv2"


def with_a_wide_channel(unet: Any) -> Any:
    unet.mid_block.resnets[0].norm2.weight[0] = 60.0
    return unet


@pytest.mark.parametrize("kind", ["unet", "cross_unet"])
def test_each_layer_keeps_the_strength_of_least_error(kind: str, make_unet: Any, make_cross_unet: Any) -> None:
    make, data = (make_unet if kind == "unet" else make_cross_unet), inputs(kind)
    reference = quantize_(with_a_wide_channel(make()), CONFIG).module
    ratios = channel_ratios(network_of(reference), data, 8)
    found = {}
    for strength in STRENGTHS:
        trial = copy.deepcopy(reference)
        smooth_(network_of(trial), {name: ratio**strength for name, ratio in ratios.items()})
        calibrate_with_(trial, data, 8, correct=compensate_)
        found[strength] = {name: square for name, (_, square) in errors(reference, trial, data).items()}
    chosen = search_smoothing_(network_of(copy.deepcopy(reference)), data, 8)
    assert chosen[WIDE] > 0 and len(set(chosen.values())) > 1
    best = {name: min(found[strength][name] for strength in STRENGTHS) for name in chosen}
    # Layers of the time embedding have errors of 1e-5 from 24 rows in all: the search's single grid decides among these.
    assert all(found[chosen[name]][name] < (1.02 if best[name] > 1e-3 else 1.2) * best[name] for name in chosen)
    assert found[chosen[WIDE]][WIDE] < 0.7 * found[0.0][WIDE]


def test_floating_point_stays(make_unet: Any) -> None:
    data, unet = inputs("unet"), quantize_(with_a_wide_channel(make_unet()), CONFIG).module
    before, weights = network_of(unet).predict(data.x, data.t), {name: layer.weight for name, layer in quant_layers(unet).items()}
    kept = {name: weight.clone() for name, weight in weights.items()}
    chosen = search_smoothing_(network_of(unet), data, 8)
    assert all(weight.equal(kept[name]) for name, weight in weights.items())  # trials worked on their own
    for name, layer in quant_layers(unet).items():
        assert (layer.smoothing is not None) == (chosen[name] > 0), name
        assert layer.weight_scale is None and not layer.act.observers
    torch.testing.assert_close(network_of(unet).predict(data.x, data.t), before, rtol=1e-4, atol=1e-5)


def test_ratios_are_of_what_the_quantizer_sees(make_unet: Any) -> None:
    data, unet = inputs("unet"), quantize_(make_unet(), CONFIG).module
    seen = []
    unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ratios = channel_ratios(network_of(unet), data, 8)["conv_in"]
    expected = torch.cat(seen).abs().amax((0, 2, 3)) / unet.conv_in.weight.abs().amax((0, 2, 3))
    torch.testing.assert_close(ratios, expected / expected.log().mean().exp())
    unet.conv_in.smooth_(expected**0.5)  # SmoothQuant at 0.5 leaves both sides equally wide
    torch.testing.assert_close(channel_ratios(network_of(unet), data, 8)["conv_in"], torch.ones(3))


def test_a_layer_that_sees_nothing_is_left_out(make_unet: Any) -> None:
    unet = make_unet()
    norm = unet.mid_block.resnets[0].norm2
    norm.weight.zero_(), norm.bias.zero_()
    quantize_(unet, CONFIG)
    assert WIDE not in search_smoothing_(network_of(unet), inputs("unet"), 8)
    assert quant_layers(unet)[WIDE].smoothing is None


def test_what_is_not_finite_is_named(make_unet: Any) -> None:
    unet = make_unet()
    unet.mid_block.resnets[0].norm1.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1.*NaN or infinite"):
        search_smoothing_(quantize_(unet, CONFIG), inputs("unet"), 8)


def test_weights_rounded_to_nearest_are_compared_as_such(make_unet: Any) -> None:
    """The strengths differ from GPTQ's, and the wide channel is smoothed for both."""
    reference, data = quantize_(with_a_wide_channel(make_unet()), CONFIG).module, inputs("unet")
    by_gptq, nearest = (search_smoothing_(network_of(copy.deepcopy(reference)), data, 8, gptq=gptq) for gptq in (True, False))
    assert nearest.keys() == by_gptq.keys() and nearest != by_gptq and nearest[WIDE] > 0
    plain, smoothed = copy.deepcopy(reference), copy.deepcopy(reference)
    search_smoothing_(network_of(smoothed), data, 8, gptq=False)
    for network in (plain, smoothed):
        calibrate_with_(network, data, 8)
    assert errors(reference, smoothed, data)[WIDE][1] < 0.7 * errors(reference, plain, data)[WIDE][1]


def test_few_inputs_are_enough(make_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = smoothing_search.channel_ratios
    monkeypatch.setattr(
        smoothing_search, "channel_ratios", lambda unet, data, size: (seen.append(len(data)), original(unet, data, size))[1]
    )
    monkeypatch.setattr(smoothing_search, "INPUTS", 6)
    data = inputs("unet")
    assert isinstance(data, CalibrationSet) and search_smoothing_(quantize_(make_unet(), CONFIG), data, 8)
    assert seen == [6]
