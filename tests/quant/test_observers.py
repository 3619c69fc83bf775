"""Observers see everything, once, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.quant.affine import SEARCH_NORM, IntegerRange, affine_qparams, fake_quantize, search_qparams
from qncd.quant.observers import HistogramObserver, MinMaxObserver, RunningObserver, make_observer


def batches(kind: str, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, 16, 8, 8, generator=generator)
    x = x * torch.tensor([0.3, 1.0, 0.5, 4.0, 0.1, 2.0])[:count].view(-1, 1, 1, 1, 1)  # batches of unlike width
    if kind == "silu":
        x = torch.nn.functional.silu(x)
    elif kind == "softmax":
        x = x.softmax(-1)
    elif kind == "heavy":
        x = x**3
    return list(x)


def error(x: Tensor, qparams: tuple[Tensor, Tensor], codes: IntegerRange) -> float:
    return float((fake_quantize(x, *qparams, codes) - x).abs().pow(SEARCH_NORM).double().mean())


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["gauss", "silu", "softmax", "heavy"])
@pytest.mark.parametrize("signed", [False, True])
def test_histogram_search_is_as_good_as_the_exact_one(kind: str, bits: int, signed: bool) -> None:
    codes, data = IntegerRange(bits, signed), batches(kind)
    whole = torch.cat(data).flatten()
    observer = HistogramObserver()
    for x in data:
        observer.observe(x)
    found = observer.qparams(codes)
    exact = search_qparams(whole, None, *torch.aminmax(whole), codes)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=0.02)
    assert error(whole, found, codes) <= 1.01 * error(whole, exact, codes)


def test_histogram_counts_everything_through_doublings() -> None:
    observer = HistogramObserver(bins=64)
    x = torch.linspace(-1, 1, 64 * 10)
    seen: list[Tensor] = []
    for scale in (0.0, 1e-3, 0.3, 1.0, 7.9, 0.2):
        observer.observe(x * scale)
        seen.append(x * scale)
    whole = torch.cat(seen)
    assert observer.counts is not None
    assert observer.counts.sum() == len(whole)
    assert observer.limit >= 7.9
    # Far from the middle a bin's count is what a histogram over the final limits says, give or take values on its edges.
    direct = torch.histc(whole, 64, -observer.limit, observer.limit).double()
    assert (observer.counts.cumsum(0) - direct.cumsum(0)).abs().max() <= 64
    assert observer.low == -7.9 and observer.high == pytest.approx(7.9)


def test_a_bin_stands_for_its_centre() -> None:
    """Four bins over [-1, 1], whose centres are -0.75, -0.25, 0.25 and 0.75; the first bin is empty."""
    observer, codes = HistogramObserver(bins=4), IntegerRange(2, False)
    observer.observe(torch.tensor([-0.3, -0.2, 0.2, 0.3, 0.6, 0.9]))
    centres, counts, ends = torch.tensor([-0.25, 0.25, 0.75]), torch.tensor([2, 2, 2]), torch.tensor([-0.3, 0.9])
    assert observer.counts is not None and observer.counts.tolist() == [0, 2, 2, 2]
    assert observer.qparams(codes) == search_qparams(centres, counts, *ends, codes)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("act_range", ["max", "mse"])
def test_order_and_size_of_batches_do_not_matter(act_range: str, bits: int) -> None:
    codes = IntegerRange(bits, False)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randn(8, 4000, generator=generator) * torch.rand(8, 1, generator=generator) * 3
        results = []
        for order in (list(data), list(data.flip(0)), [data], list(data.split(3))):
            observer = make_observer(act_range)
            for x in order:
                observer.observe(x)
            results.append(observer.qparams(codes))
        assert all(result == results[0] for result in results), f"seed {seed}"


def test_minmax_is_the_range_of_everything() -> None:
    data, codes = batches("gauss"), IntegerRange(8, False)
    observer = MinMaxObserver()
    for x in data:
        observer.observe(x)
    assert observer.qparams(codes) == affine_qparams(*torch.aminmax(torch.cat(data)), codes)


@pytest.mark.parametrize("act_range", ["max", "mse", "running"])
def test_parts_of_a_batch_count_as_one_batch(act_range: str) -> None:
    whole, parted, codes = make_observer(act_range), make_observer(act_range), IntegerRange(8, False)
    for x in batches("gauss"):
        whole.observe(x)
        parts = x.split(7, 1)
        for i, part in enumerate(parts):
            parted.observe(part, more=i < len(parts) - 1)
    assert parted.qparams(codes) == whole.qparams(codes)


@pytest.mark.parametrize("name", ["gauss", "silu"])
@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_running_ranges_are_the_originals(golden: Any, name: str, kind: str) -> None:
    data = golden("quantizers_running_stat")
    observer, codes, key = RunningObserver(), IntegerRange(8, kind == "sym"), f"rs_{name}_{kind}_az0_max"
    for i, x in enumerate(data[f"rs_{name}_in"]):
        observer.observe(x)
        scale, zero_point = observer.qparams(codes)
        torch.testing.assert_close(scale, data[f"{key}_delta"][i], rtol=2e-6, atol=0)
        assert zero_point == data[f"{key}_zp"][i]
        found, expected = fake_quantize(x, scale, zero_point, codes), data[f"{key}_deq"][i]
        off = (found - expected).abs() > 1e-5
        assert off.float().mean() < 0.005 and (found - expected).abs().max() <= scale * 1.001


def test_a_wide_code_takes_the_whole_range() -> None:
    """Finer than a bin of the histogram: the search could not tell."""
    x = torch.rand(1000)
    observer = HistogramObserver()
    observer.observe(x)
    scale, zero_point = observer.qparams(IntegerRange(16, False))
    assert float(scale) == pytest.approx(float(x.max()) / 65535, rel=1e-6) and zero_point == 0


@pytest.mark.parametrize("act_range", ["max", "mse", "running"])
def test_refusals(act_range: str) -> None:
    with pytest.raises(ValueError, match=r"^an activation quantizer saw no calibration data$"):
        make_observer(act_range).qparams(IntegerRange(8, False))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for before, after in (([], []), ([1.0], []), ([], [1.0]), ([1.0], [2.0])):  # finite batches do not hide it
            observer = make_observer(act_range)
            for batch in ([before] if before else []) + [[0.0, bad]] + ([after] if after else []):
                observer.observe(torch.tensor(batch))
            with pytest.raises(ValueError, match=r"^an activation is NaN or infinite while calibrating$"):
                observer.qparams(IntegerRange(8, False))
