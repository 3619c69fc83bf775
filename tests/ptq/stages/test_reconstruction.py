"""Block-wise reconstruction: order, caches, going on after a kill, and what it brings."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.models.network import network_of
from qncd.ptq.activation_store import ActivationStore
from qncd.ptq.blocks import execution_order, multiplications, reconstruction_units
from qncd.ptq.checkpoint_schema import Rule
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.reconstruction import TimeLeft, load_block, reconstruct_, save_block
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig, ReconstructionConfig

FAST = ReconstructionConfig(iterations=60, batch_size=16, inputs=None)


def calibration(kind: str = "unet", count: int = 32) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3 if kind == "unet" else 4, 8, 8, generator=generator)
    given = {} if kind == "unet" else {"encoder_hidden_states": torch.randn(count, 5, 12, generator=generator)}
    return CalibrationSet(x, torch.randint(0, 1000, (count,), generator=generator), given)


def prepared(unet: Any) -> tuple[Any, Any]:
    quantize_(unet, QuantConfig(3, None, weight_range="max", edge_bits=3))
    return unet, copy.deepcopy(unet)


def output(unet: Any, data: CalibrationSet) -> Tensor:
    return unet(data.x, data.t, **data.inputs).sample


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_units_are_the_blocks_in_the_order_of_the_forward_pass(make_unet: Any, make_cross_unet: Any, kind: str) -> None:
    unet, _ = prepared(make_unet() if kind == "unet" else make_cross_unet())
    units = reconstruction_units(network_of(unet))
    order = execution_order(network_of(unet), calibration(kind), units)
    assert set(order) == set(units) and order[0].startswith("time_embedding") and order[-1] == "conv_out"
    assert order.index("conv_in") < order.index("down_blocks.0.resnets.0") < order.index("mid_block.resnets.0")
    assert order.index("mid_block.resnets.1") < order.index("up_blocks.0.resnets.0") < order.index("up_blocks.1.resnets.0")
    inside = {name for unit in units.values() for name, part in unet.named_modules() if part is unit}
    covered = {name for name in quant_layers(unet) if any(name == u or name.startswith(f"{u}.") for u in inside)}
    assert covered == set(quant_layers(unet)), "every layer belongs to a block"
    attention = "mid_block.attentions.0" + (".transformer_blocks.0" if kind == "cross" else "")
    assert attention in units


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_it_brings_the_output_nearer(make_unet: Any, make_cross_unet: Any, kind: str) -> None:
    data = calibration(kind)
    unet, reference = prepared(make_unet() if kind == "unet" else make_cross_unet())
    nearest = copy.deepcopy(unet)
    for layer in quant_layers(nearest).values():
        layer.quantize_weight_()
    seen: list[tuple[int, int, float]] = []
    results = reconstruct_(
        network_of(unet), network_of(reference), data, FAST, lambda done, total, left: seen.append((done, total, left))
    )
    assert seen[-1] == (len(results), len(results), 0.0)
    assert (
        all(result.after <= result.before for result in results if result.kept)
        and sum(r.kept for r in results) > len(results) / 2
    )
    exact = output(reference, data)
    errors = [float((output(model, data) - exact).square().mean()) for model in (nearest, unet)]
    assert errors[1] < 0.8 * errors[0], errors
    for layer in quant_layers(unet).values():
        codes = layer.weight / layer.expanded_scale()
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert not layer.weight.requires_grad


def test_it_goes_on_after_the_last_finished_block(make_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = dataclasses.replace(FAST, iterations=5), calibration(count=16)
    whole, reference = prepared(make_unet())
    reconstruct_(network_of(whole), network_of(reference), data, config)
    cut, reference = prepared(make_unet())

    def stop(done: int, total: int, left: float) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct_(network_of(cut), network_of(reference), data, config, stop, tmp_path / "r")
    resumed, reference = prepared(make_unet())
    results = reconstruct_(network_of(resumed), network_of(reference), data, config, folder=tmp_path / "r")
    assert len(results) == len(reconstruction_units(network_of(resumed))) - 4
    for (name, a), b in zip(quant_layers(whole).items(), quant_layers(resumed).values(), strict=True):
        assert torch.equal(a.weight, b.weight), name
    with pytest.raises(ValueError, match=r"holds a reconstruction with other settings"):
        reconstruct_(network_of(prepared(make_unet())[0]), network_of(reference), data, FAST, folder=tmp_path / "r")


def test_a_small_budget_goes_to_files_and_changes_nothing(make_unet: Any) -> None:
    config, data = dataclasses.replace(FAST, iterations=4), calibration(count=16)
    models = []
    for memory in (4.0, 0.0):
        unet, reference = prepared(make_unet())
        reconstruct_(network_of(unet), network_of(reference), data, dataclasses.replace(config, memory_gb=memory))
        models.append(quant_layers(unet))
    assert all(torch.equal(models[0][name].weight, models[1][name].weight) for name in models[0])


def test_a_block_that_fails_is_named(make_unet: Any) -> None:
    unet, reference = prepared(make_unet())
    reference.mid_block.resnets[0].norm1.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"^reconstruction of mid_block\.resnets\.0: an activation is NaN or infinite"):
        reconstruct_(network_of(unet), network_of(reference), calibration(count=8), dataclasses.replace(FAST, iterations=1))


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_store_keeps_rows(tmp_path: Path, on_disk: bool) -> None:
    store = ActivationStore(5, torch.float16, tmp_path if on_disk else None)
    values = torch.arange(10.0).view(5, 2)
    store.append(values[:2])
    store.append(values[2:])
    assert torch.equal(store[torch.tensor([4, 0])], values[[4, 0]]) and store[torch.tensor([1])].dtype == torch.float32
    assert not list(tmp_path.iterdir()), "the file has no name"
    with pytest.raises(ValueError, match=r"^6 rows for a store of 5$"):
        store.append(values[:1])
    with pytest.raises(ValueError, match=r"^an activation is NaN or infinite$"):
        ActivationStore(1).append(torch.tensor([[torch.inf]]))


def test_what_half_precision_cannot_hold_the_other_caches_do() -> None:
    large = torch.tensor([[1e6, 1.0]])
    with pytest.raises(
        ValueError, match=r"^an activation of 1e\+06 is too large for a cache in fp16 \(up to 65504\): allowed is bf16$"
    ):
        ActivationStore(1).append(large)
    for dtype in (torch.bfloat16, torch.float32):
        store = ActivationStore(1, dtype)
        store.append(large)
        torch.testing.assert_close(store[torch.tensor([0])], large, rtol=0.01, atol=0)


def test_the_time_left_goes_by_cost_not_by_count() -> None:
    shares = {"a": 1.0, "b": 2.0, "c": 8.0, "d": 1.0}
    left = TimeLeft(list(shares), shares, iterations=100, batch_size=4, inputs=10)
    before, costs = 0.0, {}
    for name, share in shares.items():
        before += share
        costs[name] = 1200 * share + 20 * before  # optimizing; two passes up to the block
    assert left.left == 0
    left.add("a", 1 + costs["a"] / 1000)  # a second each, and one for 1000 multiplications
    left.add("b", 1 + costs["b"] / 1000)
    assert left.left == pytest.approx(2 + (costs["c"] + costs["d"]) / 1000)
    left.skip("d")
    assert left.left == pytest.approx(1 + costs["c"] / 1000)
    left.add("c", 1 + costs["c"] / 1000)
    assert left.left == pytest.approx(0, abs=1e-9)


def test_the_time_left_is_never_negative() -> None:
    left = TimeLeft("abc", {"a": 1.0, "b": 2.0, "c": 80.0}, 100, 4, 10)
    left.add("a", 5.0)
    left.add("b", 1.0)  # the larger block was quicker: a slope would go below 0
    assert left.left == pytest.approx(3.0)
    left = TimeLeft("abc", {"a": 1.0, "b": 2.0, "c": 80.0}, 100, 4, 10)
    left.add("a", 1.0)
    left.add("b", 9.0)  # more than in proportion
    assert left.left > 200


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_multiplications_are_those_of_the_layers_shapes(make_unet: Any, make_cross_unet: Any, kind: str) -> None:
    unet, _ = prepared(make_unet() if kind == "unet" else make_cross_unet())
    found = multiplications(network_of(unet), calibration(kind), reconstruction_units(network_of(unet)))
    resnet = unet.down_blocks[0].resnets[0]
    convolutions = 2 * 9 * 16 * 16 * 64 + resnet.time_emb_proj.weight.numel()  # 8x8 positions; the embedding once
    assert resnet.conv_shortcut is None and found["down_blocks.0.resnets.0"] == convolutions
    if kind == "unet":
        assert found["mid_block.attentions.0"] == 4 * 32 * 32 * 16  # q, k, v, out at 4x4; no product is quantized here
    else:
        assert found["mid_block.attentions.0.transformer_blocks.0"] > 4 * 32 * 32 * 16


def test_the_cache_may_be_in_another_dtype(make_unet: Any) -> None:
    """Some activation does not fit fp16 there; bf16 and fp32 reconstruct, to nearly the same."""
    unet, reference = prepared(make_unet())
    for model in (unet, reference):
        model.conv_in.weight.mul_(1e5)
    data, config = calibration(count=16), dataclasses.replace(FAST, iterations=3)
    with pytest.raises(ValueError, match=r"^reconstruction of .*: an activation of .* is too large for a cache in fp16"):
        reconstruct_(network_of(copy.deepcopy(unet)), network_of(reference), data, config)
    for cache in ("bf16", "fp32"):
        assert reconstruct_(
            network_of(copy.deepcopy(unet)), network_of(reference), data, dataclasses.replace(config, cache=cache)
        )
    with pytest.raises(ValueError, match=r"^cache 'int8': allowed are fp16, bf16, fp32$"):
        ReconstructionConfig(cache="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv|codes": torch.full((2, 3), 8, dtype=torch.int8)}, "conv|codes: holds 8, allowed are -8 to 7"),
        ({"conv|codes": torch.zeros(2, 3)}, "conv|codes: torch.float32, expected torch.int8"),
        ({"conv|codes": torch.zeros(1, dtype=torch.int8)}, "conv|codes: shape (1,), expected (2, 3)"),
        ({"conv|scale": torch.zeros(2, 1)}, "conv|scale: holds 0, allowed are numbers above 0"),
        ({"other": torch.zeros(1)}, "holds conv|codes, conv|scale, other, expected conv|codes, conv|scale"),
    ],
)
def test_a_finished_block_is_looked_at(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    rules = {"conv|codes": Rule((2, 3), torch.int8, -8, 7), "conv|scale": Rule((2, 1), positive=True)}
    good = {"conv|codes": torch.full((2, 3), -8, dtype=torch.int8), "conv|scale": torch.ones(2, 1)}
    path = tmp_path / "a.safetensors"
    save_block(tmp_path, path.name, good)
    assert all(torch.equal(value, good[key]) for key, value in load_block(path, rules).items())
    save_block(tmp_path, path.name, good | change)
    with pytest.raises(ValueError) as caught:
        load_block(path, rules)
    assert str(caught.value) == f"{path}: not a finished block of this network: {message}: delete it"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.safetensors: not a finished block of this network: .*: delete it$"):
        load_block(path, rules)
