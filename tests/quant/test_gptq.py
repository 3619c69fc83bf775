"""GPTQ's recursion, against the paper's own form of it and against rounding to nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.quant.affine import Codes, IntegerRange, fake_quantize
from qncd.quant.float8 import Float8Codes
from qncd.quant.gptq import solve_rounding

CODES = IntegerRange(4, True)


def problem(outputs: int = 5, inputs: int = 300, rows: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (O, n), scale (O, 1) and correlated inputs (M, n)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ (mixing + 0.3)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, weight.abs().amax(1, keepdim=True) / 7, x


def solve(weight: Tensor, scale: Tensor, codes: IntegerRange, *moments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The weights that `solve_rounding` gives codes of, and the factors of their rows' grids."""
    found, factors = solve_rounding(weight, scale, codes, *moments, **options)
    assert found.dtype == torch.int8 and found.shape == weight.shape and factors.shape == (len(weight),)
    return found * (scale * factors[:, None]), factors


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(CODES.qmin, CODES.qmax) * scale


def as_published(weight: Tensor, scale: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with the order of its "act-order" option: one column at a time, by the inverse."""
    order = gram.diagonal().argsort(descending=True)
    work, hessian = weight[:, order].clone(), gram[order][:, order]
    hessian = hessian + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    result = torch.empty_like(work)
    for column in range(work.shape[1]):
        result[:, column] = nearest(work[:, column : column + 1], scale)[:, 0]
        error = (work[:, column] - result[:, column]) / inverse[column, column]
        work[:, column:] -= torch.outer(error, inverse[column, column:])
    out = torch.empty_like(result)
    out[:, order] = result
    return out


def test_the_same_codes_as_the_published_algorithm() -> None:
    weight, scale, x = problem()
    gram = x.T @ x / len(x)
    found, _ = solve(weight, scale, CODES, gram)
    expected = as_published(weight, scale, gram, 0.01)
    assert ((found - expected).abs() > 1e-9).float().mean() < 1e-3  # rounding errors may tip a tie
    assert ((found - nearest(weight, scale)).abs() > 1e-9).float().mean() > 0.05


def test_the_output_is_nearer_than_with_nearest_weights() -> None:
    weight, scale, x = problem()
    found, _ = solve(weight, scale, CODES, x.T @ x / len(x))

    def error(rounded: Tensor) -> float:
        return float((x @ (weight - rounded).T).square().mean())

    assert error(found) < 0.3 * error(nearest(weight, scale))
    codes = found / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert codes.min() >= CODES.qmin and codes.max() <= CODES.qmax


@pytest.mark.parametrize("codes", [CODES, Float8Codes()], ids=["int4", "fp8"])
def test_errors_are_made_up_for_across_groups(codes: Codes) -> None:
    """Groups of 64 inputs, the last one smaller, have scales of their own, whatever the order in which inputs are rounded."""
    weight, _, x = problem()
    weight = weight * torch.linspace(0.2, 5, 300)
    scale = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in weight.split(64, 1)], 1) / codes.qmax
    found, _ = solve_rounding(weight, scale, codes, x.T @ x / len(x))
    rounded = codes.unpack(found).double() * scale

    def error(rounded: Tensor) -> float:
        return float((x @ (weight - rounded).T).square().mean())

    assert error(rounded) < 0.5 * error(fake_quantize(weight, scale, torch.zeros(()), codes))


def test_rounded_inputs_are_made_up_for() -> None:
    """On a grid so fine that rounding the weights costs nothing, the result is the least squares fit."""
    weight, scale, exact = problem(inputs=20)
    generator = torch.Generator().manual_seed(1)
    rounded = 0.8 * exact + 0.5 * torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
    gram, cross = rounded.T @ rounded / len(exact), exact.T @ rounded / len(exact)
    fine = IntegerRange(8, True)
    found, _ = solve(weight, torch.full_like(scale, 0.05), fine, gram, cross, damping=1e-9)
    fit = torch.linalg.lstsq(rounded, exact @ weight.T).solution.T
    wanted = exact @ weight.T

    def error(candidate: Tensor) -> float:
        return float((rounded @ candidate.T - wanted).square().mean())

    assert error(fit) <= error(found) < 1.01 * error(fit) < 0.8 * error(weight)


def test_inputs_that_say_nothing_leave_rounding_to_nearest() -> None:
    weight, scale, _ = problem(inputs=10)
    zeros = torch.zeros(10, 10, dtype=torch.float64)
    torch.testing.assert_close(solve(weight, scale, CODES, zeros, zeros)[0], nearest(weight, scale))
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve(weight, scale, CODES, zeros * torch.nan)


def test_each_row_gets_the_grid_that_costs_least() -> None:
    weight, scale, x = problem()
    gram = x.T @ x / len(x)
    grids = (0.6, 0.8, 1.0)
    found, chosen = solve(weight, scale, CODES, gram, grids=grids)
    codes = found / (scale * chosen[:, None])
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)

    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)

    def costs(rounded: Tensor) -> Tensor:
        return ((weight - rounded) @ damped * (weight - rounded)).sum(1)

    alone = torch.stack([costs(solve(weight, scale * grid, CODES, gram)[0]) for grid in grids])
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(costs(found), alone.min(0).values)
    torch.testing.assert_close(chosen, torch.tensor(grids, dtype=chosen.dtype)[alone.argmin(0)])
