"""Passes over the calibration set: what the quantizers see on them, and the ranges that this gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qncd.io.files import first_line
from qncd.models.network import Network
from qncd.ptq.data import CalibrationSet
from qncd.ptq.heap import trim_heap
from qncd.quant.inspection import calibrated_quantizers, observing, quant_layers
from qncd.quant.quantizers import ActQuantizer
from qncd.quant.trajectory import off_trajectory

T = TypeVar("T")
Progress = Callable[[int, int], None]
RUNNING_BATCH = 16  # inputs by which "running" ranges move once, as in Q-Diffusion's code


@torch.no_grad()
def find_ranges_(network: Network, data: CalibrationSet, batch_size: int, progress: Progress | None = None) -> list[str]:
    """Find the scales of weights and activations and leave both as they are.

    Args:
        network: prepared by `quantize_`, smoothed or not.
        data: its inputs; all of them pass every observer once, in floating point.
        batch_size: inputs a forward pass; the result depends on it only for "running" ranges.
        progress: called with (inputs done, inputs in all).

    Returns:
        names of the calibrated activation quantizers that never ran, which have no range: parts that the network does not use,
        such as the projections that an attention processor has its own in the place of.

    Raises:
        ValueError: a weight or an activation is NaN or infinite; the layer or quantizer is named.
    """
    layers = quant_layers(network.module)
    if not layers:
        raise ValueError("ranges are found for a model prepared by quantize_")
    for name, layer in layers.items():
        named(name, layer.search_weight_range_)
        trim_heap()
    observed = observe_(network, data, batch_size, progress)
    for name, quantizer in observed.items():
        named(name, quantizer.finish_observing)
    return [name for name in calibrated_quantizers(network.module) if name not in observed]


@torch.no_grad()
def observe_(
    network: Network, data: CalibrationSet, batch_size: int, progress: Progress | None = None
) -> dict[str, ActQuantizer]:
    """Show every calibrated activation quantizer the whole set in floating point. Returns those that ran by name, in order.

    The observers stay in the quantizers, until `finish_observing` makes ranges of them.
    """
    quantizers = calibrated_quantizers(network.module)
    if not quantizers:
        return {}
    # A moving average forgets: over a set in the order of its time steps it would hold the last ones' extremes alone.
    running = any(quantizer.act_range == "running" for quantizer in quantizers.values())
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)) if running else None
    first: dict[str, None] = {}  # in which they run: the first to see NaN is the one to name
    handles = [q.register_forward_hook(lambda *_, name=name: first.setdefault(name)) for name, q in quantizers.items()]
    with hooked(handles), observing(network.module):
        # A moving average over single inputs' extremes would clip them all: it moves once for RUNNING_BATCH inputs.
        group = max(1, RUNNING_BATCH // batch_size) if running else 1
        passes = _passes(network, data, batch_size, order)
        total = -(-len(data) // batch_size)
        for count in range(1, total + 1):
            for quantizer in quantizers.values():
                quantizer.more_follows = count % group != 0 and count < total
            done = next(passes)
            if progress:
                progress(done, data.passed)
        for quantizer in quantizers.values():
            quantizer.more_follows = False
    for name in quantizers.keys() - first.keys():
        quantizers[name].observers = []
    return {name: quantizers[name] for name in first}


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Within it, the hooks of these handles are in place."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_over(network: Network, data: CalibrationSet, batch_size: int) -> None:
    """Run the network over the whole set; what it gives is dropped, hooks do the work."""
    for _ in _passes(network, data, batch_size):
        pass


def call_on(network: Network, x: Tensor, t: Tensor, inputs: dict[str, Tensor], constants: Any) -> Tensor:
    """The network's prediction for a batch of a calibration set, which is moved to its device and given its precision."""
    device, dtype = network.device, network.dtype
    given = {name: value.to(device, dtype) if value.is_floating_point() else value.to(device) for name, value in inputs.items()}
    others = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in constants.items()}
    with off_trajectory(network.module):
        return network.predict(x.to(device, dtype), t.to(device), given, **others)


def _passes(network: Network, data: CalibrationSet, batch_size: int, order: Tensor | None = None) -> Iterator[int]:
    """Run the network over the whole set; yields the number of inputs done after each batch."""
    done = 0
    for x, t, inputs in data.batches(batch_size, order):
        call_on(network, x, t, inputs, data.constants)
        done += len(x)
        yield done


def named(name: str, function: Callable[[], T]) -> T:
    """What it returns; whatever goes wrong with its numbers is a ValueError of one line that says the name first."""
    try:
        return function()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


@contextmanager
def naming(title: str) -> Iterator[None]:
    """Whatever torch or arithmetic raises in the body becomes a ValueError of one line: the title, the layer, what went wrong."""
    try:
        yield
    except (ArithmeticError, RuntimeError) as error:
        raise ValueError(": ".join(filter(None, [title, _layer_at(error), first_line(error)]))) from error


def _layer_at(error: BaseException) -> str:
    """Name of the innermost module in whose call an error came up, within the outermost; empty where it was in none."""
    called: list[nn.Module] = []
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            called.append(owner)
        trace = trace.tb_next
    return next((name for name, part in called[0].named_modules() if part is called[-1]), "") if called else ""
