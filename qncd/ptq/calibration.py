"""The calibration set, where it comes from, and the ranges that it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qncd.models.files.unpickle import load_checkpoint
from qncd.quant.convert import UNet, act_quantizers, observing, quant_layers, set_stage
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.recipe import check_int
from qncd.sampling.samplers import StepState

Progress = Callable[[int, int], None]
WeightCorrection = Callable[[UNet, "CalibrationSet", int], None]
RUNNING_BATCH = 16  # inputs by which "running" ranges move once, as in Q-Diffusion's code
BIAS_INPUTS = 128  # inputs that bias correction looks at


def call_unet(unet: UNet, x: Tensor, t: Tensor | int, cond: Tensor | None = None) -> Tensor:
    """eps(x, t, cond): `cond` is the context of a UNet2DConditionModel, the class labels of a UNet2DModel."""
    if "cross_attention_dim" in unet.config:
        return unet(x, t, encoder_hidden_states=cond).sample
    return unet(x, t, class_labels=cond).sample


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the network along its own trajectories.

    Attributes:
        x: (N, C, H, W) noisy samples.
        t: (N,) int64 time steps.
        cond: (M, ...) contexts or class labels, or None. They repeat: input i has the condition i mod M, so a set of
            M trajectories holds each of them once.
        uncond: the same for the unconditional half of guidance, or None.
        model_hash: of the full-precision weights that made the set, or None where that is not known.
    """

    x: Tensor
    t: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None
    model_hash: str | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or len(self.x) == 0:
            raise ValueError(f"calibration inputs of shape {tuple(self.x.shape)}: expected (N, C, H, W), N 1 or more")
        if len(self.t) != len(self.x):
            raise ValueError(f"calibration t has {len(self.t)} entries for {len(self.x)} inputs")
        for name in ("cond", "uncond"):
            value = getattr(self, name)
            if value is not None and (len(value) == 0 or len(self.x) % len(value)):
                raise ValueError(f"calibration {name} has {len(value)} entries for {len(self.x)} inputs")
        if not bool(torch.isfinite(self.x).all()):
            raise ValueError("the calibration inputs hold NaN or infinity")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def inputs(self) -> int:
        """Inputs that the network gets in one pass over the set: twice its length with guidance."""
        return len(self) * (2 if self.cond is not None and self.uncond is not None else 1)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(x, t, cond) batches; with `uncond`, conditional and unconditional halves are stacked."""
        for start in range(0, len(self), size):
            rows = torch.arange(start, min(start + size, len(self)))
            rows = rows if order is None else order[rows]
            x, t, cond = self.x[rows], self.t[rows], _repeated(self.cond, rows)
            uncond = _repeated(self.uncond, rows)
            if cond is not None and uncond is not None:
                x, t, cond = torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, uncond])
            yield x, t, cond

    def subset(self, rows: Tensor) -> CalibrationSet:
        """The inputs of some rows (n,) with their conditions."""
        return CalibrationSet(
            self.x[rows], self.t[rows], _repeated(self.cond, rows), _repeated(self.uncond, rows), self.model_hash
        )

    def spread(self, count: int) -> CalibrationSet:
        """About `count` inputs, evenly over the set: all time steps in proportion."""
        return self.subset(torch.arange(0, len(self), max(1, len(self) // count)))

    def check_model(self, unet: UNet, model_hash: str | None = None) -> None:
        """Raise ValueError where the set can't be of this model: other channels, size, conditions or weights."""
        channels, size = unet.config["in_channels"], unet.config["sample_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size or self.x.shape[2:])
        if self.x.shape[1] != channels or (tuple(self.x.shape[2:]) != sides and "cross_attention_dim" not in unet.config):
            raise ValueError(
                f"the calibration set holds inputs of shape {tuple(self.x.shape[1:])}, the model takes {(channels, *sides)}"
            )
        if "cross_attention_dim" in unet.config and self.cond is None:
            raise ValueError("the calibration set has no conditions (cs), the model needs them")
        if model_hash and self.model_hash and model_hash != self.model_hash:
            raise ValueError(
                f"the calibration set was sampled from another model (weights {self.model_hash[:12]}, this one {model_hash[:12]})"
            )


def _repeated(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value[rows % len(value)]


def save_calibration(data: CalibrationSet, path: Path) -> None:
    """Write a set in Q-Diffusion's layout: a dict of lists with one entry a time step, `xs`, `ts`, `cs`, `ucs`."""
    lists: dict[str, list[Tensor] | str] = {"xs": [], "ts": []}
    rows = [(data.t == t).nonzero()[:, 0] for t in dict.fromkeys(data.t.tolist())]
    for key, value in (("xs", data.x), ("ts", data.t)):
        lists[key] = [value[r] for r in rows]
    for key, conditions in (("cs", data.cond), ("ucs", data.uncond)):
        if conditions is not None:
            lists[key] = _condition_lists(conditions, rows)
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


def load_calibration(path: Path, samples: int, steps: int) -> CalibrationSet:
    """Read a set in Q-Diffusion's layout: `steps` of its time steps, evenly spread, `samples` inputs at each.

    No code in the file is executed.

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

    def gather(key: str) -> Tensor | None:
        entries = content.get(key)
        if entries is None:
            return None
        parts = [torch.as_tensor(entries[i]) for i in chosen]
        if any(p.ndim == 0 or len(p) < samples for p in parts):
            fewest = min(len(p) if p.ndim else 1 for p in parts)
            raise ValueError(f"{path}: {key} holds {fewest} inputs a time step, --cali_n {samples} asked for")
        return torch.cat([p[:samples] for p in parts])

    def gather_conditions(key: str) -> Tensor | None:
        entries = content.get(key)
        if entries is not None and all(_same_conditions(entries[i], entries[chosen[0]], samples) for i in chosen):
            first = torch.as_tensor(entries[chosen[0]])[:samples]
            return first[:1] if _same_conditions(first, first[:1].expand_as(first), samples) else first
        return gather(key)

    x, t = gather("xs"), gather("ts")
    assert x is not None and t is not None
    model_hash = content.get("model_hash")
    cond, uncond = gather_conditions("cs"), gather_conditions("ucs")
    return CalibrationSet(x.float(), t.long(), cond, uncond, model_hash if isinstance(model_hash, str) else None)


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
        self.times: dict[int, int] = {}

    def __call__(self, state: StepState) -> None:
        if state.step.index in self.kept:
            self.inputs.setdefault(state.step.index, []).append(state.x.cpu())
            self.times[state.step.index] = state.step.t

    def result(self, cond: Tensor | None = None, uncond: Tensor | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The set collected; `cond` and `uncond` hold one condition a trajectory, or one for all."""
        parts = {index: torch.cat(xs) for index, xs in self.inputs.items()}
        times = torch.cat([torch.full((len(x),), self.times[index]) for index, x in parts.items()])
        return CalibrationSet(torch.cat(list(parts.values())), times, cond, uncond, model_hash)


@torch.no_grad()
def calibrate_(
    unet: UNet,
    data: CalibrationSet,
    batch_size: int = 32,
    progress: Progress | None = None,
    correct: WeightCorrection | None = None,
) -> float:
    """Find every range from the whole set, round the weights, and switch the model over to quantized, in place.

    Args:
        unet: prepared by `quantize_`, smoothed or not.
        data: its inputs; all of them pass every observer once, in floating point.
        batch_size: inputs a forward pass; the result depends on it only for "running" ranges.
        progress: called with (inputs done, inputs in all).
        correct: what to do about the rounding errors once all ranges are known, before the weights are rounded:
            `correct_biases_` or `compensate_`.

    Returns:
        seconds taken.

    Raises:
        ValueError: the set does not fit the model; a weight or an activation is NaN or infinite.
    """
    start = time.perf_counter()
    data.check_model(unet)
    find_ranges_(unet, data, batch_size, progress)
    if correct:
        correct(unet, data, batch_size)
    for layer in quant_layers(unet).values():
        layer.quantize_weight_()
    set_stage(unet, Stage.QUANTIZE)
    return time.perf_counter() - start


@torch.no_grad()
def find_ranges_(unet: UNet, data: CalibrationSet, batch_size: int, progress: Progress | None = None) -> None:
    """Find the scales of weights and activations and leave both as they are. Arguments and errors as `calibrate_`."""
    layers = quant_layers(unet)
    if not layers:
        raise ValueError("calibrate_ works on a model prepared by quantize_")
    for name, layer in layers.items():
        named(name, layer.search_weight_range_)
    for name, quantizer in observe_(unet, data, batch_size, progress).items():
        named(name, quantizer.finish_observing)


@torch.no_grad()
def observe_(unet: UNet, data: CalibrationSet, batch_size: int, progress: Progress | None = None) -> dict[str, ActQuantizer]:
    """Show every activation quantizer the whole set in floating point. Returns them by name, in the order in which they run.

    The observers stay in the quantizers, until `finish_observing` makes ranges of them.
    """
    quantizers = act_quantizers(unet)
    if not quantizers:
        return {}
    # A moving average forgets: over a set in the order of its time steps it would hold the last ones' extremes alone.
    running = any(quantizer.act_range == "running" for quantizer in quantizers.values())
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)) if running else None
    first: dict[str, None] = {}  # in which they run: the first to see NaN is the one to name
    handles = [q.register_forward_hook(lambda *_, name=name: first.setdefault(name)) for name, q in quantizers.items()]
    with hooked(handles), observing(unet):
        # A moving average over single inputs' extremes would clip them all: it moves once for RUNNING_BATCH inputs.
        group = max(1, RUNNING_BATCH // batch_size) if running else 1
        passes = _passes(unet, data, batch_size, order)
        total = -(-len(data) // batch_size)
        for count in range(1, total + 1):
            for quantizer in quantizers.values():
                quantizer.more_follows = count % group != 0 and count < total
            done = next(passes)
            if progress:
                progress(done, data.inputs)
        for quantizer in quantizers.values():
            quantizer.more_follows = False
    return {name: quantizers[name] for name in [*first, *(name for name in quantizers if name not in first)]}


@torch.no_grad()
def correct_biases_(unet: UNet, data: CalibrationSet, batch_size: int = 32) -> None:
    """Take the mean rounding error of every layer's output out of its bias, in place; ranges are known, weights still float.

    Each layer is compared with itself on the full-precision network's own activations, so the order of the layers
    does not matter. A deterministic sampler adds such a mean up over all its steps.
    """
    layers = quant_layers(unet)
    sums = {name: torch.zeros(len(layer.weight), dtype=torch.float64, device=unet.device) for name, layer in layers.items()}
    inside = False  # rounding_error calls the layer itself

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal inside
            if not inside:
                inside = True
                sums[name] += layers[name].rounding_error(inputs[0]) * len(inputs[0])
                inside = False

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    part = data.spread(BIAS_INPUTS)  # a mean needs fewer inputs than a range does
    with hooked(handles):
        run_over(unet, part, batch_size)
    for name, layer in layers.items():
        layer.shift_bias_(-sums[name] / part.inputs)


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Within it, the hooks of these handles are in place."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_over(unet: UNet, data: CalibrationSet, batch_size: int) -> None:
    """Run the network over the whole set; what it gives is dropped, hooks do the work."""
    for _ in _passes(unet, data, batch_size):
        pass


def _passes(unet: UNet, data: CalibrationSet, batch_size: int, order: Tensor | None = None) -> Iterator[int]:
    """Run the network over the whole set; yields the number of inputs done after each batch."""
    done = 0
    for x, t, cond in data.batches(batch_size, order):
        call_unet(unet, x.to(unet.device), t.to(unet.device), None if cond is None else cond.to(unet.device))
        done += len(x)
        yield done


def named(name: str, function: Callable[[], None]) -> None:
    """Call it; a ValueError says the name first."""
    try:
        function()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
