"""The blocks of a network that are reconstructed one after another: which, in what order, and what each gets and should give."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qncd.distributed import Processes
from qncd.models.network import Network
from qncd.ptq.activation_store import DTYPES, ActivationStore, CallStore
from qncd.ptq.bits import counting_multiplications
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import call_on, hooked
from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import HALVES
from qncd.quant.rounding import reconstruction_loss
from qncd.quant.stepwise import select_steps
from qncd.recipe import ReconstructionConfig

HELD_OUT = 8  # one input in so many is kept out of the optimization, to judge it by


class _Reached(Exception):
    """The forward pass has come as far as it has to."""


def reconstruction_units(network: Network) -> dict[str, nn.Module]:
    """The blocks by name, in the order of the modules: what the network's family reconstructs as a whole, and single layers."""
    return {name: unit for name, unit in network.blocks().items() if layers_of(unit)}


def layers_of(module: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers below a module by their names in it; of a layer alone, itself under ""."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantLayer)}


def open_layers(module: nn.Module, rounded: Collection[QuantLayer]) -> dict[str, QuantLayer]:
    """Those of `layers_of` whose rounding is still to be learned."""
    return {
        key: layer for key, layer in layers_of(module).items() if layer.config.weight_codes is not None and layer not in rounded
    }


def execution_order(network: Network, data: CalibrationSet, units: Mapping[str, nn.Module]) -> list[str]:
    """Names of the units in the order in which the network runs them; those that it never runs are left out."""
    order: dict[str, None] = {}
    handles = [unit.register_forward_pre_hook(lambda *_, n=name: order.setdefault(n)) for name, unit in units.items()]
    with hooked(handles), torch.no_grad():
        _run(network, data.subset(torch.tensor([0])), 1)
    return list(order)


@torch.no_grad()
def multiplications(network: Network, data: CalibrationSet, units: Mapping[str, nn.Module]) -> dict[str, float]:
    """Of each unit's layers for one input, and of its quantized attention products."""
    counts: dict[str, int] = {}
    with counting_multiplications(network.module, counts):
        _run(network, data.subset(torch.tensor([0])), 1)
    # Of both products the first operand alone: each names all multiplications.
    once = {name: count for name, count in counts.items() if name.endswith((".act", ".q", ".softmax"))}
    return {unit: float(sum(count for name, count in once.items() if name.startswith(f"{unit}."))) for unit in units}


def joined(output: Any, channel_dim: int) -> Tensor:
    """A block's output as one tensor (N, C, ...): the tokens of several streams side by side, channels in front of tokens."""
    parts = [part for part in output if isinstance(part, Tensor)] if isinstance(output, (tuple, list)) else [output]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return whole.movedim(-1, 1) if channel_dim == -1 and whole.ndim == 3 else whole


def _run(network: Network, data: CalibrationSet, batch_size: int, processes: Processes | None = None) -> None:
    """All batches through the network; of several processes, every one takes its own."""
    for number, (x, t, inputs) in enumerate(data.batches(batch_size)):
        if processes is not None and number % processes.world != processes.rank:
            continue
        try:
            call_on(network, x, t, inputs, data.constants)
        except _Reached:
            continue


def in_float(module: nn.Module, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`changed` parameters and buffers of a module by name and, where the module is in half precision, all others in float32."""
    wide = {name: value.float() for name, value in [*module.named_parameters(), *module.named_buffers()] if value.dtype in HALVES}
    return wide | {name: value.float() if value.dtype in HALVES else value for name, value in changed.items()}


@dataclass(frozen=True)
class BlockData:
    """What a block is called with and should give, over a calibration set: this process's part of it.

    The batches in which the network computed it are the same whatever the number of processes, so its values are too.

    Attributes:
        unit: the block.
        calls: its inputs, the rows of this process.
        targets: the outputs that it should give.
        place: (R,) for every row of the whole set, where it lies in the stores; -1 where another process holds it.
        used: rows of the whole set to optimize over.
        held_out: rows to judge by; the same where the set is too small.
        times: (R,) time steps of the whole set, for quantizers with a range for each.
        weights: (R,) how much every row counts, None where all count alike.
        processes: who shares the set.
        channel_dim: of activations.
    """

    unit: nn.Module
    calls: CallStore
    targets: ActivationStore
    place: Tensor
    used: Tensor
    held_out: Tensor
    times: Tensor
    weights: Tensor | None
    processes: Processes
    channel_dim: int

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Rows of one step, of those to optimize over; the same in all processes."""
        return self.used[torch.randperm(len(self.used), generator=generator)[:batch_size]]

    def outputs(self, rows: Tensor, changed: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """The unit's outputs with some parameters or buffers replaced, and the targets: those of `rows` that lie here."""
        rows = rows[self.place[rows] >= 0]
        select_steps(self.unit, self.times[rows])
        here = self.place[rows]
        args, kwargs = self.calls.batch(here, device)
        output = joined(functional_call(self.unit, in_float(self.unit, changed), args, kwargs), self.channel_dim)
        return output, self.targets.batch(here, device)

    def loss(self, rows: Tensor, changed: Mapping[str, Tensor], p: float = 2.0) -> Tensor:
        """`reconstruction_loss` over `rows`; with several processes their mean is, each sees its own rows alone."""
        here = int((self.place[rows] >= 0).sum())
        first = next(iter(changed.values()))
        if here == 0:
            return 0.0 * torch.stack([value.sum() for value in changed.values()]).sum()
        output, target = self.outputs(rows, changed, first.device)
        weights = self._weights(rows, output)
        return reconstruction_loss(output, target, p, weights) * (self.processes.world * here / len(rows))

    def _weights(self, rows: Tensor, output: Tensor) -> Tensor | None:
        """Of those of `rows` that lie here, as they broadcast against their output."""
        if self.weights is None:
            return None
        return self.weights[rows[self.place[rows] >= 0]].to(output).view(-1, *[1] * (output.ndim - 1))

    @torch.no_grad()
    def error(self, changed: Mapping[str, Tensor], batch_size: int, device: torch.device) -> float:
        """Mean squared error of the unit's output on the held-out rows, relative to the mean square of the target; weighted."""
        totals = torch.zeros(2, dtype=torch.float64)
        mine = self.held_out[self.place[self.held_out] >= 0]
        for rows in mine.split(batch_size) if len(mine) else ():
            output, target = self.outputs(rows, changed, device)
            weights = self._weights(rows, output)
            squares = [(output - target).square(), target.square()]
            totals += torch.stack([(s if weights is None else s * weights).sum() for s in squares]).double().cpu()
        squared, expected = self.processes.average_(totals).tolist()
        return squared / max(expected, 1e-30)


def collect(
    network: Network,
    reference: Network,
    name: str,
    data: CalibrationSet,
    config: ReconstructionConfig,
    folder: Path,
    processes: Processes,
) -> BlockData:
    """A unit's inputs from the network as quantized so far, and its outputs in the full-precision one.

    Raises:
        ValueError: in all processes, where something went wrong in one of them.
    """
    place = _places(data, config.batch_size, processes)
    mine = int((place >= 0).sum())
    dtype, room = DTYPES[config.cache], int(config.memory_gb * 1e9)

    def spill(size: int) -> Path | None:
        nonlocal room
        room -= size
        return None if room >= 0 else folder

    calls = CallStore(mine, spill, dtype)
    stores: list[ActivationStore] = []

    def keep_inputs(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(args, kwargs)
        raise _Reached

    def keep_output(_: nn.Module, __: Any, given: Any) -> None:
        output = joined(given, network.channel_dim)
        if not stores:
            stores.append(ActivationStore(mine, dtype, spill(dtype.itemsize * mine * output[0].numel())))
        stores[0].append(output)
        raise _Reached

    error = None
    try:
        with torch.no_grad():
            with hooked([network.module.get_submodule(name).register_forward_pre_hook(keep_inputs, with_kwargs=True)]):
                _run(network, data, config.batch_size, processes)
            with hooked([reference.module.get_submodule(name).register_forward_hook(keep_output)]):
                _run(reference, data, config.batch_size, processes)
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    processes.agree(error)
    rows = torch.arange(data.passed)
    held_out, used = rows[::HELD_OUT], rows[rows % HELD_OUT != 0] if len(rows) > HELD_OUT else rows
    times = torch.cat([t for _, t, _ in data.batches(config.batch_size)])
    unit, weights = network.module.get_submodule(name), data.weights_at(times)
    return BlockData(unit, calls, stores[0], place, used, held_out, times, weights, processes, network.channel_dim)


def _places(data: CalibrationSet, batch_size: int, processes: Processes) -> Tensor:
    """`BlockData.place`. Raises ValueError for more processes than batches."""
    sizes = [len(x) for x, _, _ in data.batches(batch_size)]
    if len(sizes) < processes.world:
        raise ValueError(
            f"{processes.world} processes for {sum(sizes)} inputs in batches of {batch_size}: allowed are {len(sizes)}"
        )
    mine = torch.cat([torch.full((n,), i % processes.world == processes.rank) for i, n in enumerate(sizes)])
    return torch.where(mine, mine.cumsum(0) - 1, -1)
