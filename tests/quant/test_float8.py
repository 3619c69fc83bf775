"""e4m3: the grid, against the format's definition bit by bit."""

from __future__ import annotations

import pytest
import torch

from qncd.quant.affine import fake_quantize, search_weight_scale, symmetric_scale
from qncd.quant.float8 import Float8Codes

FP8 = Float8Codes()


def numbers() -> torch.Tensor:
    """All of the format that are not NaN, ascending: +-2^(e - 7) (1 + m / 8), and +-2^-6 m / 8 where e is 0."""
    above = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
    return torch.tensor(sorted({sign * value for sign in (-1, 1) for value in above}))


def test_values_are_rounded_to_the_nearest_number() -> None:
    grid = numbers()
    assert len(grid) == 253 and (grid.min(), grid.max()) == (FP8.qmin, FP8.qmax)
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 100, grid, torch.tensor([1e-9, 500.0, -1e30])])
    found = FP8.round_(x.clone())
    distances = (x[:, None] - grid).abs()
    assert torch.equal((x - found).abs(), distances.min(1).values)
    assert bool(torch.isin(found, grid).all())
    halves = (grid[1:] + grid[:-1]) / 2  # to the one whose last bit is 0
    assert bool((FP8.pack(FP8.round_(halves)) % 2 == 0).all())


def test_packed_numbers_come_back() -> None:
    grid = numbers()
    packed = FP8.pack(grid)
    assert packed.dtype == torch.int8 and torch.equal(FP8.unpack(packed), grid)


def test_scales_map_the_largest_magnitude_to_448() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    largest = weight.abs().amax(1, keepdim=True)
    scale = symmetric_scale(largest, FP8)
    assert torch.equal(scale, largest / 448)
    searched = search_weight_scale(weight, FP8)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(weight, scale, torch.zeros(()), FP8) - weight).abs().pow(2.4).mean(1)

    assert bool((error(searched) <= error(scale)).all())


def test_other_widths_are_refused() -> None:
    assert FP8.of_width(8) is FP8
    with pytest.raises(ValueError, match=r"^bits 6: fp8 has 8$"):
        FP8.of_width(6)
