"""Smoothing, rotation and a low-rank branch: in floating point a layer stays what it is, in any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.quant.affine import IntegerRange
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLayer, QuantLinear
from qncd.quant.quantizers import Stage

SEEDED = torch.Generator().manual_seed(7)
FACTORS = torch.rand(24, generator=SEEDED) + 0.5


def made(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[QuantLayer, nn.Module, Tensor]:
    """A prepared layer, the float layer that it comes from, and an input."""
    torch.manual_seed(1)
    config = LayerConfig(IntegerRange(4, True), IntegerRange(8, False), "max", "max", **changes)
    if kind == "linear":
        linear = nn.Linear(24, 6).requires_grad_(False).to(dtype)
        return QuantLinear.from_float(linear, config), linear, torch.randn(2, 5, 24).to(dtype)
    conv = nn.Conv2d(24, 6, 3, stride=2, padding=1).requires_grad_(False).to(dtype)
    return QuantConv2d.from_float(conv, config), conv, torch.randn(2, 24, 5, 5).to(dtype)


def branch(layer: QuantLayer, rank: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    down = torch.randn(*layer.weight.shape[1:], rank, generator=generator).movedim(-1, 0)  # as a decomposition gives it
    return tuple(part.to(layer.branch_dtype) for part in (down, torch.randn(6, rank, generator=generator)))  # type: ignore[return-value]


STEPS = {
    "smooth": lambda layer: layer.smooth_(FACTORS),
    "rotate": lambda layer: layer.rotate_(8),
    "split": lambda layer: layer.split_off_(*branch(layer)),
}


@pytest.mark.parametrize("order", itertools.permutations(STEPS), ids="-".join)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_in_floats_nothing_changes(kind: str, order: tuple[str, ...]) -> None:
    layer, source, x = made(kind)
    original = source.weight.clone()
    for step in order:
        STEPS[step](layer)
        torch.testing.assert_close(layer(x), source(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(source.weight, original)
    assert all(part.is_contiguous() for part in (layer.weight, layer.down, layer.up))  # type: ignore[union-attr]
    assert layer.branch_size == 2 * (original[0].numel() + 6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_only_what_the_branch_leaves_is_rounded(kind: str) -> None:
    """By hand: the input smoothed and rotated is on the quantizer's grid, the branch takes it as it comes."""
    layer, source, x = made(kind)
    for step in STEPS.values():
        step(layer)
    seen: list[Tensor] = []
    layer.act.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    layer.act.set_stage(Stage.OBSERVE)
    layer(x)
    layer.act.finish_observing()
    layer.quantize_weight_()
    layer.act.set_stage(Stage.QUANTIZE)
    found = layer(x)
    down, up = (part.float() for part in branch(layer))
    rounded = layer.act(seen[-1])
    assert len(rounded.unique()) > 100 and not torch.equal(rounded, seen[-1])
    if kind == "linear":
        expected = nn.functional.linear(rounded, layer.weight, source.bias) + x @ down.T @ up.T
    else:
        whole = (up @ down.flatten(1)).view(layer.weight.shape)
        convolve = nn.functional.conv2d
        expected = convolve(rounded, layer.weight, source.bias, 2, 1) + convolve(x, whole, None, 2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_halves_of_a_concatenation_are_rotated_apart() -> None:
    layer, source, x = made("conv", segments=(16, 8))
    layer.rotate_(8)
    x[:, 16:] = 0
    assert not layer.operand(x)[:, 16:].any()
    torch.testing.assert_close(layer(x), source(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="rotations of 16 channels: allowed are powers of two that divide 16 and 8"):
        made("conv", segments=(16, 8))[0].rotate_(16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, source, x = made("linear", dtype)
    for step in STEPS.values():
        step(layer)
    assert layer.branch_dtype == dtype and {layer.weight.dtype, layer.down.dtype, layer.up.dtype} == {dtype}  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x), source(x), rtol=0.05, atol=0.1)


def test_what_is_refused() -> None:
    layer, _, _ = made("linear")
    down, up = branch(layer)
    for parts, message in (
        ((down[:, :20], up), r"a branch of \(2, 20\) and \(6, 2\) for a weight \(6, 24\)"),
        ((down, up[:, :1]), r"a branch of \(2, 24\) and \(6, 1\) for a weight \(6, 24\)"),
        ((down * torch.inf, up), "a low-rank branch holds NaN or infinity in 16 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.split_off_(*parts)
    layer.rotate_(8)
    layer.split_off_(down, up)
    with pytest.raises(ValueError, match="the layer is rotated already"):
        layer.rotate_(8)
    with pytest.raises(ValueError, match="the layer has a low-rank branch already"):
        layer.split_off_(down, up)
    rounded, _, _ = made("linear")
    rounded.quantize_weight_()
    for name, what in (("smooth", "smoothing"), ("rotate", "rotation"), ("split", "a low-rank branch")):
        with pytest.raises(ValueError, match=f"{what} comes before the weights are quantized"):
            STEPS[name](rounded)
