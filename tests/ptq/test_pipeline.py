"""From seeds to images: what a quantized image may and may not depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import CONTEXT, calibrate_with_, inputs, quantize_diffusion_
from torch import Tensor

from qncd.models.network import network_of
from qncd.ptq.checkpoint import load_weights_, save_quantized
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import Job, calibrate_, quantize_network, record_before, sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.ptq.stages.bias_correction import correct_biases_
from qncd.ptq.stages.compensation import compensate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing_search import search_smoothing_
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.quant.quantizers import Stage
from qncd.quant.stepwise import StepwiseActQuantizer
from qncd.recipe import (
    CalibrationConfig,
    CorrectionConfig,
    QuantConfig,
    Recipe,
    ReconstructionConfig,
    SamplerConfig,
    SmoothingConfig,
)
from qncd.sampling.correctors.runtime import TABLE_TENSORS, NoiseTable, RuntimeNoiseCorrector
from qncd.sampling.correctors.tracking import Tracking, TrackingCorrector
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
SEEDS = range(16)


def make_diffusion(unet: Any, lane: int = 16, steps: int = 6, eta: float = 0.0) -> Diffusion:
    return Diffusion(network_of(unet), PROCESS, SamplerConfig(timesteps=steps, eta=eta), (3, 8, 8), lane)


def sampled(
    diffusion: Diffusion, config: CalibrationConfig, correction: CorrectionConfig | None, conditions: Conditions | None = None
) -> tuple[CalibrationSet, Any]:
    recipe = Recipe(correction=correction, calibration=config)
    return sample_calibration(DiffusionRuns(diffusion, config, conditions), recipe)


def noise_table(diffusion: Diffusion, config: CalibrationConfig, correction: CorrectionConfig) -> NoiseTable:
    table = record_before(DiffusionRuns(diffusion, config), Recipe(correction=correction, calibration=config))
    assert isinstance(table, NoiseTable)
    return table


@pytest.fixture(scope="module")
def prepared(make_unet: Any) -> tuple[Diffusion, CalibrationSet, NoiseTable]:
    """A W4A8 model with its calibration set and its control table."""
    diffusion = make_diffusion(make_unet(), eta=0.5)
    data, table = sampled(diffusion, CalibrationConfig(16, 3, 16), CorrectionConfig(interval=2))
    assert table is not None
    quantize_diffusion_(diffusion, QuantConfig(4, 8), data, SmoothingConfig())
    return diffusion, data, table


def in_batches(diffusion: Diffusion, size: int, corrector: RuntimeNoiseCorrector | None = None) -> Tensor:
    seeds = list(SEEDS)
    return torch.cat([diffusion.sample(seeds[i : i + size], corrector) for i in range(0, len(seeds), size)])


@pytest.mark.parametrize("corrected", [False, True])
def test_an_image_depends_on_its_seed_alone(prepared: tuple[Diffusion, CalibrationSet, NoiseTable], corrected: bool) -> None:
    """Bit for bit, for every batch size: network calls always hold the same number of inputs."""
    diffusion, _, table = prepared
    corrector = RuntimeNoiseCorrector(CorrectionConfig(interval=2, control=False, shrink=False), table) if corrected else None
    expected = in_batches(diffusion, 16, corrector)
    for size in (1, 3):
        assert torch.equal(in_batches(diffusion, size, corrector), expected), f"batches of {size}"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(diffusion.sample(order, corrector), expected[order])
    assert len({float(image.sum()) for image in expected}) == 16
    if corrected:
        assert (in_batches(diffusion, 16) - expected).abs().max() > 1e-3


def test_network_calls_hold_a_lane_of_inputs(make_unet: Any) -> None:
    unet, sizes = make_unet(), []
    diffusion = make_diffusion(unet, lane=4)
    unet.register_forward_pre_hook(
        lambda _m, _a, given: sizes.append((len(given["sample"]), given["timestep"].tolist())), with_kwargs=True
    )
    denoise = diffusion.denoiser()
    for count, calls in ((1, 1), (4, 1), (6, 2)):
        sizes.clear()
        x = torch.randn(count, 3, 8, 8)
        out = denoise(x, 321)
        assert sizes == [(4, [321] * 4)] * calls
        torch.testing.assert_close(
            out, unet(sample=x, timestep=torch.tensor([321])).sample, rtol=0, atol=1e-4 * float(out.abs().max())
        )


def test_labels_follow_their_images_into_the_lanes(make_unet: Any) -> None:
    unet = make_unet(num_class_embeds=7)
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    out = make_diffusion(unet, lane=4).denoiser(Conditions({"class_labels": labels}))(x, 50)
    torch.testing.assert_close(out, unet(x, 50, class_labels=labels).sample, rtol=0, atol=1e-4 * float(out.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_sees_both_halves(make_cross_unet: Any, scale: float) -> None:
    unet, sizes = make_cross_unet(), []
    x, cond, uncond = torch.randn(6, 4, 8, 8), torch.randn(6, 5, 12), torch.randn(1, 5, 12)
    handle = unet.register_forward_pre_hook(lambda _m, _a, given: sizes.append(len(given["sample"])), with_kwargs=True)
    diffusion = Diffusion(network_of(unet), PROCESS, SamplerConfig(timesteps=6), (4, 8, 8), lane=4)
    out = diffusion.denoiser(Conditions({CONTEXT: cond}, {CONTEXT: uncond}, scale))(x, 50)
    assert sizes == [8 if scale != 1 else 4] * 2
    handle.remove()
    e_c = unet(x, 50, encoder_hidden_states=cond).sample
    e_u = unet(x, 50, encoder_hidden_states=uncond.expand(6, -1, -1)).sample
    torch.testing.assert_close(out, e_u + scale * (e_c - e_u), rtol=0, atol=1e-4 * float(out.abs().max()))


def test_conditioned_images_depend_on_seed_and_condition_alone(make_cross_unet: Any) -> None:
    diffusion = Diffusion(
        network_of(make_cross_unet()), PROCESS, SamplerConfig("plms", timesteps=4, convention="ldm"), (4, 8, 8), lane=4
    )
    conditions = Conditions({CONTEXT: torch.randn(8, 5, 12)}, {CONTEXT: torch.randn(1, 5, 12)}, 3.0)
    data, table = sampled(diffusion, CalibrationConfig(8, 2, 4), CorrectionConfig(interval=2), conditions)
    assert data.uncond is not None and len(data.uncond[CONTEXT]) == 1 and len(data.inputs[CONTEXT]) == 8
    quantize_diffusion_(diffusion, QuantConfig(8, 8), data, SmoothingConfig())
    corrector = RuntimeNoiseCorrector(CorrectionConfig(interval=2), table)
    expected = diffusion.sample(range(8), corrector, conditions=conditions)
    single = [diffusion.sample([i], corrector, conditions=conditions[i : i + 1]) for i in range(8)]
    assert torch.equal(torch.cat(single), expected)
    other = diffusion.sample([0], corrector, conditions=conditions[1:2])
    assert (other - expected[:1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"^8 conditions for 3 seeds$"):
        diffusion.sample(range(3), conditions=conditions)
    with pytest.raises(ValueError, match=r"^8 conditions for 6 calibration trajectories$"):
        sampled(diffusion, CalibrationConfig(6, 2, 4), None, conditions)


@pytest.mark.parametrize(
    ("uncond", "scale", "message"),
    [
        (None, 2.0, "guidance scale 2 needs the unconditional context; allowed without it is 1"),
        (torch.zeros(2, 5, 12), 2.0, "uncond encoder_hidden_states of shape (2, 5, 12): expected (1, 5, 12)"),
    ],
)
def test_conditions_have_to_fit(uncond: Tensor | None, scale: float, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Conditions({CONTEXT: torch.zeros(3, 5, 12)}, None if uncond is None else {CONTEXT: uncond}, scale)
    assert str(caught.value) == message


def test_wrap_sees_every_call(make_unet: Any) -> None:
    calls: list[int] = []

    def wrap(denoise: Any) -> Any:
        return lambda x, t: (calls.append(t), denoise(x, t))[1]

    diffusion = make_diffusion(make_unet(), lane=2)
    assert torch.equal(diffusion.sample([0, 1], wrap=wrap), diffusion.sample([0, 1]))
    assert calls == [step.t for step in diffusion.steps]


def psnr(found: Tensor, expected: Tensor) -> float:
    spread, error = float(expected.max() - expected.min()), float((found - expected).square().mean())
    return 10 * math.log10(spread**2 / error) if error else math.inf


@pytest.mark.parametrize("statistics", ["sample", "channel", "batch"])
def test_the_full_precision_model_is_hardly_corrected(make_unet: Any, statistics: str) -> None:
    """With control and shrinking, an estimate without quantization noise is nearly nothing."""
    correction = CorrectionConfig(interval=2, statistics=statistics)
    diffusion = make_diffusion(make_unet(), steps=10)
    table = noise_table(diffusion, CalibrationConfig(48, 1, 16), correction)
    plain = diffusion.sample(SEEDS)
    corrected = diffusion.sample(SEEDS, RuntimeNoiseCorrector(correction, table))
    bare, controlled = (
        diffusion.sample(SEEDS, RuntimeNoiseCorrector(replace(correction, control=control, shrink=False), table))
        for control in (False, True)
    )
    print(
        f"{statistics}: {psnr(corrected, plain):.1f} dB, without shrinking {psnr(controlled, plain):.1f} dB, "
        f"without control and shrinking {psnr(bare, plain):.1f} dB"
    )
    assert psnr(corrected, plain) > 35
    assert psnr(corrected, plain) > psnr(bare, plain) + 3
    # Shrinking takes these estimates to nothing, so that the control's own part only shows without it.
    assert psnr(controlled, plain) > psnr(bare, plain) + 3


def test_the_pipeline_smooths_and_calibrates(prepared: tuple[Diffusion, CalibrationSet, NoiseTable]) -> None:
    diffusion, data, table = prepared
    assert len(data) == 48 and table.indices == (0, 2, 4, 6)
    assert all(q.stage is Stage.QUANTIZE for q in act_quantizers(diffusion.network.module).values())
    smoothed = {name for name, layer in quant_layers(diffusion.network.module).items() if layer.smoothing is not None}
    assert smoothed and all(name.endswith(".conv2") for name in smoothed)
    assert all(layer.weight_scale is not None for layer in quant_layers(diffusion.network.module).values())


def test_quantized_images_are_near_the_full_precision_ones(make_unet: Any) -> None:
    full = make_diffusion(make_unet())
    data, _ = sampled(full, CalibrationConfig(16, 3, 16), None)
    expected = full.sample(SEEDS)

    def quality(config: QuantConfig) -> float:
        diffusion = make_diffusion(make_unet())
        quantize_diffusion_(diffusion, config, data, SmoothingConfig())
        return psnr(diffusion.sample(SEEDS), expected)

    eight, four, activations = (quality(QuantConfig(*bits)) for bits in ((8, None), (4, None), (8, 8)))
    print(f"W8 {eight:.1f} dB, W4 {four:.1f} dB, W8A8 {activations:.1f} dB")
    # An untrained network's samples grow a hundredfold, and one input range has to hold them all: hence the 25 dB.
    assert eight > 55 and four < eight - 10 and 25 < activations < eight - 10


def test_recording_the_table_alone_gives_the_same_table(make_unet: Any) -> None:
    diffusion, calibration = make_diffusion(make_unet(), lane=4), CalibrationConfig(5, 2, 3)
    _, beside = sampled(diffusion, calibration, CorrectionConfig(interval=2))
    alone = noise_table(diffusion, calibration, CorrectionConfig(interval=2))
    assert beside is not None and alone.indices == beside.indices
    assert (alone.images, alone.target) == (beside.images, beside.target) == (5, "paper")
    for name in TABLE_TENSORS:
        assert torch.equal(getattr(alone, name), getattr(beside, name)), name


def test_a_table_of_too_few_images_is_refused_before_sampling(make_unet: Any) -> None:
    diffusion, calibration, correction = make_diffusion(make_unet()), CalibrationConfig(3, 2, 3), CorrectionConfig()
    diffusion.network.module.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    for make in (sampled, noise_table):
        with pytest.raises(ValueError, match=r"^the full-precision noise table needs 4 images or more, not 3$"):
            make(diffusion, calibration, correction)


def test_a_set_that_does_not_fit_leaves_the_model_as_it_was(make_unet: Any) -> None:
    diffusion = make_diffusion(make_unet())
    wrong = CalibrationSet(torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^the calibration set holds inputs of shape \(4, 8, 8\), the model takes \(3, 8, 8\)$"):
        quantize_diffusion_(diffusion, QuantConfig(4, 8), wrong, None)
    assert not quant_layers(diffusion.network.module)


def test_tracking_filters_are_fitted_to_runs_of_the_same_seeds(make_unet: Any) -> None:
    """Of a network that predicts 0.9 times as much as it should: the filters put it right, on twice the calibration's images."""
    reference = make_diffusion(make_unet(), steps=4)
    weaker = make_unet()
    weaker.register_forward_hook(lambda _m, _a, out: type(out)(sample=0.9 * out.sample))
    rough = make_diffusion(weaker, steps=4)
    done: dict[str, list[tuple[int, ...]]] = {}

    @contextmanager
    def monitor(title: str, unit: str) -> Iterator[Any]:
        yield lambda *counts: done.setdefault(title, []).append(counts)

    runs, recipe = (
        DiffusionRuns(reference, CalibrationConfig(8, 3, 16), monitor=monitor),
        Recipe(correction=None, offline="tracking"),
    )
    seen = Tracking().before(runs, recipe)
    runs.diffusion = rough
    filters = Tracking().fit(runs, recipe, seen)
    assert filters.images == 16 and filters.kernels.shape == (4, 3, 6, 3, 3)
    steps = [(count, 4) for count in (1, 2, 3, 4)]
    assert done == {"full-precision trajectories": [(16, 16)], "quantized trajectories": steps}
    expected = reference.sample([1, 2, 3])
    plain, tracked = ((rough.sample([1, 2, 3], c) - expected).square().mean() for c in (None, TrackingCorrector(filters)))
    assert tracked < 0.1 * plain


@pytest.mark.parametrize(
    ("settings", "correct"),
    [
        ({"bias_correction": False}, None),
        ({}, correct_biases_),
        ({"gptq": True}, compensate_),
        ({"gptq": True, "smoothing_search": True}, compensate_),
    ],
)
def test_calibrate_does_what_the_configuration_asks_for(make_unet: Any, settings: dict[str, Any], correct: Any) -> None:
    """By hand, stage by stage, it is the same to the last bit."""
    config, data = QuantConfig(4, 6, **settings), inputs(make_unet())
    network, by_hand = (quantize_(make_unet(), config) for _ in range(2))
    calibrate_(network.module, data, config, 8)
    if config.smoothing_search:
        search_smoothing_(by_hand, data, 8)
    calibrate_with_(by_hand, data, 8, correct)
    state, expected = network.module.state_dict(), by_hand.module.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert all(layer.weight_codes().dtype == torch.int8 for layer in quant_layers(network.module).values())


@pytest.mark.parametrize("name", ["bit_allocation", "stepwise_activations", "stepwise_embedding"])
def test_calibrate_refuses_what_needs_a_sampler(make_unet: Any, name: str) -> None:
    config = QuantConfig(4, 6, **{name: True})
    with pytest.raises(ValueError, match=rf"^{name} needs the sampler's time steps: "):
        calibrate_(quantize_(make_unet(), config), inputs(make_unet()), config)


def test_weights_of_a_checkpoint_exclude_reconstruction(make_unet: Any) -> None:
    diffusion = make_diffusion(make_unet())
    recipe = Recipe(quant=QuantConfig(4, 8), smoothing=None, reconstruction=ReconstructionConfig(), correction=None)
    runs = DiffusionRuns(diffusion, recipe.calibration)
    job = Job(weights=lambda network: pytest.fail("they were asked for"))
    with pytest.raises(ValueError, match=r"^weights of a checkpoint are taken as they are: no reconstruction with them$"):
        quantize_network(runs, recipe, inputs(make_unet()), job=job)


def test_weights_of_a_checkpoint_are_calibrated_anew(make_unet: Any, tmp_path: Path) -> None:
    """Their weights, biases and smoothing stay; the activations get ranges, at other widths than in the file."""
    source, target = make_diffusion(make_unet()), make_diffusion(make_unet(seed=1))
    data, path = inputs(make_unet()), tmp_path / "q.safetensors"
    quantize_diffusion_(source, QuantConfig(4, 8), data, SmoothingConfig())
    save_quantized(source.network, path, QuantConfig(4, 8), "h", {})
    config = QuantConfig(4, 6, stepwise_activations=True)
    recipe = Recipe(quant=config, smoothing=SmoothingConfig(), correction=None)
    job = Job(weights=lambda network: load_weights_(network, path, config))
    quantize_network(DiffusionRuns(target, recipe.calibration), recipe, data, job=job)
    layers = quant_layers(source.network.module)
    for name, layer in quant_layers(target.network.module).items():
        assert torch.equal(layer.weight, layers[name].weight) and torch.equal(layer.bias, layers[name].bias), name
        assert torch.equal(layer.weight_codes(), layers[name].weight_codes()) and isinstance(layer.act, StepwiseActQuantizer)
        assert (layer.smoothing is None) == (layers[name].smoothing is None)
        assert layer.act.codes.bits == (8 if name in ("conv_in", "conv_out") else 6)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_each_image_may_have_a_negative_condition_of_its_own(make_cross_unet: Any, scale: float) -> None:
    unet = make_cross_unet()
    x, cond, uncond = torch.randn(6, 4, 8, 8), torch.randn(6, 5, 12), torch.randn(6, 5, 12)
    diffusion = Diffusion(network_of(unet), PROCESS, SamplerConfig(timesteps=6), (4, 8, 8), lane=4)
    out = diffusion.denoiser(Conditions({CONTEXT: cond}, {CONTEXT: uncond}, scale))(x, 50)
    e_c, e_u = (unet(x, 50, encoder_hidden_states=context).sample for context in (cond, uncond))
    torch.testing.assert_close(out, e_u + scale * (e_c - e_u), rtol=0, atol=1e-4 * float(out.abs().max()))
