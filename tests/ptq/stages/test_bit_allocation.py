"""Widths of their own: what rounding does to the sample is what the back-propagation says, and the bits go where it is most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import CONTEXT, quantize_diffusion_
from torch import Tensor

from qncd.models.network import network_of
from qncd.ptq.checkpoint import load_quantized_, peek_quantized, save_quantized
from qncd.ptq.context import copied
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import hooked
from qncd.ptq.stages import bit_allocation
from qncd.ptq.stages.bit_allocation import (
    SEED_BASE,
    allocate_bits_,
    best_widths,
    free_quantizers,
    sample_errors,
    shares_of_loss,
)
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.quant.inspection import act_quantizers, quant_layers, set_act_bits_
from qncd.quant.quantizers import ActQuantizer
from qncd.recipe import QuantConfig, SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
CONFIG = QuantConfig(8, 6, stepwise_activations=True, bit_allocation=True)


def subject(kind: str, make_unet: Any, make_cross_unet: Any, sampler: str = "generalized") -> tuple[Diffusion, Conditions | None]:
    guided = kind == "cross_unet"
    unet = make_cross_unet() if guided else make_unet()
    diffusion = Diffusion(network_of(unet), PROCESS, SamplerConfig(sampler, timesteps=4), (4 if guided else 3, 8, 8), lane=4)
    generator = torch.Generator().manual_seed(5)
    contexts = torch.randn(7, 5, 12, generator=generator)
    return diffusion, Conditions({CONTEXT: contexts[:6]}, {CONTEXT: contexts[6:]}, 3.0) if guided else None


def calibration(diffusion: Diffusion, conditions: Conditions | None) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, *diffusion.shape, generator=generator)
    times = torch.tensor([step.t for step in diffusion.steps]).repeat(6)
    if conditions is None or conditions.uncond is None:
        return CalibrationSet(x, times)
    return CalibrationSet(x, times, conditions.inputs, conditions.uncond)


def prepared(diffusion: Diffusion, config: QuantConfig = CONFIG) -> Diffusion:
    quantize_(diffusion.network, config)
    set_all_stepwise_(diffusion.network, diffusion.times)
    return diffusion


class Louder(ActQuantizer):
    """An error whose effect is of first order: rounding draws other errors once the sample has moved by a step of the grid."""

    def __init__(self, factor: float) -> None:
        super().__init__(None, "max")
        self.factor = factor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("kind", ["unet", "cross_unet"])
@pytest.mark.parametrize("sampler", ["generalized", "plms", "dpm_solver"])
def test_errors_are_those_of_the_sample(kind: str, sampler: str, make_unet: Any, make_cross_unet: Any) -> None:
    """v . (x_0 with a small error at one activation - x_0), by sampling twice; through all steps, with guidance."""
    diffusion, conditions = subject(kind, make_unet, make_cross_unet, sampler)
    unet = prepared(diffusion).network.module
    quantizers = act_quantizers(unet)
    attention = "attentions.0.transformer_blocks.0.attn2" if kind == "cross_unet" else "attentions.0"
    names = ["down_blocks.0.resnets.0.conv2.act", "up_blocks.1.resnets.0.conv_shortcut.act", "time_embedding.linear_2.act"]
    names += [f"up_blocks.0.{attention}.{name}" for name in ("to_k.act", "processor.q", "processor.v")]
    trials = {name: {6: Louder(1 + 2e-3), 8: Louder(1 - 1e-3)} for name in names}
    found, _ = sample_errors(diffusion, trials, conditions, 4, samples=4, probes=1)
    signs = torch.randint(0, 2, (4, *diffusion.shape), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    part = conditions[[0, 1, 2, 3]] if conditions else None

    def run() -> Tensor:
        return diffusion.sample(range(SEED_BASE, SEED_BASE + 4), conditions=part)

    exact = run()
    for name in names:
        with hooked([quantizers[name].register_forward_hook(lambda _, __, out: out * (1 + 1e-2))]):
            expected = ((run() - exact) * signs).flatten(1).sum(1).double() / 10
        assert (found[name][8] + expected).norm() < 0.05 * expected.norm(), name
        torch.testing.assert_close(found[name][6], -2 * found[name][8], rtol=1e-2, atol=1e-6)


def test_batches_and_shared_inputs(make_unet: Any, make_cross_unet: Any) -> None:
    """The same in batches of any size; layers that share an input have errors of their own."""
    diffusion, conditions = subject("cross_unet", make_unet, make_cross_unet)
    trials = bit_allocation._trials(prepared(diffusion).network, CONFIG, calibration(diffusion, conditions), [6], 8)
    one, counts = sample_errors(diffusion, trials, conditions, 4, samples=4, probes=1)
    dones: list[tuple[int, int]] = []
    several, again = sample_errors(diffusion, trials, conditions, 3, 4, 1, lambda *done: dones.append(done))
    assert counts == again and dones == [(3, 4), (4, 4)]
    size = torch.stack([by_width[6] for by_width in one.values()]).norm()
    for name, by_width in one.items():
        # The same random signs are drawn in another order of calls, but one after another all the same.
        assert (by_width[6] - several[name][6]).norm() < 1e-3 * size, name
    names = [f"up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{operand}.act" for operand in "qkv"]
    for first, second in itertools.combinations(names, 2):
        assert not torch.allclose(one[first][6], one[second][6])


def test_operands_with_bits_of_their_own_are_left_alone(make_unet: Any, make_cross_unet: Any) -> None:
    diffusion, _ = subject("cross_unet", make_unet, make_cross_unet)
    network, apart = prepared(diffusion).network, dataclasses.replace(CONFIG, attention_bits=8)
    left = set(free_quantizers(network, CONFIG)) - set(free_quantizers(network, apart))
    assert left and {name.rpartition(".")[2] for name in left} == {"q", "k", "v"}


def test_multiplications(make_unet: Any, make_cross_unet: Any) -> None:
    diffusion, conditions = subject("cross_unet", make_unet, make_cross_unet)
    trials = bit_allocation._trials(prepared(diffusion).network, CONFIG, calibration(diffusion, conditions), [6], 8)
    _, counts = sample_errors(diffusion, trials, conditions, 4, samples=1, probes=1)
    assert set(counts) == set(trials) == set(free_quantizers(diffusion.network, CONFIG))
    assert counts["down_blocks.0.resnets.0.conv2.act"] == 16 * 8 * 8 * 16 * 9
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert counts[f"{block}.attn2.to_k.act"] == 5 * 12 * 32  # contexts of 5 tokens
    for name, keys in (("attn1", 4 * 4), ("attn2", 5)):
        assert {counts[f"{block}.{name}.processor.{operand}"] for operand in "qkv"} == {4 * 4 * keys * 32}


@pytest.mark.parametrize("act_bits", [4, 6])
@pytest.mark.parametrize("kind", ["unet", "cross_unet"])
def test_the_mean_is_kept(kind: str, act_bits: int, make_unet: Any, make_cross_unet: Any) -> None:
    diffusion, conditions = subject(kind, make_unet, make_cross_unet)
    config, data = dataclasses.replace(CONFIG, act_bits=act_bits), calibration(diffusion, conditions)
    prepared(diffusion, config)
    run = lambda: diffusion.sample([1, 2], conditions=conditions[:2] if conditions else None)  # noqa: E731
    before, twin = run(), copied(diffusion.network)
    bits = allocate_bits_(diffusion, config, data, conditions, 4)
    assert torch.equal(run(), before)  # nothing is quantized yet
    assert not any(q.observers or q._forward_hooks for q in act_quantizers(diffusion.network.module).values())
    trials = bit_allocation._trials(twin, config, data, [act_bits], 8)
    _, counts = sample_errors(dataclasses.replace(diffusion, network=twin), trials, conditions, 4, samples=1, probes=1)
    mean = sum(bits[name] * counts[name] for name in bits) / sum(counts.values())
    assert act_bits - 0.5 < mean <= act_bits
    assert len(set(bits.values())) > 2 and set(bits.values()) <= set(range(act_bits - 2, 9))
    widths = {
        name: quantizer.codes.bits for name, quantizer in act_quantizers(diffusion.network.module).items() if quantizer.codes
    }
    assert {name: width for name, width in widths.items() if name in bits} == bits
    others = {name: width for name, width in widths.items() if name not in bits}
    embedding = {name: width for name, width in others.items() if "time_emb" in name}  # whose ranges are known
    assert set(embedding.values()) == {act_bits} and {"conv_in.act", "conv_out.act"} < set(others)
    rest = {name: width for name, width in others.items() if name not in embedding}
    assert set(rest.values()) == {8} and all(name.endswith(("softmax", "conv_in.act", "conv_out.act")) for name in rest)


def test_gradients_of_parameters_are_left_alone(make_unet: Any, make_cross_unet: Any) -> None:
    diffusion, _ = subject("unet", make_unet, make_cross_unet)
    trials = bit_allocation._trials(prepared(diffusion).network, CONFIG, calibration(diffusion, None), [6], 8)
    learning = diffusion.network.module.conv_norm_out.weight.requires_grad_(True)
    sample_errors(diffusion, trials, None, 4, samples=1, probes=1)
    assert learning.requires_grad and learning.grad is None
    assert sum(p.requires_grad for p in diffusion.network.module.parameters()) == 1


def test_the_least_error_for_the_bits() -> None:
    """Against all combinations; a quantizer without errors stays the narrowest."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scales, costs = torch.rand(4, generator=generator).pow(4).tolist(), [1, 3, 1, 2]
        errors = {f"q{i}": {b: scale * 4.0**-b for b in range(4, 9)} for i, scale in enumerate(scales)}
        cost = {f"q{i}": c for i, c in enumerate(costs)}
        chosen = best_widths(errors, cost, 6)

        def total(widths: Any, errors: Any = errors) -> float:
            return sum(errors[f"q{i}"][width] for i, width in enumerate(widths))

        budget = 6 * sum(costs)
        allowed = [w for w in itertools.product(range(4, 9), repeat=4) if sum(map(lambda a, b: a * b, w, costs)) <= budget]
        assert sum(cost[name] * width for name, width in chosen.items()) <= budget
        least, uniform = min(map(total, allowed)), total([6] * 4)
        got = total([chosen[f"q{i}"] for i in range(4)])
        assert got <= uniform and got <= 2 * least  # whole bits of few quantizers: the last step may not fit
    assert best_widths({"a": {4: 0.0, 6: 0.0, 8: 0.0}, "b": {4: 1.0, 6: 0.1, 8: 0.01}}, {"a": 1, "b": 1}, 6) == {"a": 4, "b": 8}
    # An error that rises with the width is noise: a wider one beyond it still counts.
    assert best_widths({"a": {4: 1.0, 6: 1.1, 8: 0.1}, "b": {4: 0.0, 6: 0.0, 8: 0.0}}, {"a": 1, "b": 1}, 6)["a"] == 8


def test_no_sample_decides_for_all() -> None:
    """The second sample loses 20 times as much as the first, and yet counts as much: they lose 4 + 1 and 36 + 64."""
    errors = {
        "a": {4: torch.tensor([4.0, 60.0]), 6: torch.tensor([2.0, 6.0])},
        "b": {4: torch.tensor([3.0, 40.0]), 6: torch.tensor([-1.0, 8.0])},
    }
    shares = shares_of_loss(errors, 6)
    assert shares["a"] == {4: pytest.approx((16 / 5 + 36) / 2), 6: pytest.approx((4 / 5 + 36 / 100) / 2)}
    assert shares["b"] == {4: pytest.approx((9 / 5 + 16) / 2), 6: pytest.approx((1 / 5 + 64 / 100) / 2)}
    nothing = shares_of_loss({"a": {4: torch.zeros(2), 6: torch.zeros(2)}}, 6)
    assert nothing == {"a": {4: 0.0, 6: 0.0}}


def test_a_checkpoint_keeps_the_widths(make_unet: Any, make_cross_unet: Any, tmp_path: Path) -> None:
    diffusion, _ = subject("unet", make_unet, make_cross_unet)
    base, data = copied(diffusion.network), calibration(diffusion, None)
    done: list[tuple[int, ...]] = []

    @contextmanager
    def monitor(title: str, unit: str) -> Iterator[Any]:
        yield lambda *counts: done.append(counts) if title == "allocating bits" else None

    quantize_diffusion_(diffusion, CONFIG, data, None, 4, monitor=monitor)
    assert done[-1] == (12, 12)  # as many as the set has trajectories, twice
    save_quantized(diffusion.network, tmp_path / "q.safetensors", CONFIG, "base", {})
    info = peek_quantized(tmp_path / "q.safetensors")
    assert info.act_bits and len(set(info.act_bits.values())) > 2
    again = dataclasses.replace(diffusion, network=base)
    load_quantized_(base, tmp_path / "q.safetensors", "base")
    assert torch.equal(again.sample([1, 2]), diffusion.sample([1, 2]))


def test_bad_values(make_unet: Any) -> None:
    for act_bits in (8, None):
        with pytest.raises(ValueError, match=f"more than act_bits {act_bits}: allowed with it are 2 to 7"):
            QuantConfig(4, act_bits, bit_allocation=True)
    unet = quantize_(make_unet(), QuantConfig(8, 6)).module
    with pytest.raises(ValueError, match=r"nowhere: no activation quantizer"):
        set_act_bits_(unet, {"nowhere": 4})
    with pytest.raises(ValueError, match="bits 1: allowed are 2 to 16"):
        set_act_bits_(unet, {"conv_in.act": 1})
    assert quant_layers(unet)["conv_in"].act.codes.bits == 8
