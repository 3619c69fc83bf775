"""Which calls of a network are one trajectory: told by the order of their time steps alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.granularity import PER_ROW
from qncd.quant.affine import IntegerRange
from qncd.quant.dynamic import DifferenceQuantizer
from qncd.quant.trajectory import follow_trajectories, off_trajectory


class Seen(DifferenceQuantizer):
    """Writes down what it is told before each call: the call of the time step, and whether a trajectory starts."""

    def __init__(self) -> None:
        super().__init__(IntegerRange(4, False), PER_ROW)
        self.told: list[tuple[int, bool]] = []

    def follow(self, call: int | None, fresh: bool = False) -> None:
        super().follow(call, fresh)
        if call is not None:
            self.told.append((call, fresh))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = Seen()

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        if x.isnan().any():
            raise RuntimeError("no number")
        return self.act(x)


@pytest.fixture
def network() -> Denoiser:
    module = Denoiser()
    follow_trajectories(module, lambda args, kwargs: torch.as_tensor(args[1]))
    return module


FIRST, NEXT = (0, True), (0, False)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([9, 6, 3, 9, 6, 3], [FIRST, NEXT, NEXT] * 2),
        ([0.1, 0.4, 0.9, 0.1, 0.4], [FIRST, NEXT, NEXT, FIRST, NEXT]),  # networks whose time rises
        ([9, 3, 9, 3, 9], [FIRST, NEXT, FIRST, NEXT, FIRST]),  # two steps
        ([9, 9, 6, 6, 9, 9], [FIRST, (1, False), NEXT, (1, False), FIRST, (1, False)]),  # guidance in two calls
        ([9, 6, 6, 3, 9], [FIRST, NEXT, (1, False), NEXT, FIRST]),  # a second call at some steps
        ([9, 6, 3, 1, 5, 4], [FIRST, NEXT, NEXT, NEXT, FIRST, NEXT]),  # image to image starts further down
        ([9] * 257, [FIRST, *((call, False) for call in range(1, 256)), FIRST]),  # a single step
    ],
)
def test_the_order_of_time_steps_tells(times: list[float], told: list[tuple[int, bool]], network: Denoiser) -> None:
    for t in times:
        network(torch.ones(1, 4), t)
    assert network.act.told == told and network.act.call is None


def test_other_calls_leave_the_trajectory_as_it_is(network: Any) -> None:
    x = torch.ones(2, 4)
    network(x, 9)
    with off_trajectory(network):
        network(x, 3)
    network(x, torch.tensor([1, 8]))  # inputs of several time steps are no sampler's
    with pytest.raises(RuntimeError, match="no number"):
        network(x * torch.nan, 6)
    assert network.act.call is None
    network(x, 3)
    assert network.act.told == [FIRST, NEXT, NEXT]


def test_a_copy_starts_anew(network: Any) -> None:
    for t in (9, 6):
        network(torch.ones(1, 4), t)
    twin = copy.deepcopy(network)
    twin(torch.ones(1, 4), 3)
    network(torch.ones(1, 4), 3)
    assert twin.act.told[-1] == FIRST and network.act.told[-1] == NEXT
