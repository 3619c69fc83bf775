"""The activation quantizer: stages, segments, smoothing merged with the scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.quant.affine import IntegerRange, fake_quantize
from qncd.quant.quantizers import ActQuantizer, Stage


def calibrated(x: Tensor, bits: int = 8, signed: bool = False, **settings: Any) -> ActQuantizer:
    quantizer = ActQuantizer(IntegerRange(bits, signed), settings.pop("act_range", "max"), **settings)
    quantizer.set_stage(Stage.OBSERVE)
    quantizer(x)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    return quantizer


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_is_fake_quantization(bits: int, signed: bool) -> None:
    """The fused form (clamp before the zero point is subtracted) gives what the textbook form gives."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5) * 2 + 0.7
    quantizer = calibrated(x, bits, signed, act_range="mse")
    assert quantizer.codes is not None
    wide = x * 1.5  # past the range as well
    before = wide.clone()
    out = quantizer(wide)
    expected = fake_quantize(wide, quantizer.scale, quantizer.zero_point, quantizer.codes)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(wide, before), "the input was changed"
    assert len(out.unique()) <= 2**bits
    torch.testing.assert_close(quantizer(out), out, rtol=0, atol=0)
    assert quantizer(torch.zeros(1, 6, 1, 1)).abs().max() == 0


def test_matches_the_original_forward(golden: Any) -> None:
    data = golden("quantizers_uniform")
    x = data["in_silu"]
    out, expected = calibrated(x, 4)(x), data["silu_b4_asym_max_az0_deq"]
    assert ((out - expected).abs() > 1e-6).float().mean() < 0.005


def test_an_owned_input_may_be_overwritten_but_gives_the_same() -> None:
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    quantizer = calibrated(x, 4)
    expected = quantizer(x)
    assert torch.equal(quantizer(x.clone(), owned=True), expected)
    leaf = x.clone().requires_grad_()
    assert torch.equal(quantizer(leaf, owned=True), expected) and torch.equal(leaf, x)


def test_segments_have_ranges_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 10, 4, 4)
    x[:, 6:] *= 9
    quantizer = calibrated(x, 4, segments=(6, 4))
    for part, segment in ((x[:, :6], slice(0, 6)), (x[:, 6:], slice(6, 10))):
        alone = calibrated(part.contiguous(), 4)
        torch.testing.assert_close(quantizer(x)[:, segment], alone(part), rtol=1e-6, atol=0)
    assert quantizer.scale[1] > 4 * quantizer.scale[0]
    assert (quantizer(x) - x)[:, :6].square().mean() < 0.2 * (calibrated(x, 4)(x) - x)[:, :6].square().mean()


@pytest.mark.parametrize("segments", [None, (6, 4)])
def test_smoothing_divides_before_the_grid(segments: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    x, factors = torch.randn(3, 10, 4, 4), 1 + 5 * torch.rand(1, 10, 1, 1)
    quantizer = ActQuantizer(IntegerRange(8, False), "max", segments)
    torch.testing.assert_close(quantizer(x, factors), x / factors, rtol=0, atol=0)
    quantizer.set_stage(Stage.OBSERVE)
    torch.testing.assert_close(quantizer(x, factors), x / factors, rtol=0, atol=0)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    out = quantizer(x, factors)
    divided = quantizer(x / factors)
    assert ((out - divided).abs() > 1e-5).float().mean() < 0.005  # ties only
    assert (out - x / factors).abs().max() <= quantizer.scale.max() * 0.51  # S was among what it observed


def test_observing_changes_nothing_and_starts_afresh() -> None:
    quantizer = ActQuantizer(IntegerRange(8, False), "max")
    for top in (100.0, 2.0):
        quantizer.set_stage(Stage.OBSERVE)
        x = torch.tensor([0.0, 0.123, top])
        assert torch.equal(quantizer(x), x)
        quantizer.finish_observing()
        assert float(quantizer.scale) == pytest.approx(top / 255)
    assert quantizer.observers == []


def test_without_codes_it_passes_everything_through() -> None:
    quantizer = ActQuantizer(None, "max")
    for stage in Stage:
        quantizer.set_stage(stage)
        x = torch.randn(3, 4)
        assert torch.equal(quantizer(x), x)
    quantizer.finish_observing()


def test_loading_a_state_dict_takes_over_the_zero_points() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 4, 4)
    source, target = calibrated(x - 1, 4, segments=(6, 4)), calibrated(x + 2, 4, segments=(6, 4))
    assert not torch.equal(source.zero_point, target.zero_point)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_refusals() -> None:
    quantizer = ActQuantizer(IntegerRange(8, False), "max", (2, 2))
    with pytest.raises(ValueError, match=r"^scale of shape \(1,\): expected \(2,\)$"):
        quantizer.set_qparams(torch.ones(1), torch.zeros(1))
    for scale in ([1.0, 0.0], [1.0, -1.0], [1.0, torch.nan], [torch.inf, 1.0]):
        with pytest.raises(ValueError, match=r"^an activation scale is not a positive finite number$"):
            quantizer.set_qparams(torch.tensor(scale), torch.zeros(2))
    quantizer.set_stage(Stage.OBSERVE)
    with pytest.raises(ValueError, match=r"^an activation quantizer saw no calibration data$"):
        quantizer.finish_observing()


@pytest.mark.parametrize("segments", [None, (2, 4)])
def test_with_learned_scales_it_gives_the_same_and_lsqs_gradients(segments: tuple[int, ...] | None) -> None:
    """By hand, for each segment: inside its range round(x/s) - x/s, outside the bound; x gets 1 inside and 0 outside."""
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 1, 5, 5, 5, 5]).view(1, 6, 1)
    quantizer = calibrated(x, 3, segments=segments)
    wide = (1.5 * x).requires_grad_()
    expected = quantizer(wide.detach())
    quantizer.scale.requires_grad_()
    out = quantizer(wide)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert quantizer.scale.grad is not None and wide.grad is not None
    parts = zip(wide.detach().split(segments or (6,), 1), wide.grad.split(segments or (6,), 1), strict=True)
    for i, (part, gradient) in enumerate(parts):
        scale, zero = float(quantizer.scale[i].detach()), float(quantizer.zero_point[i])
        code = (part / scale).round()
        clipped = code.clamp(0 - zero, 7 - zero)
        inside = code == clipped
        assert 0 < inside.float().mean() < 1
        torch.testing.assert_close(gradient, inside.float())
        lsq = torch.where(inside, code - part / scale, clipped).sum()
        torch.testing.assert_close(quantizer.scale.grad[i], lsq, rtol=1e-4, atol=1e-4)
