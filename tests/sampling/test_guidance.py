"""Conditions are checked when they are made, and guidance is the formula."""

from __future__ import annotations

import pytest
import torch

from qncd.sampling.guidance import Conditions, guide

CONTEXT = "encoder_hidden_states"
CONTEXTS, NOTHING = torch.arange(24.0).view(3, 2, 4), torch.zeros(1, 2, 4)


def test_guidance_goes_past_the_conditional_prediction() -> None:
    uncond, cond = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0])
    assert guide(uncond, cond, 3.0).tolist() == [4.0, 5.0]
    assert guide(uncond, cond, 1.0).equal(cond) and guide(uncond, cond, 0.0).equal(uncond)


def test_rows_keep_what_all_images_share() -> None:
    conditions = Conditions({CONTEXT: CONTEXTS}, {CONTEXT: NOTHING}, 2.0)
    part = conditions[[2, 0]]
    assert len(conditions) == 3 and len(part) == 2 and part.scale == 2.0
    assert part.inputs.keys() == {CONTEXT} and part.inputs[CONTEXT].equal(CONTEXTS[[2, 0]])
    assert part.uncond is not None and part.uncond.keys() == {CONTEXT} and part.uncond[CONTEXT] is NOTHING


@pytest.mark.parametrize(("uncond", "scale", "guided"), [(None, 1.0, False), (NOTHING, 1.0, False), (NOTHING, 1.5, True)])
def test_both_halves_are_called_where_they_differ(uncond: torch.Tensor | None, scale: float, guided: bool) -> None:
    assert Conditions({CONTEXT: CONTEXTS}, None if uncond is None else {CONTEXT: uncond}, scale).guided is guided


def test_refusals() -> None:
    for rows, shape in ((CONTEXTS[:2], r"\(2, 2, 4\)"), (CONTEXTS[..., :3], r"\(3, 2, 3\)"), (NOTHING[:, :1], r"\(1, 1, 4\)")):
        with pytest.raises(ValueError, match=rf"^uncond {CONTEXT} of shape {shape}: expected \(1, 2, 4\)$"):
            Conditions({CONTEXT: CONTEXTS}, {CONTEXT: rows})
    with pytest.raises(ValueError, match=r"^guidance scale 1\.5 needs the unconditional context; allowed without it is 1$"):
        Conditions({CONTEXT: CONTEXTS}, None, 1.5)
    Conditions({"class_labels": torch.tensor([3, 1])})
