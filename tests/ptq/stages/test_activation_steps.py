"""Activation scales learned block by block: gradients, what it brings, and what stays."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import calibrate_with_, quantize_diffusion_
from torch import Tensor

from qncd.models.network import network_of
from qncd.ptq.checkpoint import load_quantized_, save_quantized
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages.activation_steps import learn_steps_, step_quantizers
from qncd.ptq.stages.prepare import quantize_
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import act_quantizers
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.quant.stepwise import StepwiseActQuantizer
from qncd.recipe import QuantConfig, Recipe, ReconstructionConfig, SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
FAST = ReconstructionConfig(iterations=1, batch_size=16, inputs=None, act_iterations=100)


def calibration(kind: str = "unet", count: int = 32) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3 if kind == "unet" else 4, 8, 8, generator=generator)
    given = {} if kind == "unet" else {"encoder_hidden_states": torch.randn(count, 5, 12, generator=generator)}
    return CalibrationSet(x, torch.randint(0, 1000, (count,), generator=generator), given)


def calibrated(unet: Any, data: CalibrationSet, config: QuantConfig | None = None) -> tuple[Any, Any]:
    """A network with 4-bit activations, and its full-precision self."""
    quantize_(unet, config or QuantConfig(8, 4, softmax_bits=4, bias_correction=False))
    reference = copy.deepcopy(unet)
    calibrate_with_(unet, data, 16)
    return unet, reference


def output(unet: Any, data: CalibrationSet) -> Tensor:
    return unet(data.x, data.t, **data.inputs).sample


def scales(unet: Any) -> dict[str, Tensor]:
    return {name: quantizer.scale.clone() for name, quantizer in act_quantizers(unet).items()}


@pytest.mark.parametrize("segments", [None, (3, 5)])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_gradients_are_those_of_lsq(segments: tuple[int, ...] | None, smoothed: bool) -> None:
    torch.manual_seed(0)
    quantizer = ActQuantizer(IntegerRange(4, False), "max", segments)
    count = len(segments or (8,))
    zero = torch.tensor([5.0, 3.0][:count])
    quantizer.set_qparams(torch.tensor([0.2, 0.3][:count]), zero)
    quantizer.set_stage(Stage.QUANTIZE)
    x, weight = torch.randn(4, 8, 3, 3), torch.randn(4, 8, 3, 3)
    smoothing = torch.rand(1, 8, 1, 1) + 0.5 if smoothed else None
    expected = quantizer(x, smoothing)
    quantizer.scale.requires_grad_(True)
    x.requires_grad_(True)
    found = quantizer(x, smoothing)
    assert torch.equal(found, expected), "the values are those of the quantizer"
    (found * weight).sum().backward()
    start, expected_x = 0, torch.zeros_like(x)
    for i, size in enumerate(segments or (8,)):
        part = slice(start, start + size)
        start += size
        scale, low, high = quantizer.scale[i].detach(), -float(zero[i]), 15 - float(zero[i])
        factor = smoothing[:, part] if smoothing is not None else torch.ones(1, size, 1, 1)
        steps = x[:, part].detach() / (scale * factor)
        inside = (steps.round() >= low) & (steps.round() <= high)
        slope = torch.where(inside, steps.round() - steps, steps.round().clamp(low, high))  # LSQ, eq. 3
        torch.testing.assert_close(quantizer.scale.grad[i], (slope * weight[:, part]).sum(), rtol=1e-4, atol=1e-4)
        expected_x[:, part] = weight[:, part] / factor * inside
        assert 0 < float(inside.float().mean()) < 1
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_it_lowers_the_held_out_error(make_unet: Any, make_cross_unet: Any, kind: str) -> None:
    data = calibration(kind)
    unet, reference = calibrated(make_unet() if kind == "unet" else make_cross_unet(), data)
    exact, before = output(reference, data), output(unet, data)
    old, zeros = scales(unet), {name: q.zero_point.clone() for name, q in act_quantizers(unet).items()}
    seen: list[tuple[int, int, float]] = []
    results = learn_steps_(network_of(unet), network_of(reference), data, FAST, lambda *state: seen.append(state))
    assert seen[-1] == (len(results), len(results), 0.0) and seen[0][2] > seen[-2][2] > 0
    assert all(r.after < r.before for r in results if r.kept) and sum(r.kept for r in results) > len(results) / 2
    assert sum(r.after for r in results if r.kept) < 0.95 * sum(r.before for r in results if r.kept)
    assert (output(unet, data) - exact).square().mean() < 0.95 * (before - exact).square().mean()
    new = scales(unet)
    assert set(new) == set(old) and all(bool((scale > 0).all()) for scale in new.values())
    for result in results:
        names = [f"{result.name}.{key}".rstrip(".") for key in step_quantizers(unet.get_submodule(result.name))]
        assert any(not torch.equal(new[n], old[n]) for n in names) is result.kept
    attention = [name for name in new if ".processor." in name]
    assert any(not torch.equal(new[name], old[name]) for name in attention), "q, k, v and the softmax output as well"
    assert all(torch.equal(q.zero_point, zeros[name]) for name, q in act_quantizers(unet).items())


def test_it_goes_on_after_the_last_finished_block(make_unet: Any, tmp_path: Path) -> None:
    config, data = dataclasses.replace(FAST, act_iterations=5), calibration(count=16)
    whole, reference = calibrated(make_unet(), data)
    learn_steps_(network_of(whole), network_of(reference), data, config)
    cut, reference = calibrated(make_unet(), data)

    def stop(done: int, total: int, left: float) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_steps_(network_of(cut), network_of(reference), data, config, stop, tmp_path)
    resumed, reference = calibrated(make_unet(), data)
    results = learn_steps_(network_of(resumed), network_of(reference), data, config, folder=tmp_path)
    assert len(list(tmp_path.glob("*.steps"))) - len(results) == 4
    expected = scales(whole)
    assert all(torch.equal(scale, expected[name]) for name, scale in scales(resumed).items())
    with pytest.raises(ValueError, match=r"holds a reconstruction with other settings"):
        learn_steps_(network_of(resumed), network_of(reference), data, FAST, folder=tmp_path)


def test_weights_of_a_folder_serve_with_and_without_steps(make_unet: Any, tmp_path: Path) -> None:
    """The second phase is no part of what the weights depend on."""
    data, config = calibration(count=16), dataclasses.replace(FAST, iterations=2, act_iterations=0)
    sampler = SamplerConfig(timesteps=4)
    for iterations in (0, 3):
        diffusion = Diffusion(network_of(make_unet()), PROCESS, sampler, (3, 8, 8))
        settings = dataclasses.replace(config, act_iterations=iterations)
        quantize_diffusion_(diffusion, QuantConfig(4, 4), data, None, 16, settings, tmp_path)
        assert bool(list(tmp_path.glob("*.steps"))) is (iterations > 0)


def test_the_checkpoint_keeps_the_scales(make_unet: Any, tmp_path: Path) -> None:
    data, config = calibration(count=16), QuantConfig(4, 4)
    diffusion = Diffusion(network_of(make_unet()), PROCESS, SamplerConfig(timesteps=4), (3, 8, 8))
    plain = copy.deepcopy(diffusion)
    settings = dataclasses.replace(FAST, act_iterations=20)
    quantize_diffusion_(diffusion, config, data, None, 16, settings)
    quantize_diffusion_(plain, config, data, None, 16, dataclasses.replace(settings, act_iterations=0))
    learned, ranges = scales(diffusion.network.module), scales(plain.network.module)
    assert any(not torch.equal(learned[name], ranges[name]) for name in ranges)
    save_quantized(diffusion.network, tmp_path / "q.safetensors", config, "0" * 64, {})
    again = make_unet()
    load_quantized_(network_of(again), tmp_path / "q.safetensors")
    assert all(torch.equal(scale, learned[name]) for name, scale in scales(again).items())
    assert torch.equal(output(again, data), output(diffusion.network.module, data))


def test_ranges_of_each_step_stay(make_unet: Any) -> None:
    """TFMQ's quantizers pick their range by the time step of each row; they are no part of this phase."""
    data = calibration(count=16)
    diffusion = Diffusion(network_of(make_unet()), PROCESS, SamplerConfig(timesteps=4), (3, 8, 8))
    config = QuantConfig(4, 4, stepwise_embedding=True, bias_correction=False)
    quantize_diffusion_(diffusion, config, data, None, 16, dataclasses.replace(FAST, act_iterations=20))
    stepwise = {n for n, q in act_quantizers(diffusion.network.module).items() if isinstance(q, StepwiseActQuantizer)}
    assert stepwise and not stepwise & set(step_quantizers(diffusion.network.module))
    assert torch.isfinite(output(diffusion.network.module, data)).all()


def test_a_block_that_fails_is_named(make_unet: Any) -> None:
    data = calibration(count=16)
    unet, reference = calibrated(make_unet(), data)
    reference.mid_block.resnets[0].norm1.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"^activation steps of mid_block\.resnets\.0: an activation is NaN or infinite$"):
        learn_steps_(network_of(unet), network_of(reference), data, dataclasses.replace(FAST, act_iterations=1))


def test_it_needs_calibrated_activations(make_unet: Any) -> None:
    unet = quantize_(make_unet(), QuantConfig(4, 4)).module
    with pytest.raises(ValueError, match=r"^learn_steps_ works on a model calibrated by calibrate_$"):
        learn_steps_(network_of(unet), network_of(copy.deepcopy(unet)), calibration(), FAST)
    with pytest.raises(ValueError, match=r"act_iterations"):
        Recipe(quant=QuantConfig(4, None), reconstruction=FAST)
