"""Quantized convolutions and linear layers, against Q-Diffusion's QuantModule where the formulas are the same."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.granularity import PerGroup
from qncd.quant.affine import Codes, IntegerRange, fake_quantize
from qncd.quant.float8 import Float8Codes
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLayer, QuantLinear
from qncd.quant.quantizers import Stage
from qncd.quant.stepwise import StepwiseActQuantizer

A8 = IntegerRange(8, False)


def layer_config(weight_bits: int | None = 4, act: IntegerRange | None = A8, **changes: Any) -> LayerConfig:
    codes = None if weight_bits is None else IntegerRange(weight_bits, True)
    return LayerConfig(**{"weight_codes": codes, "act_codes": act, "weight_range": "max", "act_range": "max", **changes})


def wrap(layer: nn.Module, config: LayerConfig) -> QuantLayer:
    return (QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear).from_float(layer, config)  # type: ignore[arg-type]


@torch.no_grad()
def switch_over(layer: QuantLayer, *inputs: Tensor) -> QuantLayer:
    layer.act.set_stage(Stage.OBSERVE)
    for x in inputs:
        layer(x)
    layer.act.finish_observing()
    layer.quantize_weight_()
    layer.act.set_stage(Stage.QUANTIZE)
    return layer


def float_layer(weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0) -> nn.Module:
    layer: nn.Module
    if weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding)
    layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return layer.requires_grad_(False)


def small_layer(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Linear(10, 6).requires_grad_(False), torch.randn(2, 7, 10)
    return nn.Conv2d(10, 6, 3, stride=2, padding=1).requires_grad_(False), torch.randn(2, 10, 5, 5)


def assert_near(found: Tensor, expected: Tensor, step: float) -> None:
    """Within 1e-5, but for at most 0.5 % of the elements, which are a rounding tie (one `step`) off."""
    error = (found - expected).abs()
    assert (error > 1e-5).float().mean() <= 0.005, f"{(error > 1e-5).float().mean():.4f} of the elements differ"
    assert error.max() <= step


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("name", "stride", "padding"), [("conv", 1, 1), ("conv_s2", 2, 0), ("linear", 1, 0)])
def test_activations_are_quantized_as_by_the_original(golden: Any, name: str, stride: int, padding: int, bits: int) -> None:
    """The original's weights are asymmetric: its rounded weight is put in, its activations are found by observing."""
    data = golden("quant_blocks")
    key, weight = f"{name}_w{bits}a8", data[f"{name}_weight"]
    delta, zero_point = data[f"{key}_wdelta"], data[f"{key}_wzp"]
    rounded = (torch.clamp(torch.round(weight / delta) + zero_point, 0, 2**bits - 1) - zero_point) * delta
    layer = wrap(float_layer(rounded, data[f"{name}_bias"], stride, padding), layer_config(None))
    x = data[f"{name}_x"]
    torch.testing.assert_close(layer(x), data[f"{name}_w{bits}a32"], rtol=0, atol=1e-5)
    switch_over(layer, x)
    torch.testing.assert_close(layer.act.scale[0], data[f"{key}_adelta"], rtol=1e-6, atol=0)
    assert layer.act.zero_point[0] == data[f"{key}_azp"]
    assert_near(layer(x), data[key], float(layer.act.scale * rounded.abs().max()) * 1.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_split_shortcut_is_the_originals(golden: Any, bits: int) -> None:
    data = golden("quant_blocks")
    key, weight, at = f"split_w{bits}a8", data["split_weight"], int(data["split_at"])
    halves = []
    for part, half in ((weight[:, :at], 0), (weight[:, at:], 1)):
        delta, zero_point = data[f"{key}_w{half}_delta"], data[f"{key}_w{half}_zp"]
        halves.append((torch.clamp(torch.round(part / delta) + zero_point, 0, 2**bits - 1) - zero_point) * delta)
    rounded = torch.cat(halves, 1)
    segments = (at, weight.shape[1] - at)
    layer = wrap(float_layer(rounded, data["split_bias"]), layer_config(None, segments=segments))
    switch_over(layer, data["split_x"])
    for half in (0, 1):
        torch.testing.assert_close(layer.act.scale[half], data[f"{key}_a{half}_delta"], rtol=1e-6, atol=0)
        assert layer.act.zero_point[half] == data[f"{key}_a{half}_zp"]
    assert_near(layer(data["split_x"]), data[key], float(layer.act.scale.max() * rounded.abs().max()) * 1.01)


@pytest.mark.parametrize("name", ["convw", "linw"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_as_by_the_original(golden: Any, name: str, bits: int) -> None:
    data = golden("quantizers_uniform")
    weight, key = data[f"in_{name}"], f"{name}_b{bits}_sym_max_az0"
    layer = wrap(float_layer(weight, torch.zeros(len(weight))), layer_config(bits))
    layer.quantize_weight_()
    assert layer.weight_scale is not None
    torch.testing.assert_close(layer.weight_scale[:, 0], data[f"{key}_delta"].flatten(), rtol=1e-6, atol=0)
    assert ((layer.weight - data[f"{key}_deq"]).abs() > 1e-6).float().mean() <= 0.005


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_before_quantizing_it_is_the_float_layer(kind: str) -> None:
    layer, x = small_layer(kind)
    wrapped = wrap(layer, layer_config())
    assert wrapped.weight is layer.weight and wrapped.bias is layer.bias
    assert torch.equal(wrapped(x), layer(x))


@pytest.mark.parametrize("segments", [None, (7, 3)])
@pytest.mark.parametrize("weight_range", ["max", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_codes_round_trip_bit_for_bit(kind: str, bits: int, weight_range: str, segments: tuple[int, ...] | None) -> None:
    layer, _ = small_layer(kind)
    original = layer.weight.clone()
    config = layer_config(bits, weight_range=weight_range, segments=segments)
    rounded = wrap(layer, config)
    rounded.quantize_weight_()
    codes, scale = rounded.weight_codes(), rounded.weight_scale
    assert codes.dtype == torch.int8 and scale is not None and scale.shape == (6, len(segments or (1,)))
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    for channel in rounded.weight:
        for part in channel.split(segments or 10):
            assert len(part.unique()) <= 2**bits
    if weight_range == "max" and segments is None:
        step = scale.view(-1, *[1] * (original.ndim - 1))
        assert bool(((rounded.weight - original).abs() <= step / 2 * 1.0001).all())
    other = wrap(small_layer(kind)[0], config)
    other.set_weight_codes(codes, scale)
    assert torch.equal(other.weight, rounded.weight) and torch.equal(other.weight_codes(), codes)
    before = rounded.weight.clone()
    rounded.quantize_weight_()
    assert torch.equal(rounded.weight, before)


def test_split_weights_have_scales_of_their_own() -> None:
    layer, _ = small_layer("conv")
    layer.weight[:, 7:] *= 20
    original = layer.weight.clone()
    split, whole = (wrap(layer, layer_config(4, segments=s)) for s in ((7, 3), None))
    for wrapped in (split, whole):
        wrapped.quantize_weight_()
    error = [(wrapped.weight - original)[:, :7].square().mean() for wrapped in (split, whole)]
    assert error[0] < 0.02 * error[1]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_smoothing_is_exact_in_floats(kind: str) -> None:
    layer, x = small_layer(kind)
    expected = layer(x)
    wrapped = wrap(layer, layer_config())
    factors = torch.logspace(-1, 2, 10)
    wrapped.smooth_(factors)
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-5, atol=1e-5)
    wrapped.smooth_(1 / factors.sqrt())
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-5, atol=1e-5)
    assert wrapped.smoothing is not None
    torch.testing.assert_close(wrapped.smoothing.flatten(), factors.sqrt())


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_shifting_the_bias_by_the_rounding_error_leaves_no_mean_error(kind: str) -> None:
    layer, x = small_layer(kind)
    layer.bias = None
    exact = layer(x)
    wrapped = wrap(layer, layer_config(3, act_range="mse"))
    wrapped.act.set_stage(Stage.OBSERVE)
    wrapped(x)
    wrapped.act.finish_observing()
    wrapped.act.set_stage(Stage.FLOAT)
    wrapped.search_weight_range_()
    weight = wrapped.weight.clone()
    error = wrapped.rounding_error(x)
    assert torch.equal(wrapped.weight, weight) and wrapped.act.stage is Stage.FLOAT and error.shape == (6,)
    wrapped.shift_bias_(-error)
    wrapped.quantize_weight_()
    wrapped.act.set_stage(Stage.QUANTIZE)
    others = (0, 2, 3) if kind == "conv" else (0, 1)
    mean = (wrapped(x) - exact).mean(others)
    assert error.abs().max() > 0.01 and mean.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_rounding_error_is_that_of_all_inputs(kind: str) -> None:
    """Eleven inputs of unlike sizes, more than are looked at together and no multiple of that number."""
    layer, x = small_layer(kind)
    wrapped = wrap(layer, layer_config(3))
    x = torch.randn(11, *x.shape[1:], generator=torch.Generator().manual_seed(2)) * torch.arange(1, 12).view(
        -1, *[1] * (x.ndim - 1)
    )
    exact = wrapped(x)
    wrapped.act.set_stage(Stage.OBSERVE)
    wrapped(x)
    wrapped.act.finish_observing()
    wrapped.act.set_stage(Stage.FLOAT)
    wrapped.search_weight_range_()
    found = wrapped.rounding_error(x)
    wrapped.quantize_weight_()
    wrapped.act.set_stage(Stage.QUANTIZE)
    expected = (wrapped(x) - exact).double().mean((0, 2, 3) if kind == "conv" else (0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_rounding_error_of_each_input_is_that_at_its_own_step() -> None:
    layer, _ = small_layer("linear")
    config = layer_config(None)
    wrapped = wrap(layer, config)
    wrapped.act = StepwiseActQuantizer(A8, torch.arange(6))
    wrapped.act.set_qparams(torch.logspace(-3, 0, 6)[:, None], torch.full((6, 1), 128.0))
    wrapped.act.select(torch.arange(6))
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
    rounded = torch.stack([fake_quantize(row, s, torch.tensor(128.0), A8) for row, s in zip(x, wrapped.act.scale, strict=True)])
    torch.testing.assert_close(wrapped.rounding_error(x), (layer(rounded) - layer(x)).double().mean(0), rtol=1e-4, atol=1e-6)


def test_refusals() -> None:
    layer, _ = small_layer("conv")
    wrapped = wrap(layer, layer_config())
    with pytest.raises(ValueError, match=r"^the weights are not quantized yet$"):
        wrapped.weight_codes()
    with pytest.raises(ValueError, match=r"^\(3,\) smoothing factors for 10 input channels$"):
        wrapped.smooth_(torch.ones(3))
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"^a smoothing factor is not a positive finite number$"):
            wrapped.smooth_(torch.tensor([1.0] * 9 + [bad]))
    with pytest.raises(ValueError, match=r"^codes \(6, 10, 3, 3\) and scales \(6, 2\) for a weight \(6, 10, 3, 3\)$"):
        wrapped.set_weight_codes(torch.zeros(6, 10, 3, 3), torch.ones(6, 2))
    wrapped.quantize_weight_()
    with pytest.raises(ValueError, match=r"^smoothing comes before the weights are quantized$"):
        wrapped.smooth_(torch.ones(10))
    for bad in (torch.nan, torch.inf):
        layer, _ = small_layer("conv")
        layer.weight[2, 3, 1, 1] = bad
        with pytest.raises(ValueError, match=r"^a weight is NaN or infinite$"):
            wrap(layer, layer_config()).quantize_weight_()


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("segments", [None, (7, 3)])
def test_gradients_through_the_layer_are_those_of_the_straight_formula(kind: str, segments: tuple[int, ...] | None) -> None:
    """With scales that are learned, as if rounding did nothing within the range; without, rounding is flat."""
    layer, x = small_layer(kind)
    channel = 1 if kind == "conv" else 2
    if kind == "linear" and segments:
        x, channel = x[:, 0], 1  # halves are of dimension 1
    wrapped = switch_over(wrap(layer, layer_config(4, IntegerRange(4, False), segments=segments)), x)
    x = (1.5 * x).requires_grad_()  # some values are clipped
    expected = wrapped(x.detach())
    flat = wrapped(x)
    assert torch.equal(flat, expected)
    flat.sum().backward()
    assert x.grad is not None and not x.grad.any()
    x.grad = None
    wrapped.act.scale.requires_grad_(True)
    out = wrapped(x)
    assert torch.equal(out, expected)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * target).sum().backward()
    found = x.grad.clone(), wrapped.act.scale.grad.clone()
    x.grad = None
    scales = wrapped.act.scale.detach().clone().requires_grad_()
    parts = []
    for part, scale, zero in zip(x.split(segments or x.shape[channel], channel), scales, wrapped.act.zero_point, strict=True):
        steps = part / scale
        inside = (steps.round() >= -zero) & (steps.round() <= 15 - zero)
        assert 0 < float(inside.float().mean()) < 1
        straight = steps + (steps.round() - steps).detach()
        parts.append(torch.where(inside, straight, steps.detach().round().clamp(float(-zero), float(15 - zero))) * scale)
    rounded = torch.cat(parts, channel)
    plain = nn.functional.linear if kind == "linear" else layer._conv_forward
    straight_out = plain(rounded, wrapped.weight, wrapped.bias)
    torch.testing.assert_close(straight_out, expected)
    (straight_out * target).sum().backward()
    torch.testing.assert_close(found[0], x.grad)
    torch.testing.assert_close(found[1], scales.grad)


@pytest.mark.parametrize("segments", [None, (7, 3)])
def test_codes_are_kept_as_they_were_set(segments: tuple[int, ...] | None) -> None:
    """Not made from the weight again: that is what costs ties their codes."""
    wrapped = wrap(small_layer("conv")[0], layer_config(8, segments=segments))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, wrapped.weight.shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(6, len(segments or (1,)), generator=generator) + 0.01
    wrapped.set_weight_codes(codes, scale)
    assert wrapped.weight_codes() is codes and wrapped.weight_scale is scale
    wrapped.quantize_weight_()
    wrapped.search_weight_range_()
    assert wrapped.weight_codes() is codes and wrapped.rounded_weight() is wrapped.weight
    torch.testing.assert_close(wrapped.weight, codes * wrapped.expanded_scale(), rtol=0, atol=0)
    half = wrapped.bfloat16()
    assert half.weight_codes().dtype == torch.int8 and torch.equal(half.weight_codes(), codes)
    assert "codes" not in wrapped.state_dict()
    assert torch.equal(copy.deepcopy(wrapped).weight_codes(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_points", [False, True])
def test_codes_follow_a_state_dict(dtype: torch.dtype, zero_points: bool) -> None:
    source, target = (wrap(small_layer("conv")[0].to(dtype), layer_config(4, segments=(7, 3))) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for layer in (source, target):
        codes = torch.randint(-8, 8, layer.weight.shape, dtype=torch.int8, generator=generator)
        zeros = torch.randint(0, 16, (6, 2), generator=generator).float() if zero_points else None
        layer.set_weight_codes(codes, torch.rand(6, 2, generator=generator) + 0.01, zeros)
    assert not torch.equal(target.weight_codes(), source.weight_codes())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight) and target.weight.dtype == dtype
    assert target.weight_codes().dtype == torch.int8 and torch.equal(target.weight_codes(), source.weight_codes())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_groups_of_a_row_have_scales_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    source = nn.Linear(64, 6, bias=False) if kind == "linear" else nn.Conv2d(32, 6, 3, bias=False)
    weight = torch.randn_like(source.requires_grad_(False).weight).flatten(1)
    weight[0, :32] = 0  # a group of zeros
    source.weight = nn.Parameter(weight.view_as(source.weight), requires_grad=False)
    layer = wrap(source, layer_config(4, None, weight_range="mse", weight_granularity=PerGroup(32), new_bias=False))
    layer.quantize_weight_()
    groups, scale = weight.view(6, -1, 32), layer.weight_scale
    assert scale is not None and layer.scale_shape == scale.shape == groups.shape[:2]
    assert torch.equal(scale.half().float(), scale) and bool(scale.all()) and bool((scale < 0).any() and (scale > 0).any())
    rounded = layer.weight.flatten(1).view_as(groups)
    assert torch.equal(rounded, layer.codes.float().view_as(groups) * scale[..., None]) and not rounded[0, 0].any()
    widest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    assert bool((widest * scale <= 0).all())  # on the side of the code that has no counterpart
    channels = wrap(source, layer_config(4, None, weight_range="mse"))
    channels.quantize_weight_()
    assert float((rounded - groups).square().sum()) < 0.8 * float((channels.weight.flatten(1) - weight).square().sum())
    layer.shift_bias_(torch.ones(6))
    assert layer.bias is None and not layer.takes_shift


@pytest.mark.parametrize("codes", [IntegerRange(4, True), Float8Codes()], ids=["int4", "fp8"])
def test_the_last_group_of_a_segment_may_be_smaller(codes: Codes) -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(10, 3, 3).requires_grad_(False)
    whole = layer_config(None, None, weight_codes=codes, weight_granularity=PerGroup(32), segments=(6, 4))
    layer = wrap(source, whole)
    weight = source.weight.flatten(1).clone()
    layer.quantize_weight_()
    assert layer.scale_shape == (3, 4)  # 54 and 36 inputs
    for column, (start, stop) in enumerate(((0, 32), (32, 54), (54, 86), (86, 90))):
        alone = wrap(nn.Linear(stop - start, 3).requires_grad_(False), dataclasses.replace(whole, segments=None))
        alone.weight.copy_(weight[:, start:stop])
        alone.quantize_weight_()
        assert alone.weight_scale is not None and layer.weight_scale is not None
        assert torch.equal(alone.weight_scale[:, 0], layer.weight_scale[:, column])
        assert torch.equal(alone.weight, layer.weight.flatten(1)[:, start:stop])


def test_weights_in_fp8_are_numbers_of_e4m3_times_their_scales() -> None:
    torch.manual_seed(0)
    source = nn.Linear(40, 6).requires_grad_(False)
    layer = wrap(source, layer_config(None, None, weight_codes=Float8Codes()))
    weight, again = source.weight.clone(), copy.deepcopy(layer)
    layer.quantize_weight_()
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert torch.equal(layer.weight, (weight / scale).to(torch.float8_e4m3fn).float() * scale)
    assert layer.weight_codes().dtype == torch.int8
    again.set_weight_codes(layer.weight_codes(), layer.weight_scale)
    assert torch.equal(again.weight, layer.weight)
    again.load_state_dict(layer.half().state_dict())
    assert torch.equal(again.weight_codes(), layer.weight_codes())
