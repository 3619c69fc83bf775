"""From a full-precision network to a quantized one with its correction: the one composition that everybody calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qncd.distributed import OneProcess, Processes
from qncd.models.network import Network, network_of
from qncd.models.seen import remember_inputs
from qncd.progress import Monitor, silent
from qncd.ptq.bits import MeanBits, mean_bits
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.layer_record import ErrorMeter, NetworkRecord
from qncd.ptq.observing import naming
from qncd.ptq.stages.registry import STAGES, run_stages
from qncd.ptq.stages.smoothing import settled
from qncd.recipe import CalibrationConfig, QuantConfig, Recipe
from qncd.sampling.corrector import Record, Recorder, Runs
from qncd.sampling.correctors.registry import kind_of
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions


class CalibrationRuns(Runs, Protocol):
    """Runs of a sampler whose network will be quantized in place."""

    @property
    def diffusion(self) -> Diffusion | None:
        """The same sampler, for stages that back-propagate through it; None where that cannot be done."""

    @property
    def conditions(self) -> Conditions | None:
        """Of its trajectories."""

    @property
    def network(self) -> Network:
        """The network."""

    @property
    def times(self) -> tuple[Any, ...]:
        """The time steps that the sampler visits."""

    @property
    def network_times(self) -> tuple[Any, ...]:
        """The same as the network gets them."""

    def calibration_set(self, recorder: Recorder | None = None, model_hash: str | None = None) -> CalibrationSet:
        """The set along a full-precision run, which `recorder` may watch."""


@dataclass(frozen=True)
class Job:
    """How a network is quantized, beside the recipe: nothing here changes the result.

    Attributes:
        monitor: is told of progress.
        folder: for finished blocks of long stages.
        processes: who shares the work.
        weights: prepares the network and gives it weights of a checkpoint; then no stage makes any.
        measured: measure the error of each layer, with a few more calls of the network (`qncd.ptq.layer_record`).
        packed: keep the codes of a weight alone once it is rounded (`QuantLayer.pack_weight_`).
    """

    monitor: Monitor = silent
    folder: Path | None = None
    processes: Processes = field(default_factory=OneProcess)
    weights: Callable[[Network], None] | None = None
    measured: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What quantizing brought.

    Attributes:
        record: what the correction knows; None where it knows nothing, or there is none.
        found: what stages report, by their names.
        bits: of weights and activations in the mean.
        seconds: taken.
        layers: what each of them got, and its error, where that is asked for.
    """

    record: Record | None
    found: dict[str, Any]
    bits: MeanBits
    seconds: float
    layers: NetworkRecord | None = None


def sample_calibration(
    runs: CalibrationRuns, recipe: Recipe, model_hash: str | None = None
) -> tuple[CalibrationSet, Record | None]:
    """One full-precision run: the calibration set, and the record of a correction that watches such a run."""
    kind = kind_of(recipe)
    recorder = kind.recorder(recipe) if kind else None
    with naming("calibration set"):
        data = runs.calibration_set(recorder, model_hash)
    return data, recorder.table() if recorder else None


def record_before(runs: CalibrationRuns, recipe: Recipe) -> Record | None:
    """That record alone, for a calibration set or a checkpoint that came without a fitting one."""
    kind = kind_of(recipe)
    recorder = kind.recorder(recipe) if kind else None
    if recorder is None:
        return None
    with naming("full-precision noise table"):
        runs.record(recorder)
    return recorder.table()


def quantize_network(
    runs: CalibrationRuns, recipe: Recipe, data: CalibrationSet, record: Record | None = None, job: Job | None = None
) -> Outcome:
    """Run every stage that the recipe asks for and fit its correction; the network of `runs` changes in place.

    Args:
        data, record: from `sample_calibration`, or from files.

    Raises:
        ValueError: the set does not fit the network, or what a stage raises.
    """
    job, start = job or Job(), time.perf_counter()
    if job.weights and recipe.reconstruction:
        raise ValueError("weights of a checkpoint are taken as they are: no reconstruction with them")
    data.check_model(runs.network)
    recipe = settled(recipe, runs.network)
    context = Context(
        runs.network, recipe, data, runs.network_times, runs.diffusion, runs.conditions, job.monitor, job.folder, job.processes,
        packed=job.packed,
    )  # fmt: skip
    remember_inputs(runs.network, data.x, data.t, data.inputs, data.constants)
    meter = ErrorMeter(runs.network, data) if job.measured else None

    def quantize() -> None:
        if job.weights:
            job.weights(runs.network)
        run_stages(context, job.weights is not None)

    record = fitted_around(quantize, runs, recipe, record)
    bits, layers = mean_bits(runs.network, data), meter.record(runs.network) if meter else None
    return Outcome(record, context.found, bits, time.perf_counter() - start, layers)


def fitted_around(quantize: Callable[[], None], runs: Runs, recipe: Recipe, record: Record | None) -> Record | None:
    """Quantize; the record of a correction that is fitted by runs before and after that, where it is not known."""
    kind = kind_of(recipe)
    if kind is None or record is not None or not kind.fitted_afterwards(recipe):
        quantize()
        return record
    with naming("full-precision runs"):
        seen = kind.before(runs, recipe)
    quantize()
    with naming("fitting the noise correction"):
        return kind.fit(runs, recipe, seen)


def calibrate_(network: Network | nn.Module, data: CalibrationSet, config: QuantConfig, batch_size: int = 32) -> None:
    """The stages after `quantize_` that need nothing but a calibration set, in place; `qncd.quantize` runs all.

    Args:
        network: prepared by `quantize_` with `config`, or its module.
        config: those of its settings that need a sampler are refused.

    Raises:
        ValueError: a setting needs a sampler; the set does not fit the model; a weight or an activation is not finite.
    """
    for name in ("bit_allocation", "step_weights", "stepwise_activations", "stepwise_embedding"):
        if getattr(config, name):
            raise ValueError(f"{name} needs the sampler's time steps: qncd.quantize takes a pipeline or a scheduler")
    recipe = Recipe(quant=config, smoothing=None, calibration=CalibrationConfig(batch_size=batch_size))
    context = Context(network_of(network), recipe, data)
    data.check_model(context.network)
    for stage in STAGES[1:]:
        if stage.wanted(recipe):
            with naming(stage.title):
                stage.run(context)
