"""Codes, scales and range search, against Q-Diffusion's quantizers where the formulas are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.quant.affine import (
    SEARCH_NORM,
    IntegerRange,
    affine_qparams,
    fake_quantize,
    quantize,
    search_qparams,
    search_weight_scale,
    shared_zero_qparams,
    symmetric_scale,
)

ZERO = torch.tensor(0.0)


def assert_same_grid(found: Tensor, expected: Tensor, x: Tensor, scale: Tensor) -> None:
    """Equal to 1e-6 except where x/scale is a rounding tie, where one step of difference is allowed."""
    tie = ((x / scale).frac().abs() - 0.5).abs() < 1e-4
    error = (found - expected).abs()
    assert bool((error[~tie] <= 1e-6 * (1 + expected.abs()[~tie])).all())
    assert bool((error <= scale.expand_as(error) * 1.001).all())


@pytest.mark.parametrize(
    ("name", "bits"),
    [("convw", 4), ("convw", 6), ("convw", 8), ("linw", 4), ("linw", 8), ("conv1dw", 4), ("conv1dw", 8)],
)
def test_channelwise_symmetric_max_is_the_original(golden: Any, name: str, bits: int) -> None:
    data = golden("quantizers_uniform")
    key = f"{name}_b{bits}_sym_max_az0"
    weight, codes = data[f"in_{name}"], IntegerRange(bits, True)
    scale = symmetric_scale(weight.flatten(1).abs().amax(1), codes).view_as(data[f"{key}_delta"])
    torch.testing.assert_close(scale, data[f"{key}_delta"], rtol=1e-6, atol=0)
    assert_same_grid(fake_quantize(weight, scale, ZERO, codes), data[f"{key}_deq"], weight, scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["asym", "sym"])
@pytest.mark.parametrize("name", ["gauss", "heavy", "silu"])
def test_max_ranges_are_the_originals(golden: Any, name: str, kind: str, bits: int) -> None:
    data = golden("quantizers_uniform")
    x, key, codes = data[f"in_{name}"], f"{name}_b{bits}_{kind}_max_az0", IntegerRange(bits, kind == "sym")
    scale, zero_point = affine_qparams(*torch.aminmax(x), codes)
    torch.testing.assert_close(scale, data[f"{key}_delta"], rtol=1e-6, atol=0)
    assert zero_point == data[f"{key}_zp"]
    assert_same_grid(fake_quantize(x, scale, zero_point, codes), data[f"{key}_deq"], x, scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_positive_range_is_widened_to_hold_zero(golden: Any, bits: int) -> None:
    """The original scales by max - min but puts its zero point at 0, and so clips the top; ours reaches from 0 to max."""
    data = golden("quantizers_uniform")
    x, codes = data["in_positive"], IntegerRange(bits, False)
    low, high = torch.aminmax(x)
    scale, zero_point = affine_qparams(low, high, codes)
    original = data[f"positive_b{bits}_asym_max_az0_delta"]
    assert low > 0
    torch.testing.assert_close(original, (high - low) / codes.qmax, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale, high / codes.qmax)
    assert zero_point == 0
    ours = (fake_quantize(x, scale, zero_point, codes) - x).abs().max()
    theirs = (data[f"positive_b{bits}_asym_max_az0_deq"] - x).abs().max()
    assert ours <= scale / 2 * 1.001 and theirs > low * 0.9


def test_a_negative_range_is_widened_to_hold_zero() -> None:
    codes = IntegerRange(4, False)
    scale, zero_point = affine_qparams(torch.tensor(-3.0), torch.tensor(-1.0), codes)
    torch.testing.assert_close(scale, torch.tensor(0.2))
    assert zero_point == 15
    assert fake_quantize(ZERO, scale, zero_point, codes) == 0


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["gauss", "heavy", "silu"])
def test_mse_ranges_choose_as_the_original(golden: Any, name: str, bits: int) -> None:
    data = golden("quantizers_uniform")
    x, key, codes = data[f"in_{name}"], f"{name}_b{bits}_asym_mse_az0", IntegerRange(bits, False)
    low, high = torch.aminmax(x)
    scale, zero_point = search_qparams(x.flatten(), None, low, high, codes)
    torch.testing.assert_close(scale, data[f"{key}_delta"], rtol=1e-6, atol=0)
    assert zero_point == data[f"{key}_zp"]
    assert_same_grid(fake_quantize(x, scale, zero_point, codes), data[f"{key}_deq"], x, scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mse_ranges_of_probabilities_have_no_zero_point(golden: Any, bits: int) -> None:
    """Non-negative data: what the original does with always_zero."""
    data = golden("quantizers_uniform")
    x, key, codes = data["in_softmax"], f"softmax_b{bits}_asym_mse_az1", IntegerRange(bits, False)
    low, high = torch.aminmax(x)
    scale, zero_point = search_qparams(x.flatten(), None, low, high, codes)
    torch.testing.assert_close(scale, data[f"{key}_delta"], rtol=1e-6, atol=0)
    assert zero_point == 0
    assert_same_grid(fake_quantize(x, scale, zero_point, codes), data[f"{key}_deq"], x, scale)


def test_counts_weigh_the_values() -> None:
    values = torch.tensor([-1.0, -0.4, 0.1, 0.33, 5.0])
    counts = torch.tensor([40, 300, 700, 250, 1])
    codes = IntegerRange(4, False)
    low, high = torch.aminmax(values)
    weighted = search_qparams(values, counts, low, high, codes)
    repeated = search_qparams(values.repeat_interleave(counts), None, low, high, codes)
    assert weighted == repeated
    assert weighted[0] < search_qparams(values, None, low, high, codes)[0]  # once each, the outlier counts for more


@pytest.mark.parametrize("chunk", [1, 60, 1 << 18])
def test_weight_search_is_the_search_row_by_row(chunk: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 50) * torch.logspace(-2, 1, 7)[:, None]
    weight[3, 5] = 30.0
    codes = IntegerRange(4, True)
    found = search_weight_scale(weight, codes, chunk)
    assert found.shape == (7, 1)
    for row, scale in zip(weight, found, strict=True):
        ratios = [1 - 0.01 * i for i in range(80)]
        errors = []
        for ratio in ratios:
            s = row.abs().max() * ratio / 7
            errors.append(float(((torch.clamp(torch.round(row / s), -8, 7) * s - row).abs() ** SEARCH_NORM).double().mean()))
        best = row.abs().max() * ratios[errors.index(min(errors))] / 7
        torch.testing.assert_close(scale[0], best, rtol=1e-5, atol=0)


def test_the_search_reaches_down_to_a_fifth_and_the_first_of_equals_wins() -> None:
    values = torch.cat([torch.linspace(-0.1, 0.1, 100001), torch.tensor([-0.4, 0.4])])
    scale, _ = search_qparams(values, None, *torch.aminmax(values), IntegerRange(2, False))
    assert 0.2099 < float(scale) / (0.8 / 3) < 0.4
    weight_scale = search_weight_scale(values[None], IntegerRange(2, True))
    assert 0.2099 < float(weight_scale) / 0.4 < 0.4
    scale, _ = search_qparams(torch.zeros(4), None, torch.tensor(-1.0), torch.tensor(1.0), IntegerRange(4, False))
    assert float(scale) == pytest.approx(2 / 15)  # every ratio is exact: the widest range is taken


def test_the_first_of_equal_weight_scales_wins() -> None:
    """With 2 bits -1 is a code at scale 1 and at scale 0.5, without any error at either."""
    weight = torch.tensor([[-1.0], [-8.0]])
    torch.testing.assert_close(search_weight_scale(weight, IntegerRange(2, True)), torch.tensor([[1.0], [8.0]]), rtol=0, atol=0)


def test_weight_search_clips_outliers_and_beats_max() -> None:
    torch.manual_seed(0)
    weight, codes = torch.randn(1, 400), IntegerRange(4, True)
    weight[0, 0] = 12.0
    widest = symmetric_scale(weight.abs().amax(1, keepdim=True), codes)
    found = search_weight_scale(weight, codes)

    def error(scale: Tensor) -> float:
        return float((fake_quantize(weight, scale, ZERO, codes) - weight).abs().pow(SEARCH_NORM).mean())

    assert found < widest and error(found) < error(widest)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_zero_and_idempotence(bits: int, signed: bool) -> None:
    torch.manual_seed(bits)
    x = torch.randn(10000) * 3 + 1
    codes = IntegerRange(bits, signed)
    scale, zero_point = affine_qparams(*torch.aminmax(x), codes)
    q = quantize(x, scale, zero_point, codes)
    once = fake_quantize(x, scale, zero_point, codes)
    assert len(once.unique()) <= 2**bits
    assert q.min() >= codes.qmin and q.max() <= codes.qmax and torch.equal(q, q.round())
    assert torch.equal(fake_quantize(once, scale, zero_point, codes), once)
    assert fake_quantize(ZERO, scale, zero_point, codes) == 0
    inside = (x / scale + zero_point > codes.qmin) & (x / scale + zero_point < codes.qmax)
    assert bool(((once - x).abs()[inside] <= scale / 2 * 1.0001).all())


def test_constant_zero_data_gives_a_usable_scale() -> None:
    for signed in (False, True):
        scale, zero_point = affine_qparams(ZERO, ZERO, IntegerRange(8, signed))
        assert scale > 0 and math.isfinite(float(zero_point))
        assert fake_quantize(ZERO, scale, zero_point, IntegerRange(8, signed)) == 0


@pytest.mark.parametrize("bits", [1, 17])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"^bits {bits}: allowed are 2 to 16$"):
        IntegerRange(bits, True)


def test_a_zero_point_for_several_ranges() -> None:
    """Every range is covered, and no other zero point needs smaller scales."""
    codes = IntegerRange(4, False)
    low, high = torch.tensor([[-1.0, 0.0], [-8.0, 0.0], [0.5, 0.0]]), torch.tensor([[3.0, 4.0], [4.0, 8.0], [2.0, 0.0]])
    scale, zero = shared_zero_qparams(low, high, codes)
    assert torch.equal(zero[0].expand_as(zero), zero) and zero[0, 1] == 0
    ends = (codes.qmin - zero) * scale, (codes.qmax - zero) * scale
    assert (ends[0] <= low.clamp(max=0) + 1e-6).all() and (ends[1] >= high - 1e-6).all()
    torch.testing.assert_close(scale[:2, 1], torch.tensor([4.0, 8.0]) / 15)
    assert 0 < scale[2, 1] < 1e-6  # of a range that is 0 alone

    def product(z: int) -> float:
        return math.prod(float(max(-min(a, 0) / z, b / (15 - z))) for a, b in zip(low[:, 0], high[:, 0], strict=True))

    assert product(int(zero[0, 0])) == pytest.approx(min(product(z) for z in range(1, 15)))
    assert math.prod(scale[:, 0].tolist()) == pytest.approx(product(int(zero[0, 0])))
    signed, middle = shared_zero_qparams(low, high, IntegerRange(4, True))
    assert not middle.any() and torch.equal(signed[:, 0], torch.tensor([3.0, 8.0, 2.0]) / 7)
