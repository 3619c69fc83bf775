"""The calibration set: inputs of the network along its own trajectories, collected, read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.io.files import whole_file
from qncd.models.calls import Inputs
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.network import Network
from qncd.recipe import check_int
from qncd.sampling.samplers import StepState

CONDITION = "encoder_hidden_states"  # what `cs` and `ucs` of Q-Diffusion's files are, where the network does not say otherwise
GOLDEN = (5**0.5 - 1) / 2
_ROWS = 64  # that are looked at together
_LONGEST_NAME = 100  # of a condition
_LARGEST_TIME = 1e6  # of a time step, whatever the model


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the network along its own trajectories.

    Attributes:
        x: (N, ...) noisy samples, as the network gets them.
        t: (N,) time steps, int64 or float32.
        inputs: every other tensor that the network is called with, by name (`qncd.models.network.Inputs`), (M, ...) each. They
            repeat: input i has row i mod M, so a set of M trajectories holds each condition once.
        uncond: the same for the unconditional half of guidance, or None where there is none, or x holds both halves.
        constants: arguments that are the same in all calls: what is no tensor, and tensors that all inputs share (ids of tokens).
        model_hash: of the full-precision weights that made the set, or None where that is not known.
        step_weights: how much the inputs of each time step count, 1 in the mean over the set; None for all alike.
    """

    x: Tensor
    t: Tensor
    inputs: Inputs = field(default_factory=dict)
    uncond: Inputs | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    model_hash: str | None = None
    step_weights: Mapping[float, float] | None = None

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
        if not is_finite(self.x):
            raise ValueError("the calibration inputs hold NaN or infinity")
        for name, value in [*self.inputs.items(), *(self.uncond or {}).items()]:
            if not is_finite(value):
                raise ValueError(f"calibration {name} holds NaN or infinity")

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
        return dataclasses.replace(
            self, x=self.x[rows], t=self.t[rows], inputs=_repeated(self.inputs, rows), uncond=uncond
        )  # fmt: skip

    def weighted(self, by_time: Mapping[float, float]) -> CalibrationSet:
        """The same, with inputs that count by their time steps: as the nearest one says, 1 in the mean."""
        times = torch.tensor(list(by_time), dtype=torch.float64)
        values = torch.tensor(list(by_time.values()), dtype=torch.float64)
        own = {t: float(values[(times - t).abs().argmin()]) for t in self.t.unique().tolist()}
        mean = sum(own[t] for t in self.t.tolist()) / len(self)
        return dataclasses.replace(self, step_weights={t: value / mean for t, value in own.items()} if mean > 0 else None)

    def weights_at(self, t: Tensor) -> Tensor | None:
        """How much inputs at these time steps (n,) of the set count, (n,) float32; None where all count alike."""
        if self.step_weights is None:
            return None
        return torch.tensor([self.step_weights[time] for time in t.tolist()])

    def spread(self, count: int) -> CalibrationSet:
        """`count` inputs, or all where there are no more, evenly over the set: all time steps in proportion."""
        return self.subset(spread(len(self), count))

    def check_model(self, network: Network, model_hash: str | None = None) -> None:
        """Raise ValueError where the set can't be of this model: other channels, size, conditions or weights."""
        config, condition = network.config, network.condition
        channels, size = config.get("in_channels"), config.get("sample_size")
        images = self.x.ndim == 4 and channels is not None and network.channel_dim == 1
        sides = (size, size) if isinstance(size, int) else tuple(size or self.x.shape[2:])
        whole = condition not in (None, "class_labels") or tuple(self.x.shape[2:]) == sides  # text models take other sizes too
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


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_NAME


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite, with the memory of a few rows."""
    return not values.is_floating_point() or all(bool(torch.isfinite(part).all()) for part in values.split(_ROWS))


def _repeated(inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows % len(value)] for name, value in inputs.items()}


def save_calibration(data: CalibrationSet, path: Path) -> None:
    """Write a set in Q-Diffusion's layout: a dict of lists with one entry a time step, `xs`, `ts`, `cs`, `ucs`.

    `cs` and `ucs` are the conditions of a network with one, whose name is beside them; several are lists by name below `inputs`
    and `uncond`.

    Raises:
        ValueError: the set holds arguments that are no tensors; the file cannot be written.
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
    with whole_file(path) as part, part.open("wb") as stream:  # given a name, torch would write that into the file
        torch.save(lists, stream)


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
    try:
        return _Entries(content, samples, steps).read(condition or CONDITION)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Entries:
    """The lists of a file, of which `steps` entries are taken and `samples` rows of each."""

    def __init__(self, content: Mapping[Any, Any], samples: int, steps: int) -> None:
        self.content, self.samples = content, samples
        for key in ("xs", "ts"):
            self._check_list(key, content[key])
        self.available = len(content["ts"])
        if len(content["xs"]) != self.available:
            raise ValueError(f"{len(content['xs'])} entries in xs, {self.available} in ts")
        if self.available < steps:
            raise ValueError(f"holds {self.available} time steps, --cali_st {steps} asked for; allowed are 1 to {self.available}")
        self.chosen = [i * self.available // steps for i in range(steps)]

    def read(self, condition: str) -> CalibrationSet:
        """The set. Raises ValueError that names the key and the entry."""
        name = self.content.get("condition", condition)
        if not _is_name(name):
            raise ValueError("condition: expected the name of an argument of the network")
        x = self._joined(self._tensors("xs", self.content["xs"]), torch.float32)
        t = self._times(self._tensors("ts", self.content["ts"]))
        inputs, uncond = self._conditions("cs", "inputs", name), self._conditions("ucs", "uncond", name)
        model_hash = self.content.get("model_hash")
        return CalibrationSet(x, t, inputs, uncond or None, {}, model_hash if isinstance(model_hash, str) else None)

    def _check_list(self, key: str, entries: Any) -> None:
        if not isinstance(entries, list | tuple | Tensor | np.ndarray) or not getattr(entries, "ndim", 1):
            raise ValueError(f"{key}: expected a list with one entry a time step, not a {type(entries).__name__}")

    def _tensors(self, key: str, entries: Any) -> list[Tensor]:
        """The rows that are taken of each entry that is taken, of one shape and of numbers that are finite."""
        found: list[Tensor] = []
        for index in range(self.available):
            try:
                found.append(torch.as_tensor(entries[index]))
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{key} of step {index}: expected numbers, not a {type(entries[index]).__name__}") from None
        fewest = min((len(found[i]) if found[i].ndim else 1) for i in self.chosen)
        if fewest < self.samples or not all(value.ndim for value in found):
            raise ValueError(f"{key} holds {fewest} inputs a time step, --cali_n {self.samples} asked for")
        first = found[0]
        for index, value in enumerate(found):
            if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
                one, other = (f"{tuple(v.shape)} of {v.dtype}" for v in (value, first))
                raise ValueError(f"{key} of step {index}: {one}, that of step 0 is {other}")
            if value.is_complex() or (key == "xs" and (value.ndim < 2 or not value.is_floating_point())):
                raise ValueError(f"{key} of step {index}: {tuple(value.shape)} of {value.dtype}, expected floats (n, ...)")
        rows = [value[: self.samples] for value in found]
        for index in self.chosen:
            if not is_finite(rows[index]):
                raise ValueError(f"{key} of step {index}: holds NaN or infinity")
        return [rows[index] for index in self.chosen]

    def _joined(self, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        """All rows in one tensor, which is all the memory that it takes."""
        joined = torch.empty(len(rows) * self.samples, *rows[0].shape[1:], dtype=dtype)
        for part, row in zip(joined.split(self.samples), rows, strict=True):
            part.copy_(row)
        return joined

    def _times(self, rows: list[Tensor]) -> Tensor:
        for index, row in zip(self.chosen, rows, strict=True):
            if row.ndim != 1 or row.dtype == torch.bool or bool((row != row[0]).any()):
                raise ValueError(f"ts of step {index}: expected one time step, the same for all inputs")
            if not 0 <= float(row[0]) <= _LARGEST_TIME:
                raise ValueError(f"ts of step {index}: {float(row[0]):g}, allowed are time steps from 0 to {_LARGEST_TIME:g}")
        t = self._joined(rows, torch.float64)
        return t.float() if bool((t != t.round()).any()) else t.long()

    def _conditions(self, single: str, several: str, name: str) -> dict[str, Tensor]:
        """By name: one row where all inputs have the same condition, the rows of one step where all steps have the same."""
        given: Any = {name: self.content[single]} if self.content.get(single) is not None else self.content.get(several)
        if not isinstance(given or {}, Mapping):
            raise ValueError(f"{several}: expected lists by name, not a {type(given).__name__}")
        found: dict[str, Tensor] = {}
        for key, entries in (given or {}).items():
            told = single if self.content.get(single) is not None else f"{several}[{key!r}]"
            if not _is_name(key):
                raise ValueError(f"{several}: expected names of arguments of the network")
            if entries is None:
                continue
            self._check_list(told, entries)
            if len(entries) != self.available:
                raise ValueError(f"{len(entries)} entries in {told}, {self.available} in ts")
            rows = self._tensors(told, entries)
            first = rows[0]
            if not all(torch.equal(row, first) for row in rows):
                found[key] = self._joined(rows, first.dtype)
            else:
                found[key] = first[:1] if torch.equal(first, first[:1].expand_as(first)) else first
        return found


def spread(total: int, count: int) -> Tensor:
    """`count` of `total` rows, or all where there are no more: one of each of so many equal parts.

    Its place in the part changes by the golden ratio. In steps of one size the same few trajectories would be seen at all time
    steps, as these lie one after another in a calibration set, and of two halves of guidance perhaps one alone.
    """
    edges = torch.arange(min(count, total) + 1) * total // min(count, total)
    places = torch.arange(len(edges) - 1, dtype=torch.float64) * GOLDEN % 1
    return edges[:-1] + (places * edges.diff()).long()


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
        self.chosen = {(2 * i + 1) * total_steps // (2 * steps) for i in range(steps)}
        self.inputs: dict[int, list[Tensor]] = {}  # by the step's index: spacings may visit a time step twice
        self.times: dict[int, list[float]] = {}

    @property
    def kept(self) -> tuple[dict[int, list[Any]], ...]:
        return self.inputs, self.times

    def __call__(self, state: StepState) -> None:
        if state.step.index in self.chosen:
            self.inputs.setdefault(state.step.index, []).append(state.x.cpu())
            self.times.setdefault(state.step.index, []).append(state.step.t)

    def result(self, inputs: Inputs, uncond: Inputs | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The set collected; `inputs` and `uncond` hold one row a trajectory, or one for all."""
        parts = {index: torch.cat(xs) for index, xs in self.inputs.items()}
        times = torch.cat([torch.full((len(x),), self.times[index][0]) for index, x in parts.items()])
        return CalibrationSet(torch.cat(list(parts.values())), times, inputs, uncond, {}, model_hash)
