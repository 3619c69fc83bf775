"""What an error at each time step does to the sample, and what weighs calibration inputs by it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from quantized_networks import TIMES, inputs
from torch import nn

import qncd
from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import find_ranges_
from qncd.ptq.stages.bias_correction import correct_biases_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.step_weights import step_sensitivity
from qncd.quant.inspection import quant_layers
from qncd.quant.rounding import reconstruction_loss
from qncd.recipe import QuantConfig, Recipe, RecipeError, SamplerConfig
from qncd.sampling.corrector import Corrected
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas


def sampler(unet: nn.Module, steps: int = 5) -> Diffusion:
    process = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
    return Diffusion(network_of(unet), process, SamplerConfig(timesteps=steps), (3, 8, 8), 4)


def test_of_a_network_that_always_says_nothing(make_unet: Any) -> None:
    """Then the sample is linear in the predictions: x_0 moves by (noise/alpha at t - the same at the next step) d."""
    unet = make_unet()
    for parameter in unet.conv_out.parameters():
        parameter.data.zero_()
    diffusion = sampler(unet)
    found = step_sensitivity(diffusion, samples=4)
    ratios = [step.noise / step.alpha for step in diffusion.steps] + [0.0]
    expected = {step.t: (high - low) ** 2 for step, high, low in zip(diffusion.steps, ratios, ratios[1:], strict=False)}
    assert found == pytest.approx(expected, rel=1e-3)
    assert list(found.values()) == sorted(found.values(), reverse=True)


class Disturbed:
    """A corrector that adds noise to the prediction of one step."""

    def __init__(self, index: int, noise: torch.Tensor) -> None:
        self.index, self.noise = index, noise

    def begin(self, *_: Any) -> None:
        pass

    def correct(self, step: Any, x: Any, eps: torch.Tensor, *_: Any) -> Corrected:
        return Corrected(eps + self.noise if step.index == self.index else eps)


def test_of_a_real_network(make_unet: Any) -> None:
    """Against small random errors at each step, in the mean over seeds and errors."""
    diffusion, size = sampler(make_unet()), 1e-3
    found = step_sensitivity(diffusion, samples=16)
    generator, seeds = torch.Generator().manual_seed(0), range(64)
    exact = diffusion.sample(seeds)
    for step in diffusion.steps:
        noise = size * torch.randn(exact.shape, generator=generator)
        moved = diffusion.sample(seeds, Disturbed(step.index, noise)) - exact
        assert found[step.t] == pytest.approx(float(moved.square().mean()) / size**2, rel=0.25)


def test_weights_of_a_set() -> None:
    data = CalibrationSet(torch.randn(6, 3, 8, 8), torch.tensor([901, 901, 400, 400, 3, 3]))
    weighted = data.weighted({900: 5.0, 500: 1.0, 300: 3.0, 0: 0.0})
    assert weighted.step_weights == pytest.approx({901: 3 * 5 / 6, 400: 3 * 1 / 6, 3: 0.0})
    weights = weighted.subset(torch.tensor([0, 5])).weights_at(torch.tensor([901, 3]))
    assert weights is not None and weights.tolist() == [weighted.step_weights[901], 0.0]  # type: ignore[index]
    assert data.weights_at(data.t) is None


def test_the_loss_is_weighted() -> None:
    a, b, weights = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 2.0, 1.0, 1.0])
    rows = [float(reconstruction_loss(a[i : i + 1], b[i : i + 1])) * float(weights[i]) for i in range(4)]
    assert float(reconstruction_loss(a, b, 2.0, weights.view(-1, 1, 1, 1))) == pytest.approx(sum(rows) / 4)


def test_bias_correction_follows_the_weights(make_unet: Any) -> None:
    """With all the weight on one time step, it is that of the set's inputs of this step."""
    config, unet = QuantConfig(4, 4), make_unet()
    data = inputs(unet, 16)
    network = network_of(unet)
    quantize_(network, config)
    find_ranges_(network, data, 8)
    one, weighted = (network_of(copy.deepcopy(network.module)) for _ in range(2))
    correct_biases_(one, data.subset((data.t == TIMES[1]).nonzero()[:, 0]))
    only = dataclasses.replace(data, step_weights={t: 4.0 * (t == TIMES[1]) for t in TIMES})
    correct_biases_(weighted, only)
    layers = quant_layers(weighted.module)
    for name, layer in quant_layers(one.module).items():
        torch.testing.assert_close(layers[name].bias, layer.bias, rtol=1e-4, atol=1e-6)


def test_what_needs_it(make_unet: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RecipeError, match="step_weights weighs the inputs of reconstruction and bias correction: it needs"):
        Recipe.of("qncd+", "W4A8", step_weights=True)
    unet = make_unet()
    options = {"calibration": inputs(unet, 8), "reconstruction": False}
    with pytest.raises(ValueError, match="step_weights needs a sampler: give scheduler="):
        qncd.quantize(unet, "W4A8", "qncd", step_weights=True, **options)
    report = qncd.quantize(unet, "W4A8", "qncd", step_weights=True, scheduler=DDIMScheduler(), steps=4, **options)
    weights = report.found["step_weights"]
    assert set(weights) == set(TIMES) and sum(weights.values()) == pytest.approx(4)
