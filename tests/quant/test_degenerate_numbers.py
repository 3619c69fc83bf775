"""Numbers at the edge of float32: any finite tensor is quantized to finite values, on at most 2^b levels, with scales above 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qncd.quant.affine import (
    IntegerRange,
    affine_qparams,
    fake_quantize,
    search_qparams,
    search_weight_scale,
    shared_zero_qparams,
    symmetric_scale,
)
from qncd.quant.gptq import solve_rounding
from qncd.quant.observers import make_observer
from qncd.quant.quantizers import ActQuantizer, Stage

LARGEST = torch.finfo(torch.float32).max
RANGES = ("max", "running", "mse")


def drawn(seed: int) -> Tensor:
    """(1 to 200,) numbers of any magnitude that float32 has, some of them alike."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 200, (), generator=generator))
    low, high = torch.randint(-148, 128, (2,), generator=generator).sort().values.tolist()
    exponents = torch.randint(low, high + 1, (count,), generator=generator)
    values = torch.ldexp(torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1, exponents).float()
    return values if seed % 3 else torch.cat([values, torch.zeros(3), values[:1].expand(50)])


CASES: dict[str, Tensor] = {
    "zeros": torch.zeros(40),
    "one zero": torch.zeros(1),
    "one value": torch.tensor([-3.7]),
    "constant": torch.full((40,), 0.3),
    "largest": torch.tensor([-LARGEST, 0.0, LARGEST]),
    "largest alone": torch.full((5,), LARGEST),
    "denormal": torch.tensor([1e-45, -1e-40, 3e-39]),
    "1e30": torch.linspace(-1, 1, 50) * 1e30,
    "1e-30": torch.linspace(-1, 1, 50) * 1e-30,
    "one huge": torch.cat([torch.linspace(-1, 1, 50), torch.tensor([1e30])]),
    "never below 0": torch.linspace(0, 1, 50) * 1e-20,
} | {f"drawn {seed}": drawn(seed) for seed in range(24)}


def check(x: Tensor, scale: Tensor, zero_point: Tensor, codes: IntegerRange) -> Tensor:
    rounded = fake_quantize(x, scale, zero_point, codes)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert bool(((zero_point >= codes.qmin) & (zero_point <= codes.qmax) & (zero_point == zero_point.round())).all())
    assert bool(torch.isfinite(rounded).all()) and len(rounded.unique()) <= 2**codes.bits
    return rounded


@pytest.mark.parametrize("codes", [IntegerRange(2, True), IntegerRange(4, False), IntegerRange(8, False), IntegerRange(8, True)])
@pytest.mark.parametrize("x", CASES.values(), ids=list(CASES))
def test_any_finite_tensor(x: Tensor, codes: IntegerRange) -> None:
    low, high = x.aminmax()
    step = float(affine_qparams(low, high, codes)[0])
    covered = check(x, *affine_qparams(low, high, codes), codes)
    # The smallest normal number is the finest step that there is; ranges of nearly all of float32 lose half of them.
    if float(high.clamp(min=0).double() - low.clamp(max=0).double()) < LARGEST / 2:
        assert float((covered.double() - x.double()).abs().max()) <= 0.501 * step
    shared = shared_zero_qparams(low.view(1, 1), high.view(1, 1), codes)
    check(x, shared[0].view(()), shared[1].view(()), codes)
    check(x, *search_qparams(x, None, low, high, codes), codes)
    for act_range in RANGES:
        observer = make_observer(act_range)
        for part in x.split(17):
            observer.observe(part)
        check(x, *observer.qparams(codes), codes)
    if codes.signed:
        for scale in (symmetric_scale(x.abs().max().view(1, 1), codes), search_weight_scale(x.view(1, -1), codes)):
            check(x.view(1, -1), scale, torch.zeros(1, 1), codes)


@pytest.mark.parametrize("factor", [2.0**-120, 2.0**-100, 2.0**-45, 2.0**45, 2.0**100, 2.0**120])
def test_a_search_finds_the_same_ratio_at_any_magnitude(factor: float) -> None:
    """Squares and higher powers of these magnitudes are no numbers of float32."""
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(4, 300, generator=generator), IntegerRange(4, True)
    close: Callable[..., None] = torch.testing.assert_close
    close(search_weight_scale(x * factor, codes) / factor, search_weight_scale(x, codes), rtol=1e-6, atol=0)
    scales = []
    for values in (x, x * factor):
        observer = make_observer("mse")
        observer.observe(values)
        scales.append(observer.qparams(codes)[0])
    close(scales[1] / factor, scales[0], rtol=1e-6, atol=0)


def test_a_dead_row_beside_others() -> None:
    weight = torch.cat([torch.zeros(1, 20), torch.full((1, 20), 1e-42), torch.linspace(-1, 1, 20).view(1, 20)])
    scale = search_weight_scale(weight, IntegerRange(4, True))
    assert scale[0] == pytest.approx(1e-8) and scale[1] == pytest.approx(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(scale[2:], search_weight_scale(weight[2:], IntegerRange(4, True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_its_largest_value(dtype: torch.dtype) -> None:
    """The step beyond the largest value rounds to infinity in half precision."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, 0.0, 1.0, largest], dtype=dtype)
    quantizer = ActQuantizer(IntegerRange(8, False), "max")
    quantizer.set_stage(Stage.OBSERVE)
    quantizer(x)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    assert bool(torch.isfinite(quantizer(x)).all())


def gram_of(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    if kind == "rounding errors alone":  # what float32 leaves of a constant, symmetric and of either sign
        noise = torch.randn(12, 12, generator=generator, dtype=torch.float64) * 1e-7
        return (noise + noise.T).to(dtype)
    if kind == "negative diagonal":
        return -torch.eye(12, dtype=dtype) * 1e-6
    scale = {"one huge": torch.tensor([1e30] + [1.0] * 11), "tiny": torch.full((12,), 1e-30), "dead": torch.ones(12)}[kind]
    if kind == "dead":
        x[:, 3] = 0
    x = x * scale.double()
    return (x.T @ x / len(x)).to(dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float64) for kind in ("rounding errors alone", "negative diagonal", "one huge", "tiny", "dead")]
    + [(kind, torch.float32) for kind in ("rounding errors alone", "negative diagonal", "tiny", "dead")],
)
def test_gptq_of_degenerate_moments(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    scale, gram = weight.abs().amax(1, keepdim=True) / 7, gram_of(kind, dtype)
    found, _ = solve_rounding(weight, scale, IntegerRange(4, True), gram, gram)
    rounded, nearest = found * scale, (weight / scale).round() * scale
    error, expected = (torch.einsum("on,nm,om->o", e, gram, e) for e in ((w - weight).to(gram) for w in (rounded, nearest)))
    if kind in ("one huge", "tiny", "dead"):
        assert float(error.sum()) <= float(expected.sum()) * 1.001
    else:
        assert float((rounded - weight).abs().max()) < 3 * float(scale.max())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gptq_refuses_what_is_not_finite(value: float) -> None:
    weight, gram = torch.ones(2, 3), torch.eye(3)
    with pytest.raises(ValueError, match=r"^the layer's inputs hold NaN or infinity$"):
        solve_rounding(weight, torch.ones(2, 1), IntegerRange(4, True), gram, gram * value)
