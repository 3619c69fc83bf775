"""How many images a second the networks of a benchmark's cells make on engines: one call, measured cell after cell."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from qncd.benchmark.cells import (
    calibration_runs,
    cores,
    load_calibration_set,
    quantize_cell_,
    run_tasks,
    sample_calibration_sets,
)
from qncd.benchmark.engine_speed import Call, alternate
from qncd.benchmark.plan import Cell, Plan
from qncd.engines.engine import export, open_engine
from qncd.io.files import read_json, scratch_folder, write_json
from qncd.models.network import network_of
from qncd.models.seen import remember_inputs
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import call_on

ROUNDS = 5  # calls that are timed, of which the median counts


def time_engines(plan: Plan, cells: Sequence[Cell]) -> None:
    """Measure those of the cells that are not measured yet, one after another on all cores."""
    untimed = [cell for cell in cells if runs_on_engines(cell) and not set(plan.engines) <= measured(plan, cell).keys()]
    sample_calibration_sets(plan, {cell.seed for cell in untimed}, 1, cores())
    run_tasks("engines", "cell", measure_engines, plan, untimed, 1, cores())


def measure_engines(plan: Plan, cell: Cell) -> None:
    """Quantize the cell's network anew, export it, time its call on each of `plan.engines`, and write OUT/engines/CELL.json.

    The call is the sampler's: of a lane of images, both halves of guidance in it. Images a second are those of the network alone
    over all steps, without the decoder and without calls that a correction makes.
    """
    subject = plan.subject()
    sampler, (data, _) = subject.sampler, load_calibration_set(plan, cell.seed, subject.sampler.network)
    recipe = cell.recipe_in(plan)
    if recipe is None:
        remember_inputs(sampler.network, data.x, data.t, data.inputs, data.constants)
    else:
        runs = calibration_runs(subject, dataclasses.replace(plan.calibration, seed=cell.seed))
        sampler, _, _ = quantize_cell_(plan, cell, sampler, runs)
    network = sampler.network
    x, t, inputs = next(_repeated(data, sampler.lane).batches(sampler.lane))
    with scratch_folder() as folder, torch.no_grad():
        export(network, folder, recipe.quant if recipe else None, shape=network.shape_of(sampler.shape))
        opened = {name: open_engine(network, folder, name, threads=torch.get_num_threads()) for name in plan.engines}
        calls: dict[str, Call] = {
            name: functools.partial(call_on, network_of(engine), x, t, inputs, data.constants) for name, engine in opened.items()
        }
        seconds = {name: statistics.median(times) for name, times in alternate(calls, ROUNDS).items()}
    speeds = {name: sampler.lane / (sampler.step_count * call) for name, call in seconds.items()}
    write_json(
        cell.engines_path(plan),
        {
            "cell": dataclasses.asdict(cell), "settings": cell.settings(plan), "threads": torch.get_num_threads(),
            "call_seconds": seconds, "lane": sampler.lane, "steps": sampler.step_count,
            "images_per_second": measured(plan, cell) | speeds,  # beside those of other engines, measured before
        },
    )  # fmt: skip


def _repeated(data: CalibrationSet, count: int) -> CalibrationSet:
    """`count` inputs of the set's first time step, in turn."""
    rows = (data.t == data.t[0]).nonzero()[:, 0]
    return data.subset(rows[torch.arange(count) % len(rows)])


def measured(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Images per second by engine; empty where the cell was not measured, or with other settings."""
    try:
        record = read_json(cell.engines_path(plan))
        found = record["images_per_second"] if record["settings"] == cell.settings(plan) else {}
        return {name: float(value) for name, value in found.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def runs_on_engines(cell: Cell) -> bool:
    """Whether its network can be exported: those of other toolkits cannot. One calibration seed is enough."""
    return cell.peer is None and cell.seed == 0
