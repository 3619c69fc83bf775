"""Networks in half precision: quantized, calibrated and run in their own dtype, near to the same network in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_networks import CONTEXT
from torch import Tensor

from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import find_ranges_
from qncd.ptq.pipeline import calibrate_, quantize_network, sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.ranges import round_
from qncd.ptq.stages.reconstruction import reconstruct_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.recipe import CalibrationConfig, QuantConfig, Recipe, ReconstructionConfig, SamplerConfig, SmoothingConfig
from qncd.sampling.correctors.registry import corrector_of
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

HALVES = [torch.bfloat16, torch.float16]
TIMES = [3, 250, 500, 900]


def inputs(kind: str) -> CalibrationSet:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 3 if kind == "unet" else 4, 8, 8, generator=generator)
    given = {} if kind == "unet" else {CONTEXT: torch.randn(8, 5, 12, generator=generator)}
    return CalibrationSet(x, torch.tensor(TIMES * 2), given)


def run(unet: Any, data: CalibrationSet) -> Tensor:
    given = {name: value.to(unet.dtype) for name, value in data.inputs.items()}
    return unet(data.x.to(unet.dtype), data.t, **given).sample


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("unet", {}), ("cross", {}), ("unet", {"act_range": "mse"}), ("cross", {"gptq": True, "smoothing_search": True})],
)
def test_the_result_is_that_of_float32(
    make_unet: Any, make_cross_unet: Any, kind: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    make, data, config = make_unet if kind == "unet" else make_cross_unet, inputs(kind), QuantConfig(8, 8, **changes)
    outs = []
    # A float32 network with the very weights that the half-precision one has.
    for unet in (make().to(dtype).float(), make().to(dtype)):
        network = network_of(unet)
        factors = smoothing_factors(network, TIMES)
        quantize_(network, config)
        smooth_(network, factors)
        exact = run(unet, data)
        calibrate_(network, data, config, 4)
        outs += [exact, run(unet, data)]
    full, quantized, half, half_quantized = outs
    assert half.dtype == half_quantized.dtype == dtype
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert {q.scale.dtype for q in act_quantizers(unet).values()} == {torch.float32}
    for name, layer in quant_layers(unet).items():
        assert layer.weight_codes().dtype == torch.int8 and layer.weight_scale.dtype == torch.float32, name
        grid = (layer.weight_codes().float() * layer.expanded_scale()).to(dtype)
        assert torch.equal(layer.weight, grid), name
    rounding = distance(quantized, full)
    assert 0 < rounding < 0.1
    assert distance(half_quantized, quantized) < 2 * (rounding + distance(half, full))
    assert distance(half_quantized, full) < 2 * rounding + 2 * distance(half, full)


@pytest.mark.parametrize("dtype", HALVES)
def test_blocks_are_reconstructed(make_unet: Any, dtype: torch.dtype) -> None:
    data, config = inputs("unet"), QuantConfig(3, 8, weight_range="max", edge_bits=3)
    network = quantize_(make_unet().to(dtype), config)
    reference, nearest = network_of(copy.deepcopy(network.module)), network_of(copy.deepcopy(network.module))
    settings = ReconstructionConfig(iterations=40, batch_size=8, inputs=None)
    results = reconstruct_(network, reference, data, settings)
    assert any(result.kept for result in results)
    for other in (network, nearest):
        find_ranges_(other, data, 8)
        round_(other)
    exact = run(reference.module, data)
    learned, plain = (run(other.module, data) for other in (network, nearest))
    assert learned.dtype == dtype and distance(learned, exact) < distance(plain, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_network_is_loaded_in_its_own_precision(make_unet: Any, dtype: torch.dtype, tmp_path: Any) -> None:
    from qncd.ptq.checkpoint import load_quantized_, save_quantized

    data, config = inputs("unet"), QuantConfig(4, 8)
    network = quantize_(make_unet().to(dtype), config)
    calibrate_(network, data, config)
    save_quantized(network, tmp_path / "q.safetensors", config, "h", {})
    again = make_unet(seed=1).to(dtype)
    load_quantized_(network_of(again), tmp_path / "q.safetensors")
    assert again.dtype == dtype and torch.equal(run(again, data), run(network.module, data))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("segments", [None, (3, 5)])
def test_values_are_rounded_as_in_float32(dtype: torch.dtype, segments: tuple[int, ...] | None) -> None:
    """Codes of 16 bits have more digits than the dtype, so that the quotients are taken in float32."""
    from qncd.quant.affine import IntegerRange

    x = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantizer = ActQuantizer(IntegerRange(16, False), "max", segments)
    quantizer.set_stage(Stage.OBSERVE)
    quantizer(x)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    smoothing = torch.rand(1, 8, 1, 1).to(dtype) + 0.5
    for given in (None, smoothing):
        found = quantizer(x, given)
        assert found.dtype == dtype
        assert torch.equal(found, quantizer(x.float(), None if given is None else given.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_all_stages_run_and_it_is_sampled(make_cross_unet: Any, dtype: torch.dtype) -> None:
    """The time embedding's and the blocks' rounding, scales, widths and a correction, around a network in half precision."""
    config = QuantConfig(4, 6, stepwise_embedding=True, bit_allocation=True)
    network = network_of(make_cross_unet().to(dtype))
    sampler = SamplerConfig(timesteps=4)
    diffusion = Diffusion(network, Process.from_betas(linear_betas(1e-4, 0.02, 1000)), sampler, (4, 8, 8), lane=4)
    generator = torch.Generator().manual_seed(5)
    contexts, nothing = torch.randn(4, 5, 12, generator=generator), torch.randn(1, 5, 12, generator=generator)
    conditions = Conditions({CONTEXT: contexts}, {CONTEXT: nothing}, 3.0)
    exact = diffusion.sample(range(4), conditions=conditions)
    calibration = CalibrationConfig(samples=4, steps=2, batch_size=4)
    learning = ReconstructionConfig(iterations=3, batch_size=4, act_iterations=2)
    recipe = Recipe(
        quant=config,
        smoothing=SmoothingConfig(),
        reconstruction=learning,
        correction=None,
        offline="ptqd",
        calibration=calibration,
    )
    runs = DiffusionRuns(diffusion, calibration, conditions)
    data, record = sample_calibration(runs, recipe)
    outcome = quantize_network(runs, recipe, data, record)
    found = diffusion.sample(range(4), corrector_of(recipe, outcome.record), conditions=conditions)
    assert found.dtype == torch.float32 and network.dtype == dtype
    assert {parameter.dtype for parameter in network.module.parameters()} == {dtype}
    assert 0 < distance(found, exact) < 0.5
