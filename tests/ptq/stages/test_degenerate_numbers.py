"""Layers whose inputs or weights are constant, dead, huge or tiny: quantized well, or named in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.models.network import network_of
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.registry import STAGES, run_stages
from qncd.quant.inspection import quant_layers
from qncd.recipe import CalibrationConfig, QuantConfig, Recipe, ReconstructionConfig, SmoothingConfig

SMALL = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
CONV = "mid_block.resnets.0.conv1"
NEAREST, GPTQ = QuantConfig(4, 8), QuantConfig(4, 8, gptq=True)  # the first with bias correction


def inputs(count: int = 4) -> CalibrationSet:
    return CalibrationSet(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(count) * 40)


def normed(unet: Any, weight: Callable[[Tensor], Any], bias: Callable[[Tensor], Any]) -> None:
    """Change what feeds CONV: silu(weight * normalized + bias)."""
    norm = unet.mid_block.resnets[0].norm1
    weight(norm.weight.data)
    bias(norm.bias.data)


def kept(_: Tensor) -> None: ...


SITUATIONS: dict[str, Callable[[Any], None]] = {
    "constant": lambda unet: normed(unet, lambda w: w.zero_(), lambda b: b.fill_(1.3)),
    "nearly constant": lambda unet: normed(unet, lambda w: w.mul_(1e-5), lambda b: b.fill_(2.0)),
    "nearly constant and large": lambda unet: normed(unet, lambda w: w.mul_(1e-3), lambda b: b.fill_(3e3)),
    "all zero": lambda unet: normed(unet, lambda w: w.zero_(), lambda b: b.zero_()),
    "a huge channel": lambda unet: normed(unet, lambda w: w[:1].fill_(1e7), kept),
    "a huge constant channel": lambda unet: normed(unet, lambda w: w[:1].fill_(1e-3), lambda b: b[:1].fill_(1e7)),
    "1e15": lambda unet: normed(unet, lambda w: w.mul_(1e15), kept),
    "1e-30": lambda unet: normed(unet, lambda w: w.mul_(1e-30), lambda b: b.mul_(1e-30)),
    "denormal": lambda unet: normed(unet, lambda w: w.mul_(1e-42), lambda b: b.mul_(1e-42)),
    "dead channels": lambda unet: normed(unet, lambda w: w[::2].zero_(), lambda b: b[::2].zero_()),
    "rows of zeros": lambda unet: unet.mid_block.resnets[0].conv1.weight.data[::2].zero_(),
    "a weight of zeros": lambda unet: unet.mid_block.resnets[0].conv1.weight.data.zero_(),
    "weights of 1e15": lambda unet: unet.mid_block.resnets[0].conv1.weight.data.mul_(1e15),
    "weights of 1e-30": lambda unet: unet.mid_block.resnets[0].conv1.weight.data.mul_(1e-30),
}


def error_of(reference: nn.Module, quantized: nn.Module, data: CalibrationSet) -> tuple[float, float]:
    """Squared error of CONV's output on exact inputs, and the output's mean square."""
    layer = quant_layers(quantized)[CONV]
    found: list[tuple[float, float]] = []

    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        exact = output.double()
        found.append((float((layer(args[0]).double() - exact).square().mean()), float(exact.square().mean())))

    handle = reference.get_submodule(CONV).register_forward_hook(hook)
    network_of(reference).predict(data.x, data.t, data.inputs)
    handle.remove()
    return found[0]


def calibrated(unet: Any, data: CalibrationSet, config: QuantConfig) -> tuple[nn.Module, nn.Module]:
    """Prepared, and calibrated after that; every layer has finite weights on at most 2^b levels, and scales above 0."""
    reference = quantize_(copy.deepcopy(unet), config).module
    quantized = copy.deepcopy(reference)
    calibrate_(quantized, data, config, 2)
    for name, layer in quant_layers(quantized).items():
        assert bool(torch.isfinite(layer.weight).all() and torch.isfinite(layer.bias).all()), name
        assert bool((layer.weight_scale > 0).all() and (layer.act.scale > 0).all()), name
        assert layer.codes is not None and layer.config.weight_codes is not None
        assert len(layer.codes.unique()) <= 2**layer.config.weight_codes.bits, name
    return reference, quantized


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_layer_with_degenerate_numbers(situation: str, make_unet: Any) -> None:
    unet, data = make_unet(**SMALL), inputs()
    SITUATIONS[situation](unet)
    nearest, square = error_of(*calibrated(unet, data, NEAREST), data)
    solved, _ = error_of(*calibrated(unet, data, GPTQ), data)
    assert nearest < 0.02 * square
    assert solved <= 1.01 * nearest + 1e-14 * square


@pytest.mark.parametrize("situation", ["a huge constant channel"])
def test_searching_for_smoothing(situation: str, make_unet: Any) -> None:
    unet, data = make_unet(**SMALL), inputs()
    SITUATIONS[situation](unet)
    config = QuantConfig(4, 8, gptq=True, smoothing_search=True)
    searched, square = error_of(*calibrated(unet, data, config), data)
    assert searched < 2e-3 * square


@pytest.mark.parametrize("config", [NEAREST, GPTQ, QuantConfig(4, None, gptq=True)], ids=["nearest", "GPTQ", "weights alone"])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_one_sample(factor: float, config: QuantConfig, make_unet: Any) -> None:
    data = inputs(1)
    calibrated(make_unet(**SMALL), CalibrationSet(data.x * factor, data.t), config)


def test_reconstruction_of_one_sample(make_unet: Any) -> None:
    recipe = Recipe(
        quant=QuantConfig(4, 8, stepwise_embedding=True), smoothing=SmoothingConfig(),
        reconstruction=ReconstructionConfig(iterations=2, batch_size=1, act_iterations=2), calibration=CalibrationConfig(1, 1, 1),
    )  # fmt: skip
    unet = make_unet(**SMALL)
    SITUATIONS["all zero"](unet)
    context = Context(network_of(unet), recipe, inputs(1))
    run_stages(context)
    assert bool(torch.isfinite(context.network.predict(inputs(1).x, inputs(1).t, {})).all())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NEAREST, "mid_block.resnets.0.conv1.act: an activation is NaN or infinite while calibrating"),
        (QuantConfig(4, None, gptq=True), "mid_block.resnets.0.conv1: the layer's inputs hold NaN or infinity"),
        (QuantConfig(4, None), "mid_block.resnets.0.conv1: the mean error of its output is NaN or infinite"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_layer_whose_inputs_are_not_finite_is_named(value: float, config: QuantConfig, expected: str, make_unet: Any) -> None:
    unet = make_unet(**SMALL)
    normed(unet, lambda w: w[:1].fill_(value), kept)
    with pytest.raises(ValueError) as error:
        calibrate_(quantize_(unet, config), inputs(), config, 2)
    assert str(error.value) == expected


@pytest.mark.parametrize("raised", [RuntimeError("first\nsecond"), ZeroDivisionError("first"), torch.linalg.LinAlgError("first")])
def test_stage_and_layer_are_named(raised: Exception, make_unet: Any) -> None:
    unet = make_unet(**SMALL)

    def fail(*_: Any) -> None:
        raise raised

    unet.mid_block.resnets[0].conv1.forward = fail
    unet.mid_block.resnets[0].nonlinearity.register_forward_pre_hook(fail)
    context = Context(network_of(unet), Recipe(quant=NEAREST, smoothing=None), inputs())
    with pytest.raises(ValueError) as error:
        run_stages(context)
    assert str(error.value) == "calibrating: mid_block.resnets.0.nonlinearity: first"


def test_an_error_outside_every_layer_names_the_stage(make_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = STAGES[0]

    def fail(_: Context) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(stage, "run", fail)
    with pytest.raises(ValueError, match=r"^preparing: ZeroDivisionError$"):
        run_stages(Context(network_of(make_unet(**SMALL)), Recipe(quant=NEAREST, smoothing=None), inputs()))
