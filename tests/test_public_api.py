"""The public names exist, and the README's Python example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qncd

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.parametrize("name", qncd.__all__)
def test_name_exists(name: str) -> None:
    assert getattr(qncd, name) is not None
    assert name in dir(qncd)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        qncd.quantise_  # noqa: B018


def test_readme_example(make_unet: Any) -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example
    generator = torch.Generator().manual_seed(0)
    unet, x, t = make_unet(), torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4) * 200
    before = unet(x, t).sample
    exec(example[1], {"unet": unet, "x": x, "t": t})
    after = unet(x, t).sample
    assert 1e-4 < (after - before).square().mean() / before.square().mean() < 0.2
