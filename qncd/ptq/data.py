"""The calibration set: inputs of the network along its own trajectories, collected, read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qncd.models.files.unpickle import load_checkpoint
from qncd.models.network import Inputs, Network
from qncd.recipe import check_int
from qncd.sampling.samplers import StepState

CONDITION = "encoder_hidden_states"  # what `cs` and `ucs` of Q-Diffusion's files are, where the network does not say otherwise


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the network along its own trajectories.

    Attributes:
        x: (N, ...) noisy samples, as the network gets them.
        t: (N,) time steps, int64 or float32.
        inputs: every other tensor that the network is called with, by name (`qncd.models.network.Inputs`), (M, ...) each. They
            repeat: input i has row i mod M, so a set of M trajectories holds each condition once.
        uncond: the same for the unconditional half of guidance, or None where there is none, or x holds both halves.
        constants: arguments that are no tensors, the same in all calls.
        model_hash: of the full-precision weights that made the set, or None where that is not known.
    """

    x: Tensor
    t: Tensor
    inputs: Inputs = field(default_factory=dict)
    uncond: Inputs | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str | None = None

    def __post_init__(self) -> None:
        if self.x.ndim < 2 or len(self.x) == 0:
            raise ValueError(f"calibration inputs of shape {tuple(self.x.shape)}: expected (N, ...), N 1 or more")
        if len(self.t) != len(self.x):
            raise ValueError(f"calibration t has {len(self.t)} entries for {len(self.x)} inputs")
        if not isinstance(self.inputs, Mapping):
            raise ValueError("calibration inputs: expected a mapping from names to tensors, e.g. {'encoder_hidden_states': ...}")
        for name, value in [*self.inputs.items(), *(self.uncond or {}).items()]:
            if value.ndim == 0 or len(value) == 0 or len(self.x) % len(value):
                count = len(value) if value.ndim else "no"
                raise ValueError(f"calibration {name} has {count} entries for {len(self.x)} inputs")
        if self.uncond is not None and self.uncond.keys() != self.inputs.keys():
            raise ValueError(f"calibration uncond has {sorted(self.uncond)}, inputs have {sorted(self.inputs)}")
        if not bool(torch.isfinite(self.x).all()):
            raise ValueError("the calibration inputs hold NaN or infinity")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def passed(self) -> int:
        """Inputs that the network gets in one pass over the set: twice its length with guidance."""
        return len(self) * (1 if self.uncond is None else 2)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """(x, t, inputs) batches; with `uncond`, conditional and unconditional halves are stacked."""
        for start in range(0, len(self), size):
            rows = torch.arange(start, min(start + size, len(self)))
            rows = rows if order is None else order[rows]
            x, t, inputs = self.x[rows], self.t[rows], _repeated(self.inputs, rows)
            if self.uncond is not None:
                uncond = _repeated(self.uncond, rows)
                x, t = torch.cat([x, x]), torch.cat([t, t])
                inputs = {name: torch.cat([value, uncond[name]]) for name, value in inputs.items()}
            yield x, t, inputs

    def subset(self, rows: Tensor) -> CalibrationSet:
        """The inputs of some rows (n,) with their conditions."""
        uncond = None if self.uncond is None else _repeated(self.uncond, rows)
        return CalibrationSet(self.x[rows], self.t[rows], _repeated(self.inputs, rows), uncond, self.constants, self.model_hash)

    def spread(self, count: int) -> CalibrationSet:
        """About `count` inputs, evenly over the set: all time steps in proportion."""
        return self.subset(torch.arange(0, len(self), max(1, len(self) // count)))

    def check_model(self, network: Network, model_hash: str | None = None) -> None:
        """Raise ValueError where the set can't be of this model: other channels, size, conditions or weights."""
        config, condition = network.config, network.condition
        channels, size = config.get("in_channels"), config.get("sample_size")
        images = self.x.ndim == 4 and channels is not None and network.channel_dim == 1
        sides = (size, size) if isinstance(size, int) else tuple(size or self.x.shape[2:])
        whole = condition == CONDITION or tuple(self.x.shape[2:]) == sides  # text models take other sizes too
        if images and (self.x.shape[1] != channels or not whole):
            raise ValueError(
                f"the calibration set holds inputs of shape {tuple(self.x.shape[1:])}, the model takes {(channels, *sides)}"
            )
        if condition is not None and condition not in self.inputs:
            raise ValueError(f"the calibration set has no {condition}, the model needs them")
        if model_hash and self.model_hash and model_hash != self.model_hash:
            raise ValueError(
                f"the calibration set was sampled from another model (weights {self.model_hash[:12]}, this one {model_hash[:12]})"
            )


def _repeated(inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows % len(value)] for name, value in inputs.items()}


def save_calibration(data: CalibrationSet, path: Path) -> None:
    """Write a set in Q-Diffusion's layout: a dict of lists with one entry a time step, `xs`, `ts`, `cs`, `ucs`.

    `cs` and `ucs` are the conditions of a network with one, whose name is beside them; several are lists by name below `inputs`
    and `uncond`.
    """
    lists: dict[str, Any] = {"xs": [], "ts": []}
    rows = [(data.t == t).nonzero()[:, 0] for t in dict.fromkeys(data.t.tolist())]
    for key, value in (("xs", data.x), ("ts", data.t)):
        lists[key] = [value[r] for r in rows]
    for key, name, given in (("cs", "inputs", data.inputs), ("ucs", "uncond", data.uncond or {})):
        written = {condition: _condition_lists(value, rows) for condition, value in given.items()}
        if len(written) == 1:
            lists["condition"], lists[key] = next(iter(written.items()))
        elif written:
            lists[name] = written
    if data.constants:
        raise ValueError(f"a calibration set with arguments that are no tensors is not written: {', '.join(data.constants)}")
    if data.model_hash:
        lists["model_hash"] = data.model_hash
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    torch.save(lists, partial)
    partial.replace(path)


def _condition_lists(value: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """The conditions of each time step; one tensor for all where they are the same, which torch.save writes once."""
    if len(value) == 1:
        return [value.expand(len(r), *value.shape[1:]) for r in rows]
    whole = torch.arange(len(value))
    return [value if torch.equal(r % len(value), whole) else value[r % len(value)] for r in rows]


def load_calibration(path: Path, samples: int, steps: int, condition: str | None = None) -> CalibrationSet:
    """Read a set in Q-Diffusion's layout: `steps` of its time steps, evenly spread, `samples` inputs at each.

    No code in the file is executed.

    Args:
        condition: what `cs` and `ucs` are where the file does not say; by default a context.

    Raises:
        ValueError: not such a file, or it holds fewer time steps or inputs than asked for.
    """
    check_int("cali_n", samples, 1)
    check_int("cali_st", steps, 1)
    content = load_checkpoint(path)
    if not isinstance(content, dict) or "xs" not in content or "ts" not in content:
        raise ValueError(f"{path}: not a calibration set (expected a dict with lists xs and ts, one entry a time step)")
    available = len(content["ts"])
    if len(content["xs"]) != available:
        raise ValueError(f"{path}: {len(content['xs'])} entries in xs, {available} in ts")
    if available < steps:
        raise ValueError(f"{path}: holds {available} time steps, --cali_st {steps} asked for; allowed are 1 to {available}")
    chosen = [i * available // steps for i in range(steps)]

    def gather(key: str, entries: Any) -> Tensor | None:
        if entries is None:
            return None
        parts = [torch.as_tensor(entries[i]) for i in chosen]
        if any(p.ndim == 0 or len(p) < samples for p in parts):
            fewest = min(len(p) if p.ndim else 1 for p in parts)
            raise ValueError(f"{path}: {key} holds {fewest} inputs a time step, --cali_n {samples} asked for")
        return torch.cat([p[:samples] for p in parts])

    def gather_conditions(key: str, entries: Any) -> Tensor | None:
        if entries is not None and all(_same_conditions(entries[i], entries[chosen[0]], samples) for i in chosen):
            first = torch.as_tensor(entries[chosen[0]])[:samples]
            return first[:1] if _same_conditions(first, first[:1].expand_as(first), samples) else first
        return gather(key, entries)

    def named(single: str, several: str) -> dict[str, Tensor]:
        name = content.get("condition", condition or CONDITION)
        entries = {name: content[single]} if content.get(single) is not None else dict(content.get(several) or {})
        found = {key: gather_conditions(single, value) for key, value in entries.items()}
        return {key: value for key, value in found.items() if value is not None}

    x, t = gather("xs", content["xs"]), gather("ts", content["ts"])
    assert x is not None and t is not None
    model_hash = content.get("model_hash")
    t = t.float() if t.is_floating_point() and bool((t != t.round()).any()) else t.long()
    uncond = named("ucs", "uncond") or None
    inputs = named("cs", "inputs")
    return CalibrationSet(x.float(), t, inputs, uncond, {}, model_hash if isinstance(model_hash, str) else None)


def _same_conditions(one: Any, other: Any, samples: int) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.ndim > 0 and len(one) >= samples and torch.equal(one[:samples], other[:samples])


class CalibrationCollector:
    """A sampler callback that keeps the network's inputs at evenly spread steps.

    Args:
        total_steps: of the sampler.
        steps: how many to keep. Raises ValueError where there are fewer.
    """

    def __init__(self, total_steps: int, steps: int) -> None:
        if not 1 <= steps <= total_steps:
            raise ValueError(f"cali_st {steps}: the sampler takes {total_steps} steps; allowed are 1 to {total_steps}")
        # The middle of each of `steps` equal parts: neither end of the trajectory is favoured.
        self.kept = {(2 * i + 1) * total_steps // (2 * steps) for i in range(steps)}
        self.inputs: dict[int, list[Tensor]] = {}  # by the step's index: spacings may visit a time step twice
        self.times: dict[int, float] = {}

    def __call__(self, state: StepState) -> None:
        if state.step.index in self.kept:
            self.inputs.setdefault(state.step.index, []).append(state.x.cpu())
            self.times[state.step.index] = state.step.t

    def result(self, inputs: Inputs, uncond: Inputs | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The set collected; `inputs` and `uncond` hold one row a trajectory, or one for all."""
        parts = {index: torch.cat(xs) for index, xs in self.inputs.items()}
        times = torch.cat([torch.full((len(x),), self.times[index]) for index, x in parts.items()])
        return CalibrationSet(torch.cat(list(parts.values())), times, inputs, uncond, {}, model_hash)
