"""Granularities: from a tensor's shape to that of its scales, as torchao's docstrings have them."""

from __future__ import annotations

from typing import Any

import pytest

from qncd.granularity import ACTIVATIONS, WEIGHTS, Granularity, PerGroup, PerRow, PerTensor

CONVOLUTION = (-3, -2, -1)


@pytest.mark.parametrize(
    ("granularity", "shape", "summed", "scales"),
    [
        (PerTensor(), (2, 7, 48), (-1,), (1, 1, 1)),
        (PerRow(), (2, 7, 48), (-1,), (2, 7, 1)),
        (PerRow(), (2, 48), (-1,), (2, 1)),
        (PerRow(), (2, 48, 5, 6), CONVOLUTION, (2, 1, 1, 1)),
        (PerRow(), (2, 3, 7, 8), (-2,), (2, 3, 1, 8)),
        (PerGroup(16), (2, 7, 48), (-1,), (2, 7, 3)),
        (PerGroup(32), (2, 7, 48), (-1,), (2, 7, 2)),
        (PerGroup(64), (2, 7, 48), (-1,), (2, 7, 1)),
        (PerGroup(16), (2, 48, 5, 6), CONVOLUTION, (2, 3, 1, 1)),
    ],
)
def test_shapes_of_scales(granularity: Granularity, shape: Any, summed: Any, scales: Any) -> None:
    assert granularity.scale_shape(shape, summed) == scales


def test_parts_of_a_row() -> None:
    assert PerRow().sizes(70) == [70]
    assert PerGroup(32).sizes(70) == [32, 32, 6] and PerGroup(32).sizes(64) == [32, 32] and PerGroup(32).sizes(9) == [9]


def test_names_in_recipes() -> None:
    assert WEIGHTS["channel"] == ACTIVATIONS["token"] == PerRow()
    assert WEIGHTS["group64"] == ACTIVATIONS["group64"] == PerGroup(64)
    assert ACTIVATIONS["tensor"] == PerTensor() and "token" not in WEIGHTS
