"""GPTQ: the weights of a layer rounded one input at a time, every error made up for by the weights that are still to come.

A layer with weights W sees inputs x that are rounded (x_q) where the full-precision one sees x_f. What it should give is
W x_f; what rounded weights Q can give is Q x_q. With G = E[x_q x_q^T] and C = E[x_f x_q^T], the weights that come nearest
without rounding are T = W C G^-1 (least squares), and rounding them costs (T - Q) G (T - Q)^T more, which GPTQ (arXiv
2210.17323) makes small input by input. That the target is W x_f and not W x_q is the idea of GPTAQ (arXiv 2504.02692).

With G = L L^T the cost is |L^T (T - Q)^T|^2, and row j of that product holds errors of the inputs j and later alone: from
the last input to the first, each weight is rounded to where it cancels best what is there already. This is GPTQ's
recursion without its inverse of G.

How long the steps of a row are is settled by the same cost: the row is rounded on finer and coarser grids, and the one on
which it comes out cheapest is kept. A range of least error of the weights alone does not know which of them matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qncd.quant.affine import Codes

BLOCK = 128  # inputs whose errors are passed on together
ROWS = 1024  # of a matrix that are looked at together: beside matrices of gigabytes, no second one for a moment
DAMPING = 0.01  # of the mean of the gram matrix's diagonal
RIDGES = 16  # each ten times the one before: those that are tried


def solve_rounding(
    weight: Tensor,
    scale: Tensor,
    codes: Codes,
    gram: Tensor,
    cross: Tensor | None = None,
    damping: float = DAMPING,
    grids: Sequence[float] = (1.0,),
    stored: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[Tensor, Tensor]:
    """Weights on their grid that give on rounded inputs what `weight` gives on exact ones, as nearly as GPTQ finds.

    Args:
        weight: (O, n).
        scale: (O, n) or what broadcasts to it, the steps of the grid.
        codes: of the weights, symmetric: value = code * scale.
        gram: (n, n), E[x_q x_q^T].
        cross: (n, n), E[x_f x_q^T]; None for inputs that are not rounded, where it is `gram`.
        damping: added to the gram matrix's diagonal, as a part of the diagonal's mean; it holds `weight` where inputs say little.
            More is added to a matrix that rounding errors have left without a Cholesky factor.
        grids: factors of `scale` to try.
        stored: what a grid's steps become once they are written down.

    Takes memory for one more matrix of (n, n), and some ten of (O, n).

    Returns:
        codes (O, n) of the weights, packed, and the factor of each row's grid (O,), of the dtype of `gram`: the weights are
        codes * stored(scale * factor).

    Raises:
        ValueError: `gram` or `cross` holds NaN or infinity, or the weights that come nearest are no finite numbers.
    """
    if not all(_is_finite(matrix) for matrix in (gram, gram if cross is None else cross)):
        raise ValueError("the layer's inputs hold NaN or infinity")
    order = gram.diagonal().argsort()  # the inputs that carry most are rounded first: all others can make up for them
    work = weight.T[order].to(gram.dtype)  # (n, O): an input's weights lie side by side, as they are rounded together
    wanted = None if cross is None else _ordered(cross.T, order) @ work
    factor, ridge = _damped_factor(gram, order, damping)
    if wanted is not None:
        wanted += ridge * work
        half_way = torch.linalg.solve_triangular(factor, wanted, upper=False)  # cholesky_solve copies the factor
        work = torch.linalg.solve_triangular(factor.T, half_way, upper=True).contiguous()
    steps = scale.expand_as(weight).T[order].to(work)
    chosen = torch.ones_like(work[0])
    best, least = torch.zeros_like(work, dtype=torch.int8), torch.full_like(chosen, torch.inf, dtype=torch.float64)
    for grid in grids:
        found, cost = _round_backwards(work, stored(steps * grid), codes, factor)
        better = cost < least
        best = torch.where(better, found, best)
        least, chosen = torch.where(better, cost, least), torch.where(better, grid, chosen)
    if not bool(torch.isfinite(least).all()):
        raise ValueError("the error of its rounded weights is NaN or infinite")
    result = torch.empty_like(best)
    result[order] = best
    return result.T.contiguous(), chosen


def _is_finite(matrix: Tensor) -> bool:
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(ROWS))


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """The rows and columns of a matrix in another order: a new one, column by column in memory, to be factorized in place."""
    columns = torch.empty_like(matrix.T, memory_format=torch.contiguous_format)
    for part, chosen in zip(columns.split(ROWS), order.split(ROWS), strict=True):
        part.copy_(matrix[:, chosen][order].T)
    return columns.T


def _damped_factor(gram: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """L with L L^T = gram + ridge, rows and columns in `order`, and the ridge: the smallest of those tried that leaves the matrix
    positive definite.
    """
    diagonal = gram.diagonal()[order]
    mean = float(diagonal.clamp(min=0).mean())
    ridge = max(damping * mean, torch.finfo(gram.dtype).tiny) if mean else 1.0  # all inputs 0: any leaves the weight as it is
    added = 0.0
    for _ in range(RIDGES):
        diagonal.add_(ridge - added)
        factor, failed_at = _ordered(gram, order), torch.empty((), dtype=torch.int32, device=gram.device)
        factor.diagonal().copy_(diagonal)
        torch.linalg.cholesky_ex(factor, out=(factor, failed_at))
        if int(failed_at) == 0 and _is_finite(factor):
            return factor, ridge
        ridge, added = 10 * ridge, ridge
    raise ValueError("the Gram matrix of its inputs is not positive definite")


def _round_backwards(target: Tensor, scale: Tensor, codes: Codes, factor: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ from the last input to the first: target and scale (n, O), one row for each input, factor (n, n) lower triangular.

    Returns:
        codes (n, O), packed, and what they cost (O,), float64: of what they leave of the target, E, the squares of L^T E.
    """
    found = torch.zeros_like(target, dtype=torch.int8)
    errors = torch.zeros_like(target)  # E, of the inputs done
    cost = torch.zeros_like(target[0], dtype=torch.float64)
    diagonal = factor.diagonal()
    for stop in range(len(target), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        passed_on = factor[stop:, start:stop].T @ errors[stop:]
        for j in range(stop - 1, start - 1, -1):
            aim = passed_on[j - start].div_(diagonal[j]).add_(target[j])
            code = codes.round_(aim / scale[j]).clamp_(codes.qmin, codes.qmax)
            found[j] = codes.pack(code)
            rounded = code.mul_(scale[j])
            torch.sub(target[j], rounded, out=errors[j])
            aim.sub_(rounded)  # what L^T E is here, over the diagonal of L: the inputs before add nothing
            if j > start:
                passed_on[: j - start].addr_(factor[j, start:j], errors[j])
        cost += passed_on.mul_(diagonal[start:stop, None]).square_().sum(0)
    return found, cost
