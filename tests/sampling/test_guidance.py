"""Conditions are checked when they are made, and guidance is the formula."""

from __future__ import annotations

import pytest
import torch

from qncd.sampling.guidance import Conditions, guide

CONTEXTS, NOTHING = torch.arange(24.0).view(3, 2, 4), torch.zeros(1, 2, 4)


def test_guidance_goes_past_the_conditional_prediction() -> None:
    uncond, cond = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0])
    assert guide(uncond, cond, 3.0).tolist() == [4.0, 5.0]
    assert guide(uncond, cond, 1.0).equal(cond) and guide(uncond, cond, 0.0).equal(uncond)


def test_rows_keep_what_all_images_share() -> None:
    conditions = Conditions(CONTEXTS, NOTHING, 2.0)
    part = conditions[[2, 0]]
    assert len(conditions) == 3 and part.cond.equal(CONTEXTS[[2, 0]]) and part.uncond is NOTHING and part.scale == 2.0


@pytest.mark.parametrize(("uncond", "scale", "guided"), [(None, 1.0, False), (NOTHING, 1.0, False), (NOTHING, 1.5, True)])
def test_both_halves_are_called_where_they_differ(uncond: torch.Tensor | None, scale: float, guided: bool) -> None:
    assert Conditions(CONTEXTS, uncond, scale).guided is guided


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^uncond of shape \(3, 2, 4\): expected \(1, 2, 4\)$"):
        Conditions(CONTEXTS, CONTEXTS)
    with pytest.raises(ValueError, match=r"^guidance scale 1\.5 needs the unconditional context; allowed without it is 1$"):
        Conditions(CONTEXTS, None, 1.5)
    Conditions(torch.tensor([3, 1]))  # class labels
