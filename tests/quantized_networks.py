"""Small quantized networks and what they get, for the tests of everything that runs them in integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qncd.ptq.calibration import CalibrationSet, calibrate_
from qncd.ptq.pipeline import weight_correction
from qncd.ptq.stages.bit_allocation import free_quantizers
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.ptq.stages.smoothing_search import search_smoothing_
from qncd.quant.convert import quant_layers, quantize_, set_act_bits_
from qncd.recipe import QuantConfig, SmoothingConfig

TIMES = [1, 251, 501, 751]


def inputs(unet: Any, count: int = 8) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    size, channels = unet.config.sample_size, unet.config.in_channels
    x = torch.randn(count, channels, size, size, generator=generator)
    cond = torch.randn(count, 5, 12, generator=generator) if "cross_attention_dim" in unet.config else None
    return CalibrationSet(x, torch.tensor(TIMES).repeat(-(-count // 4))[:count], cond)


def prepared(unet: Any, config: QuantConfig, stepwise: Any = None) -> Any:
    factors = smoothing_factors(unet, TIMES, SmoothingConfig())
    quantize_(unet, config)
    smooth_(unet, factors)
    if stepwise:
        stepwise(unet, TIMES)
    if config.bit_allocation:
        set_act_bits_(unet, {name: 4 + index % 5 for index, name in enumerate(free_quantizers(unet, config))})
    if config.smoothing_search:
        assert any(search_smoothing_(unet, inputs(unet), 8).values())
    calibrate_(unet, inputs(unet), 8, correct=weight_correction(config))
    return unet


def call(unet: Any, data: CalibrationSet) -> Tensor:
    """On the network's device, from and to the CPU."""
    more = {} if data.cond is None else {"encoder_hidden_states": data.cond.to(unet.device)}
    with torch.no_grad():
        out: Tensor = unet(data.x.to(unet.device), data.t.to(unet.device), **more).sample.cpu()
    return out


def assert_same_in_integers(full: Any, unet: Any, engine: Any, count: int = 8) -> None:
    """What the engine gives could come of one code more or less at each input of the last layer, and lies nearer to the
    fake-quantized network than that lies to full precision: rounding errors tip ties, as they do in torch between batch sizes."""
    data = inputs(unet, count)
    exact, expected, found = call(full, data), call(unet, data), call(engine, data)
    layer = quant_layers(unet)["conv_out"]
    one_code = float(layer.act.scale.max()) * float(layer.weight.abs().flatten(1).sum(1).max())
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= one_code).float().mean() >= 0.999
    assert (found - expected).square().mean() < (0.9 * (expected - exact)).square().mean()
