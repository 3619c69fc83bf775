"""BRECQ (arXiv 2102.05426): the rounding of weights learned block by block against the full-precision network.

For each block in the order of the forward pass: its inputs come from the network with the blocks before it already
quantized, its targets from the full-precision network; both are computed once and kept. What is minimized is
|block_q(x_q) - block_fp(x_fp)|^2 + lambda sum(1 - |2h - 1|^beta) over the rounding variables of the block's layers.
Activations stay in floating point meanwhile, as in Q-Diffusion: their ranges are found afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qncd.distributed import OneProcess, Processes
from qncd.io.files import first_line, read_json, remove_leftovers, scratch_folder, write_json
from qncd.models.files.safetensors_files import read_safetensors, write_safetensors
from qncd.models.network import Network
from qncd.ptq.blocks import (
    BlockData,
    collect,
    execution_order,
    layers_of,
    multiplications,
    open_layers,
    reconstruction_units,
)
from qncd.ptq.checkpoint_schema import Rule, scale_rule
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import named
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.rounding import LearnedRounding, learn_roundings_
from qncd.recipe import Recipe, ReconstructionConfig

BlockProgress = Callable[[int, int, float], None]  # (blocks done, blocks in all, seconds left)
ACT_FIELDS = ("act_iterations", "act_lr")  # of ReconstructionConfig: no part of what the weights depend on


@dataclass(frozen=True)
class BlockResult:
    """What reconstructing one block brought.

    Attributes:
        name: of the block.
        before, after: mean squared error of the block's output on held-out inputs, as it was (weights rounded to nearest,
            scales as calibrated) and as learned; relative to the mean square of the target.
        seconds: taken.
        kept: whether what was learned is better and was kept.
    """

    name: str
    before: float
    after: float
    seconds: float
    kept: bool


class TimeLeft:
    """How long the blocks that are left will take: so much each, and so much for what it computes, by those that are done.

    Args:
        order: the blocks as they come.
        multiplications: of each block for one input.
        iterations: of the optimization of each block.
        batch_size: inputs an iteration.
        inputs: that pass the network up to the block, once quantized and once in floating point.
    """

    def __init__(
        self, order: Sequence[str], multiplications: Mapping[str, float], iterations: int, batch_size: int, inputs: int
    ) -> None:
        before, costs = 0.0, dict[str, float]()
        for name in order:
            before += multiplications[name]  # of a forward pass that ends with this block; back-propagation costs two more
            costs[name] = 3 * iterations * min(batch_size, inputs) * multiplications[name] + 2 * inputs * before
        mean = sum(costs.values()) / max(1, len(costs)) or 1.0
        self.costs = {name: cost / mean for name, cost in costs.items()}  # of the blocks to come; 1 for one of mean size
        self.done: list[tuple[float, float]] = []  # cost and seconds

    def skip(self, name: str) -> None:
        """A block that was finished in an earlier run."""
        self.costs.pop(name)

    def add(self, name: str, seconds: float) -> None:
        """A block that took so long."""
        self.done.append((self.costs.pop(name), seconds))

    @property
    def left(self) -> float:
        """Seconds; 0 before the first block is done."""
        if not self.done:
            return 0.0
        costs, seconds = np.array(self.done).T
        # The first blocks are small: their time is that of starting operations, and alone says nothing of large ones.
        each, by_cost = np.linalg.lstsq(np.stack([np.ones_like(costs), costs], 1), seconds, rcond=None)[0]
        if by_cost < 0:
            each, by_cost = seconds.mean(), 0.0
        elif each < 0:
            each, by_cost = 0.0, seconds.sum() / costs.sum()
        return float(each * len(self.costs) + by_cost * sum(self.costs.values()))


def reconstruct_(
    network: Network,
    reference: Network,
    data: CalibrationSet,
    config: ReconstructionConfig,
    progress: BlockProgress | None = None,
    folder: Path | None = None,
    rounded: Collection[QuantLayer] = (),
    processes: Processes | None = None,
) -> list[BlockResult]:
    """Learn the rounding of all weights and round them, in place.

    Args:
        network: prepared by `quantize_`, smoothed or not, its weights in floating point.
        reference: the same network in floating point, e.g. a copy of `network`.
        data: calibration inputs.
        progress: called with (blocks done, blocks in all, seconds left).
        folder: for finished blocks: a run that was cut off goes on after the last one in it.
        rounded: layers whose weights are rounded already and stay as they are.
        processes: who shares the calibration inputs, all with the same arguments; alone by default. The rounding is the
            same for any number of them but for the order of sums. `folder` is the first one's.

    Raises:
        ValueError: names the block at which something went wrong; the folder holds another reconstruction.
    """
    processes = processes or OneProcess()
    data = part_of(data, config)
    units = {name: unit for name, unit in reconstruction_units(network).items() if open_layers(unit, rounded)}
    order = execution_order(network, data, units)
    results: list[BlockResult] = []
    time_left = TimeLeft(order, multiplications(network, data, units), config.iterations, config.batch_size, data.passed)
    settings = {"config": {key: value for key, value in asdict(config).items() if key not in ACT_FIELDS}, "blocks": order}
    done = processes.first(lambda: open_folder(folder, settings, "reconstruction.json", ".safetensors")) if folder else {}
    for count, name in enumerate(order):
        try:
            if name in done:
                rules = _unit_rules(units[name])
                tensors = processes.first(lambda file=done[name], rules=rules: load_block(file, rules))  # type: ignore[misc]
                time_left.skip(name)
            else:
                result = _reconstruct_unit_(network, reference, name, data, config, rounded, processes)
                results.append(result)
                time_left.add(name, result.seconds)
                tensors = processes.share(_unit_tensors(units[name]))
                if folder and processes.is_first:
                    save_block(folder, f"{name}.safetensors", tensors)
            if name in done or processes.world > 1:
                for key, layer in layers_of(units[name]).items():
                    if f"{key}|codes" in tensors:
                        layer.set_weight_codes(tensors[f"{key}|codes"], tensors[f"{key}|scale"])
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"reconstruction of {name}: {first_line(error)}") from None
        if progress:
            progress(count + 1, len(order), time_left.left)
    for name, layer in quant_layers(network.module).items():
        named(name, layer.quantize_weight_)
    return results


def part_of(data: CalibrationSet, config: ReconstructionConfig) -> CalibrationSet:
    """The inputs that reconstruction uses, `config.inputs` of them, evenly spread."""
    return data if config.inputs is None else data.spread(config.inputs)


def _reconstruct_unit_(
    network: Network,
    reference: Network,
    name: str,
    inputs: CalibrationSet,
    config: ReconstructionConfig,
    rounded: Collection[QuantLayer],
    processes: Processes,
) -> BlockResult:
    start = time.perf_counter()
    unit = network.module.get_submodule(name)
    with scratch_folder() as files:
        data = collect(network, reference, name, inputs, config, files, processes)
        layers = open_layers(unit, rounded)
        roundings = {key: LearnedRounding(layer) for key, layer in layers.items()}
        nearest = {key: layer.rounded_weight() for key, layer in layers.items()}
        before = data.error(_weights(nearest), config.batch_size, network.device)
        _optimize(data, roundings, config)
        learned = {key: rounding.hard() for key, rounding in roundings.items()}
        after = data.error(_weights(learned), config.batch_size, network.device)
    kept = after < before
    for key, layer in layers.items():
        layer.set_weight_codes(roundings[key].hard_codes() if kept else layer.nearest_codes(), layer.weight_scale)
    return BlockResult(name, before, after, time.perf_counter() - start, kept)


def _optimize(data: BlockData, roundings: dict[str, LearnedRounding], config: ReconstructionConfig) -> None:
    generator = torch.Generator().manual_seed(config.seed)

    def error(weights: dict[str, Tensor]) -> Tensor:
        return data.loss(data.draw(config.batch_size, generator), _weights(weights))

    average_ = data.processes.average_ if data.processes.world > 1 else None
    learn_roundings_(roundings, config.iterations, config.lr, error, average_)


def _weights(by_layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their own names instead of their layers'."""
    return {f"{key}.weight" if key else "weight": weight for key, weight in by_layer.items()}


def _unit_tensors(unit: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, layer in layers_of(unit).items():
        if layer.codes is not None and layer.weight_scale is not None:
            tensors |= {f"{key}|codes": layer.weight_codes(), f"{key}|scale": layer.weight_scale}
    return tensors


def _unit_rules(unit: nn.Module) -> dict[str, Rule]:
    """What `_unit_tensors` has to give."""
    rules: dict[str, Rule] = {}
    for key, layer in layers_of(unit).items():
        codes = layer.config.weight_codes
        if codes is not None:
            rules[f"{key}|codes"] = Rule(tuple(layer.weight.shape), torch.int8, codes.qmin, codes.qmax)
            rules[f"{key}|scale"] = scale_rule(layer)
    return rules


def open_folder(folder: Path, settings: Mapping[str, Any], name: str, suffix: str) -> dict[str, Path]:
    """Files of the blocks that are finished. Raises ValueError where the folder's run had other settings.

    Args:
        settings: kept in the folder as `name`; "blocks" of them are the blocks' names.
        suffix: of the blocks' files.
    """
    wanted, file = json.loads(json.dumps(settings)), folder / name
    if not file.exists():
        write_json(file, wanted)
    elif read_json(file) != wanted:
        raise ValueError(f"{folder}: holds a reconstruction with other settings: name another folder or delete it")
    remove_leftovers(folder)
    found = {block: folder / f"{block}{suffix}" for block in settings["blocks"]}
    return {block: path for block, path in found.items() if path.is_file()}


def save_block(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write what was learned of a block, whole or not at all. Raises ValueError where it cannot be written."""
    write_safetensors(tensors, folder / name)


def load_block(file: Path, rules: Mapping[str, Rule]) -> dict[str, Tensor]:
    """What `save_block` wrote. Raises ValueError that names the file where it is damaged, or not what the rules say."""
    try:
        tensors = read_safetensors(file)
        if tensors.keys() != rules.keys():
            raise ValueError(f"holds {', '.join(sorted(tensors)[:3])}, expected {', '.join(sorted(rules)[:3])}")
        for key, rule in rules.items():
            rule.check(key, tensors[key])
    except ValueError as error:
        raise ValueError(f"{file}: not a finished block of this network: {error}: delete it") from None
    return {key: value.clone() for key, value in tensors.items()}  # not the file's memory


class Reconstruction:
    """The stage."""

    title = "reconstruction"
    unit = "block"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.reconstruction is not None

    def run(self, context: Context) -> None:
        config = context.recipe.reconstruction
        assert config is not None
        reference = context.keep_reference()  # activation steps compare with it too
        if context.recipe.quant.weight_bits is None:
            return
        rounded = [layer for layer in quant_layers(context.network.module).values() if layer.codes is not None]
        with context.monitor(self.title, self.unit) as update:
            context.found["reconstruction"] = reconstruct_(
                context.network, reference, context.data, config, update, context.folder, rounded, context.processes
            )
