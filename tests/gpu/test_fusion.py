"""Operations that are put off give what they give at once, whoever comes next: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from qncd.engines.triton.deferred import CALL, Deferred, Multiplied, deferred, plain
from qncd.engines.triton.fusion import Fusing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES, TOKENS, WIDTH = 2, 5, 24


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


class Layer:
    """Stands for an integer layer: its product is given, and it counts how often it is computed."""

    def __init__(self, result: Tensor) -> None:
        self.result, self.count = result, 0

    def product(
        self, codes: list[Tensor], gate: Tensor | None, residual: Tensor | None, act: str, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        self.count += 1
        out = self.result[:, None]
        out = out if gate is None else out * gate[:, None, None]
        out = out if residual is None else out + residual
        return {"": out, "silu": F.silu(out), "gelu": F.gelu(out)}[act].to(dtype)

    def __call__(self) -> Tensor:
        work = Multiplied(self, [], self.result.shape)
        return deferred(work, self.result.shape, self.result.dtype, self.result.device)


def modulated(x: Tensor, m: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)) * (1 + m[:, None]) + m[:, None]


def modulated_in_parts(x: Tensor, m: Tensor) -> Tensor:
    """Rows of a larger tensor, one row for all images, and what is no modulation."""
    first, second = torch.cat([m, 2 * m], 1).chunk(2, dim=1)
    normed = F.layer_norm(x, (WIDTH,), weight=m[0], bias=m[1])
    return (normed * first[:, None] + second[:1, None]) * m[0] + x * normed


def written_after(x: Tensor, m: Tensor) -> Tensor:
    """What a norm and an activation wait for changes in place."""
    x, m = x.clone(), m.clone()
    normed, active = F.layer_norm(x, (WIDTH,)) * m[:, None], F.gelu(x, approximate="tanh")
    x += 1
    m.mul_(2)
    return normed + active + x + m[:, None]


def cast(x: Tensor, m: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)).double().float() * m[:, None] + F.silu(x.double()).float()


def heads_first(x: Tensor, m: Tensor) -> Tensor:
    """Axes that lie otherwise in memory."""
    heads = F.layer_norm(x.unflatten(2, (3, 8)).transpose(1, 2), (8,))
    return heads.contiguous().view(IMAGES, -1) + heads.transpose(1, 2).flatten(1) + heads.flatten(1)


def looked_at(x: Tensor, m: Tensor) -> Tensor:
    normed = F.layer_norm(x, (WIDTH,)) / 1
    return (
        torch.cat([normed.transpose(1, 2), normed.transpose(1, 2) * 2]).sum(0)
        + F.silu(F.layer_norm(x.flatten(), (x.numel(),))).sum()
    )


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("function", [modulated, modulated_in_parts, written_after, cast, heads_first, looked_at])
def test_norms_and_activations(function: Callable[[Tensor, Tensor], Tensor], inference: bool) -> None:
    with torch.inference_mode() if inference else torch.no_grad():
        x, m = randn(IMAGES, TOKENS, WIDTH), randn(IMAGES, WIDTH)
        expected = function(x, m)
        with Fusing():
            found = plain(function(x, m))
        torch.testing.assert_close(found, expected)


def gated(a: Any, b: Any, x: Tensor, m: Tensor) -> Tensor:
    return x + m[:, None] * a()


def of_two(a: Any, b: Any, x: Tensor, m: Tensor) -> Tensor:
    return F.silu(a() + b())


def twice(a: Any, b: Any, x: Tensor, m: Tensor) -> Tensor:
    """The first activation is the product's own; the others are of its value."""
    product = a()
    return F.silu(product) + F.gelu(product) + product


def after_a_gate(a: Any, b: Any, x: Tensor, m: Tensor) -> Tensor:
    product = a()
    return product * m[:, None] + product


def residual_written(a: Any, b: Any, x: Tensor, m: Tensor) -> Tensor:
    x = x.clone()
    out = a() + x
    x.zero_()
    return out + x


@pytest.mark.parametrize(
    ("function", "products"),
    [(gated, (1, 0)), (of_two, (1, 1)), (twice, (2, 0)), (after_a_gate, (2, 0)), (residual_written, (1, 0))],
)
def test_products(function: Callable[..., Tensor], products: tuple[int, int]) -> None:
    """Gates, sums and activations go with the product; how often it is computed."""
    x, m = randn(IMAGES, TOKENS, WIDTH), randn(IMAGES, WIDTH)
    layers = Layer(randn(IMAGES, TOKENS, WIDTH) + 1), Layer(randn(IMAGES, TOKENS, WIDTH) - 1)
    expected = function(*layers, x, m)
    for layer in layers:
        layer.count = 0
    with Fusing():
        found = plain(function(*layers, x, m))
    torch.testing.assert_close(found, expected)
    assert tuple(layer.count for layer in layers) == products


def test_pixels_stay_as_they_lie_in_memory() -> None:
    x = randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    with Fusing():
        assert plain(F.silu(x)).is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_that_was_put_off_can_leave() -> None:
    """It is computed when it is used, after the call too."""
    x = randn(IMAGES, TOKENS, WIDTH)
    with Fusing():
        normed = F.layer_norm(x, (WIDTH,))
    assert isinstance(normed, Deferred) and normed.shape == x.shape and normed.dtype == x.dtype
    torch.testing.assert_close(normed + 0, F.layer_norm(x, (WIDTH,)))
    assert CALL.get() is None
