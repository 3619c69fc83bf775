"""Hadamard rotations of channels: orthogonal, in blocks, and without a channel that gathers the mean."""

from __future__ import annotations

import pytest
import torch

from qncd.quant.rotation import block_of, check_block, hadamard, rotate

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal_symmetric_and_regular_where_there_is_a_regular_one(size: int) -> None:
    matrix = hadamard(size, torch.float64)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5)) and torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    largest = matrix.sum(1).abs().max()  # what becomes of channels that are all 1
    assert largest == pytest.approx(1.0 if size in (4, 16, 64, 256) else 2**0.5)


@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 24), -1), ((5, 24), -1), ((2, 24, 3, 5), 1), ((6, 24), 1)])
def test_blocks_along_any_dimension(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = torch.block_diag(*[hadamard(8)] * 3)
    rotated = rotate(x, 8, dim)
    torch.testing.assert_close(rotated, (x.movedim(dim, -1) @ whole).movedim(-1, dim))
    assert rotated.is_contiguous()
    torch.testing.assert_close(rotate(rotated, 8, dim), x)


def test_a_wide_channel_is_spread_and_a_mean_stays_as_it_is() -> None:
    wide = torch.zeros(1, 64)
    wide[0, 5] = 8.0
    torch.testing.assert_close(rotate(wide, 64, -1).abs(), torch.ones(1, 64))
    torch.testing.assert_close(rotate(torch.full((1, 64), 3.0), 64, -1).abs(), torch.full((1, 64), 3.0))


def test_gradients_flow_after_a_first_use_in_inference_mode() -> None:
    hadamard.cache_clear()
    with torch.inference_mode():
        rotate(torch.ones(1, 8), 8, -1)
    x = torch.ones(1, 8, requires_grad=True)
    rotate(x, 8, -1).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(1, 8))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((64,), 64), ((1280,), 256), ((320,), 64), ((96, 64), 32), ((96, 72), 8), ((12,), None), ((64, 3), None)],
)
def test_the_largest_block_that_divides_all(sizes: tuple[int, ...], expected: int | None) -> None:
    assert block_of(sizes) == expected


@pytest.mark.parametrize("block", [0, 1, 3, 16])
def test_other_blocks_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=rf"^rotations of {block} channels: allowed are powers of two that divide 24 and 8$"):
        check_block(block, (24, 8))
