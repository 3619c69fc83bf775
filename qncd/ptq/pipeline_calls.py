"""Arguments of a pipeline's calls: for how many images they are, and calls for as many as calibration needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qncd.sampling.pipeline import Row, columns, parameters_of

PROMPT_BATCH = 4  # prompts of a call, at most
# Arguments of a call that may be a list or batch with one for each image. An IP-Adapter's has one for each adapter.
BATCHED = re.compile(r"(?!ip_adapter)(.*_)?(prompt(_\d)?|image|embeds(_\d)?|latents|mask|class_labels)$")
LISTED = (list, tuple, Tensor)


def calls_of(call: Mapping[str, Any], rows: Sequence[Row] | None, samples: int) -> list[dict[str, Any]]:
    """Calls for `samples` images with the same arguments, and with the rows in turn; without rows, of so many images each."""
    calls = []
    for start in range(0, samples, PROMPT_BATCH):
        part = range(start, min(start + PROMPT_BATCH, samples))
        own = columns([rows[i % len(rows)] for i in part]) if rows else {"batch_size": len(part)}
        calls.append({**call, **own})
    return calls


def calls_for(pipe: Any, prompts: Iterable[str] | None, samples: int) -> list[dict[str, Any]]:
    """Calls of a pipeline that make `samples` images, of the prompts in turn. Raises ValueError where it takes no such call."""
    parameters = parameters_of(pipe)
    if prompts is not None:
        texts = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("prompts: expected a sequence of texts, one or more")
        if "prompt" not in parameters:
            raise ValueError(f"{type(pipe).__name__} takes no prompts: give calls=[{{...}}] with what its call takes")
        return calls_of({}, [{"prompt": text} for text in texts], samples)
    if "batch_size" in parameters and "prompt" not in parameters:
        return calls_of({}, None, samples)
    raise ValueError(f"{type(pipe).__name__} needs something to be calibrated on: give prompts=[...] or calls=[{{...}}, ...]")


def checked_calls(calls: Any) -> list[Mapping[str, Any]]:
    """What a user gives as calls. Raises ValueError where these are no mappings of arguments."""
    given = list(calls) if isinstance(calls, Iterable) and not isinstance(calls, (str, Mapping)) else []
    if not given or not all(isinstance(call, Mapping) for call in given):
        raise ValueError("calls: expected a sequence of mappings, one or more: the arguments of the pipeline's calls by name")
    return given


def rows_of_call(call: Mapping[str, Any]) -> int:
    """Images that a call makes, by what it holds a list or batch of."""
    if "batch_size" in call:
        return int(call["batch_size"])
    lengths = [len(value) for name, value in call.items() if BATCHED.match(name) and isinstance(value, LISTED)]
    return max(lengths, default=1) * int(call.get("num_images_per_prompt", 1))


def merged(calls: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """The calls as one that makes `samples` images, theirs in turn.

    Raises:
        ValueError: an argument that is no list or batch differs between them.
    """
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for call in calls for name in call):
        values = [call.get(name) for call in calls]
        if name == "batch_size":
            joined[name] = samples
        elif BATCHED.match(name) and (_is_prompt(name, values[0]) or any(isinstance(value, LISTED) for value in values)):
            joined[name] = _in_turn(name, values, samples)
        elif all(value is values[0] or value == values[0] for value in values):
            joined[name] = values[0]
        elif BATCHED.match(name) and all(isinstance(value, str) for value in values):
            joined[name] = _in_turn(name, values, samples)
        else:
            raise ValueError(f"trajectory tracking runs all calibration calls as one: {name} differs between them")
    if joined.get("num_images_per_prompt", 1) != 1:
        raise ValueError("num_images_per_prompt: allowed in calibration calls with trajectory tracking is 1")
    return joined


def _is_prompt(name: str, value: Any) -> bool:
    return name == "prompt" and isinstance(value, str)  # of which a call has one for each image


def _in_turn(name: str, values: Sequence[Any], samples: int) -> Tensor | list[Any]:
    """So many of what the calls have for their images, in turn."""
    rows = [row for value in values for row in (value if isinstance(value, LISTED) else [value])]
    picked = [rows[i % len(rows)] for i in range(samples)]
    if not all(isinstance(row, Tensor) for row in rows):
        return picked
    if len(shapes := {tuple(row.shape) for row in rows}) > 1:
        raise ValueError(f"{name}: of shapes {sorted(shapes)}, allowed is one for all calls with trajectory tracking")
    return torch.stack(picked)
