"""What a module was called with comes back row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qncd.ptq.activation_store import CallStore


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.float32, 4)])
def test_calls_come_back_by_rows(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    """Tensors of the batch row by row, all else as it was; what they need is told before it is allocated."""
    needed: list[int] = []

    def spill(count: int) -> Path | None:
        needed.append(count)
        return tmp_path if count > 100 else None

    x, more, steps = torch.arange(30.0).view(5, 3, 2), torch.arange(5.0).view(5, 1), torch.arange(5)
    shared = torch.ones(7, 2)
    store = CallStore(5, spill, dtype)
    for rows in (slice(0, 2), slice(2, 5)):
        store.append([x[rows], shared], {"more": more[rows], "scale": 0.5, "none": None})
    assert needed == [size * 5 * 6, size * 5 * 1]
    args, kwargs = store.batch(torch.tensor([4, 1]), "cpu")
    assert len(args) == 2 and torch.equal(args[0], x[[4, 1]]) and args[0].dtype == torch.float32 and args[1] is shared
    assert kwargs.keys() == {"more", "scale", "none"} and torch.equal(kwargs["more"], more[[4, 1]])
    assert kwargs["scale"] == 0.5 and kwargs["none"] is None
    whole = CallStore(5, spill, dtype)
    whole.append([x], {"steps": steps})
    found = whole.batch(torch.tensor([3, 0]), "cpu")[1]["steps"]
    assert torch.equal(found, steps[[3, 0]]) and found.dtype == torch.int64  # whole numbers are not kept as floats
    nested = CallStore(5, spill, dtype)
    nested.append([x], {"context": (x, [x[:, None], shared])})  # as an IP-Adapter's attention is called
    context = nested.batch(torch.tensor([3]), "cpu")[1]["context"]
    assert isinstance(context, tuple) and torch.equal(context[0], x[[3]]) and torch.equal(context[1][0], x[[3], None])
    assert context[1][1] is shared
    named = CallStore(5, spill, dtype)
    named.append([], {"x": x, "mask": x > 3})  # as a transformer's blocks are called, by names alone
    args, kwargs = named.batch(torch.tensor([3, 0]), "cpu")
    assert args == () and torch.equal(kwargs["mask"], x[[3, 0]] > 3)
