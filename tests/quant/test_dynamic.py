"""Scales found at run time: every token, sample or group is rounded as if it were a tensor of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.granularity import PER_ROW, PER_TENSOR, PerGroup
from qncd.quant.affine import Codes, IntegerRange
from qncd.quant.attention import QuantAttnProcessor
from qncd.quant.dynamic import DifferenceQuantizer, DynamicActQuantizer, make_quantizer
from qncd.quant.float8 import Float8Codes
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLinear
from qncd.quant.quantizers import ActQuantizer, Stage

CODES = [IntegerRange(8, False), IntegerRange(4, True), Float8Codes()]
CONVOLUTION = (-3, -2, -1)


def values(*shape: int) -> Tensor:
    """Tokens, samples and channels of very different sizes, on either side of 0."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator).exp()
    sizes = rows * torch.randn(shape[-1], generator=generator)
    return torch.randn(shape, generator=generator) * sizes + sizes


def alone(x: Tensor, codes: Codes) -> Tensor:
    """x on the grid of its own extremes, as a calibrated quantizer has it that saw nothing else."""
    quantizer = ActQuantizer(codes, "max")
    quantizer.set_stage(Stage.OBSERVE)
    quantizer(x)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    return quantizer(x)


def blocks(x: Tensor, kind: str) -> Iterator[Any]:
    """Indices of what shares a scale."""
    if kind == "token":
        yield from ((n, t) for n in range(len(x)) for t in range(x.shape[1]))
    elif kind == "groups of a token":  # 32 channels, then 16
        yield from ((n, t, part) for n in range(len(x)) for t in range(x.shape[1]) for part in (slice(0, 32), slice(32, 48)))
    elif kind == "sample":
        yield from range(len(x))
    elif kind == "groups of a sample":
        yield from ((n, part) for n in range(len(x)) for part in (slice(0, 32), slice(32, 48)))
    else:  # v of attention
        yield from ((n, h, slice(None), d) for n in range(len(x)) for h in range(x.shape[1]) for d in range(x.shape[3]))


@pytest.mark.parametrize("codes", CODES, ids=["unsigned", "signed", "fp8"])
@pytest.mark.parametrize(
    ("kind", "shape", "granularity", "summed"),
    [
        ("token", (2, 5, 48), PER_ROW, (-1,)),
        ("groups of a token", (2, 5, 48), PerGroup(32), (-1,)),
        ("sample", (3, 48, 4, 5), PER_ROW, CONVOLUTION),
        ("groups of a sample", (3, 48, 4, 5), PerGroup(32), CONVOLUTION),
        ("columns", (2, 3, 7, 4), PER_ROW, (-2,)),
    ],
)
def test_each_block_is_rounded_alone(kind: str, shape: Any, granularity: Any, summed: Any, codes: Codes) -> None:
    x = values(*shape)
    x[0, 1] = 0
    quantizer = DynamicActQuantizer(codes, granularity, summed)
    quantizer.set_stage(Stage.QUANTIZE)
    found, expected = quantizer(x), torch.full_like(x, torch.nan)
    for block in blocks(x, kind):
        expected[block] = alone(x[block], codes)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0) and not found[0, 1].any()


def test_no_image_depends_on_the_others_of_its_batch() -> None:
    x = values(4, 48, 4, 5)
    quantizer = make_quantizer(CODES[0], "max", PER_ROW, CONVOLUTION)
    quantizer.set_stage(Stage.QUANTIZE)
    assert torch.equal(torch.cat([quantizer(part) for part in x.split(1)]), quantizer(x))


def test_halves_of_a_skip_concatenation_have_scales_of_their_own() -> None:
    x = values(3, 10, 4, 5)
    quantizer = make_quantizer(CODES[0], "max", PER_ROW, CONVOLUTION, (6, 4))
    quantizer.set_stage(Stage.QUANTIZE)
    plain = make_quantizer(CODES[0], "max", PER_ROW, CONVOLUTION)
    plain.set_stage(Stage.QUANTIZE)
    assert torch.equal(quantizer(x), torch.cat([plain(x[:, :6]), plain(x[:, 6:])], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, smoothing = values(2, 5, 48).to(dtype), torch.rand(48) + 0.5
    quantizer = make_quantizer(IntegerRange(8, False), "max", PER_ROW)
    quantizer.set_stage(Stage.QUANTIZE)
    assert torch.equal(quantizer(x, smoothing), quantizer(x.float() / smoothing).to(dtype))


def test_there_is_nothing_to_calibrate() -> None:
    quantizer = make_quantizer(CODES[0], "max", PER_ROW)
    quantizer.set_stage(Stage.OBSERVE)
    x = values(2, 5, 48)
    assert torch.equal(quantizer(x), x) and quantizer.stage is Stage.FLOAT
    quantizer.finish_observing()
    assert not quantizer.calibrated and not quantizer.state_dict()
    for plain in (make_quantizer(CODES[0], "max", PER_TENSOR), make_quantizer(None, "max", PER_ROW)):
        assert type(plain) is ActQuantizer


def test_layers_and_attention_know_what_they_sum_over() -> None:
    config = LayerConfig(None, CODES[0], "max", "max", act_granularity=PER_ROW)
    linear = QuantLinear.from_float(nn.Linear(4, 4), config)
    convolution = QuantConv2d.from_float(nn.Conv2d(4, 4, 3), config)
    processor = QuantAttnProcessor(CODES[0], CODES[0], "max", None, PER_ROW)
    found = [linear.act, convolution.act, processor.q, processor.k, processor.v, processor.softmax]
    assert all(isinstance(quantizer, DynamicActQuantizer) for quantizer in found)
    assert [quantizer.summed for quantizer in found] == [(-1,), CONVOLUTION, (-1,), (-1,), (-2,), (-1,)]  # type: ignore[attr-defined]


def differences(bits: int = 4) -> DifferenceQuantizer:
    quantizer = make_quantizer(IntegerRange(bits, False), "max", PER_ROW, CONVOLUTION, (6, 4), differences=True)
    assert isinstance(quantizer, DifferenceQuantizer)
    quantizer.set_stage(Stage.QUANTIZE)
    return quantizer


def rounded(x: Tensor, bits: int) -> Tensor:
    plain = make_quantizer(IntegerRange(bits, False), "max", PER_ROW, CONVOLUTION, (6, 4))
    plain.set_stage(Stage.QUANTIZE)
    return plain(x)


def test_differences_to_what_was_given_are_rounded() -> None:
    """MoDiff, arXiv 2506.22463: a^_t = a^_(t+1) + Q(a_t - a^_(t+1)), and 8 bits where a trajectory starts."""
    quantizer, smoothing = differences(), torch.rand(10, 1, 1) + 0.5
    x = values(3, 10, 4, 5)
    steps = [x + 0.1 * index * values(3, 10, 4, 5).roll(1, 3) for index in range(4)]
    quantizer.follow(0, fresh=True)
    expected = rounded(steps[0] / smoothing, 8)
    assert torch.equal(quantizer(steps[0], smoothing), expected)
    for step in steps[1:]:
        quantizer.follow(0)
        expected = expected + rounded(step / smoothing - expected, 4)
        assert torch.equal(quantizer(step, smoothing), expected)
    assert (expected - steps[-1] / smoothing).norm() < 0.3 * (rounded(steps[-1], 4) - steps[-1]).norm()  # no errors add up
    quantizer.follow(0, fresh=True)
    assert torch.equal(quantizer(steps[0], smoothing), rounded(steps[0] / smoothing, 8))


def test_calls_parts_and_sizes_are_told_apart() -> None:
    quantizer, x = differences(), values(4, 10, 4, 5)
    quantizer.follow(0, fresh=True)
    first = quantizer(x)
    quantizer.follow(1)  # another call of the same time step: there is nothing to differ from
    assert torch.equal(quantizer(2 * x), rounded(2 * x, 8))
    quantizer.follow(0)
    assert torch.equal(quantizer(1.1 * x), first + rounded(1.1 * x - first, 4))
    assert torch.equal(quantizer(x[:2]), rounded(x[:2], 8))  # guidance has ended
    for part in (slice(0, 2), slice(2, 4)):
        assert torch.equal(quantizer(x[part], images=part), rounded(x[part], 8))
    quantizer.follow(None)  # off any trajectory
    assert torch.equal(quantizer(x[:2]), rounded(x[:2], 8))


def test_nothing_is_kept_of_what_is_rounded_as_it_is() -> None:
    assert not isinstance(make_quantizer(CODES[0], "max", PER_ROW), DifferenceQuantizer)
    assert type(make_quantizer(CODES[0], "max", PER_TENSOR, differences=True)) is ActQuantizer
