"""Temporal feature maintenance: the finite set of time steps, learned rounding and a range for each step."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import calibrate_with_, quantize_diffusion_

from qncd.models.network import network_of
from qncd.ptq.checkpoint import load_quantized_, save_quantized
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.temporal import TemporalPath, reconstruct_temporal_, set_stepwise_ranges_, temporal_layers
from qncd.quant.inspection import quant_layers
from qncd.quant.stepwise import StepwiseActQuantizer
from qncd.recipe import CalibrationConfig, QuantConfig, Recipe, ReconstructionConfig, SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
TIMES = [1, 201, 401, 601, 801]


def prepared(unet: Any, act_bits: int | None = None) -> tuple[Any, Any]:
    quantize_(unet, QuantConfig(3, act_bits, weight_range="max", bias_correction=False))
    return unet, copy.deepcopy(unet)


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_the_path_is_what_the_network_computes(make_unet: Any, make_cross_unet: Any, kind: str) -> None:
    unet, _ = prepared(make_unet() if kind == "unet" else make_cross_unet())
    seen: list[torch.Tensor] = []
    block = unet.down_blocks[1].resnets[0]
    block.time_emb_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
    x, context = torch.randn(2, 3 if kind == "unet" else 4, 8, 8), torch.randn(2, 5, 12)
    unet(x, torch.tensor([201, 601]), **({} if kind == "unet" else {"encoder_hidden_states": context}))
    path = TemporalPath(network_of(unet).time_path())
    outputs = path(unet.time_proj(torch.tensor([201, 601])))
    index = list(path.projections).index(block.time_emb_proj)
    torch.testing.assert_close(outputs[index], seen[0])
    names = temporal_layers(network_of(unet))
    assert "time_embedding.linear_1" in names and sum("time_emb_proj" in name for name in names) == len(path.projections)


def test_learned_rounding_is_nearer_at_these_steps(make_unet: Any) -> None:
    unet, reference = prepared(make_unet())
    before, after = reconstruct_temporal_(network_of(unet), network_of(reference), TIMES, ReconstructionConfig(iterations=150))
    assert 0 < after < 0.7 * before
    for layer in temporal_layers(network_of(unet)).values():
        codes = layer.weight / layer.expanded_scale()
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    others = set(quant_layers(unet)) - set(temporal_layers(network_of(unet)))
    assert all(torch.equal(quant_layers(unet)[n].weight, quant_layers(reference)[n].weight) for n in others)


def test_each_step_has_its_own_range(make_unet: Any) -> None:
    unet, _ = prepared(make_unet(), act_bits=4)
    x, t = torch.randn(5, 3, 8, 8), torch.tensor(TIMES)
    set_stepwise_ranges_(network_of(unet), TIMES)
    calibrate_with_(unet, CalibrationSet(x, t))
    quantizer = unet.mid_block.resnets[0].time_emb_proj.act
    assert isinstance(quantizer, StepwiseActQuantizer) and len(quantizer.scale) == 5
    assert len(set(quantizer.scale.flatten().tolist())) > 1
    together = unet(x, t).sample
    alone = torch.cat([unet(x[i : i + 1], int(t[i])).sample for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0.2 * float(together.abs().max()))  # a lane decides ties
    scale, zero = float(quantizer.scale[2, 0]), float(quantizer.zero_point[2, 0])
    value = torch.linspace(-zero * scale, (15 - zero) * scale, 100)[None]
    quantizer.select(2)
    found = quantizer(value)
    assert len(found.unique()) == 16 and float((found - value).abs().max()) <= 0.501 * scale


def test_it_goes_to_a_checkpoint_and_back(make_unet: Any, tmp_path: Path) -> None:
    config = QuantConfig(4, 8, bias_correction=False, stepwise_embedding=True)
    diffusion = Diffusion(network_of(make_unet()), PROCESS, SamplerConfig(timesteps=5), (3, 8, 8), lane=4)
    calibration = CalibrationConfig(4, 2, 4)
    data, _ = sample_calibration(DiffusionRuns(diffusion, calibration), Recipe(correction=None, calibration=calibration))
    quantize_diffusion_(diffusion, config, data, reconstruction=ReconstructionConfig(iterations=3, inputs=8))
    images = diffusion.sample(range(4))
    save_quantized(diffusion.network, tmp_path / "q.safetensors", config, "h", {})
    again = make_unet()
    load_quantized_(network_of(again), tmp_path / "q.safetensors")
    assert torch.equal(dataclasses.replace(diffusion, network=network_of(again)).sample(range(4)), images)
    assert isinstance(again.mid_block.resnets[0].time_emb_proj.act, StepwiseActQuantizer)


def test_an_embedding_of_more_than_time_is_refused(make_unet: Any) -> None:
    with pytest.raises(ValueError, match="needs an embedding of time alone"):
        TemporalPath(network_of(make_unet(num_class_embeds=3)).time_path())
