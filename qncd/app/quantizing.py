"""From the quantization flags of a command to a quantized network and its corrector."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qncd.distributed import OneProcess, Processes
from qncd.engines.engine import check_engine, engine_of, file_engines
from qncd.engines.network import DYNAMIC_ATTENTION
from qncd.engines.registry import ENGINES, TORCH
from qncd.granularity import TENSOR
from qncd.io.files import write_text
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.network import Network
from qncd.models.original.key_tables import KeyTable
from qncd.progress import Update, progress_bar
from qncd.ptq.checkpoint import QuantizedInfo, check_quantized, load_quantized_, load_weights_, peek_quantized, save_quantized
from qncd.ptq.data import CalibrationCollector, CalibrationSet, load_calibration, save_calibration
from qncd.ptq.layer_record import LAYERS_FILE, NetworkRecord, what_layers_got
from qncd.ptq.pipeline import Job, fitted_around, quantize_network, record_before, sample_calibration
from qncd.ptq.pipeline_runs import Given, Sampler, runs_of
from qncd.ptq.qdiffusion import check_qdiffusion, is_qdiffusion, load_qdiffusion_
from qncd.ptq.stages.prepare import layer_config
from qncd.recipe import QuantConfig, Recipe, ReconstructionConfig
from qncd.sampling.corrector import Corrector, Record
from qncd.sampling.correctors.registry import corrector_of, fits, kind_of
from qncd.sampling.correctors.runtime import check_interval
from qncd.sampling.guidance import Conditions

log = logging.getLogger("qncd")
WEIGHT_SETTINGS = (
    "weight_bits", "edge_bits", "weight_range", "gptq", "smoothing_search", "split", "quantize_embedding", "weight_grid",
    "rotation", "rank", "branch_bits", "weight_granularity", "weight_format", "smoothed",
)  # fmt: skip


def is_quiet() -> bool:
    """Whether progress bars stay away: --verbose warning or critical."""
    return log.getEffectiveLevel() > logging.INFO


@contextlib.contextmanager
def bars(title: str, unit: str) -> Iterator[Update]:
    """A monitor that draws a progress bar for each phase."""
    with progress_bar(title, unit, is_quiet()) as update:
        yield update


def check_engine_arguments(args: argparse.Namespace, recipe: Recipe | None) -> None:
    """Raise ValueError for a backend that is not there, flags that it does not take, or a correction that there is not."""
    if recipe is not None:
        kind_of(recipe)
    check_engine(args.backend, args.engine_precision)
    if recipe is not None and args.backend != TORCH:
        _check_kernels(recipe.quant, args.backend)
    if args.onnx and args.backend not in file_engines():
        raise ValueError(f"--onnx needs --backend {' or '.join(file_engines())}: {args.backend} does not run it")
    if args.backend != TORCH and getattr(args, "precision", "full") != "full":
        raise ValueError(f"--precision {args.precision} is torch's: with --backend {args.backend} there is --engine_precision")


def _check_kernels(config: QuantConfig, backend: str) -> None:
    """Raise ValueError for what an engine computes in no form."""
    layer = layer_config(config)
    if (found := layer.without_kernel(engine_of(backend).tokens)) is not None:
        others = [name for name in ENGINES if layer.without_kernel(engine_of(name).tokens) is None]
        raise ValueError(f"--backend {backend} has no form for {found}: allowed is {' or '.join([TORCH, *others])}")
    dynamic = config.act_bits is not None and config.act_granularity != TENSOR
    if dynamic and config.quantize_attention:
        raise ValueError(f"--backend {backend}: {DYNAMIC_ATTENTION}")


def run_settings(recipe: Recipe | None, args: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """What decides what an image looks like beside the model and the sampler, for run.json."""
    keys = ("quantization", "smoothing", "reconstruction", "correction", "offline_correction", "calibration")
    settings: dict[str, Any] = recipe.settings() if recipe else dict.fromkeys(keys)
    if recipe:
        settings["calibration"] |= {
            "data": str(args.cali_data_path) if args.cali_data_path else None,
            "checkpoint": str(args.cali_ckpt) if args.cali_ckpt else None,
            "weights_only_from_checkpoint": args.resume_w,
        }
    return {
        **settings,
        "batch": batch_size if recipe and recipe.by_batch else None,
        **({} if args.backend == TORCH else {"backend": args.backend}),
        **({} if args.engine_precision == "fp32" else {"engine_precision": args.engine_precision}),
    }


@dataclass(frozen=True)
class Files:
    """Files of a quantization.

    Attributes:
        checkpoint: taken where it exists, else written.
        calibration: the calibration set, likewise.
        weights_only: take the checkpoint's weights and calibrate activations anew.
        folder: of the run: reconstructed blocks, and the new checkpoint with `weights_only`.
        key_table: names of the original model's layers, for a checkpoint of Q-Diffusion; None where they are unknown.
    """

    checkpoint: Path | None
    calibration: Path | None
    weights_only: bool
    folder: Path
    key_table: KeyTable | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, folder: Path, key_table: KeyTable | None) -> Files:
        """As the flags name them."""
        return cls(args.cali_ckpt, args.cali_data_path, args.resume_w, folder, key_table)


def check_files(recipe: Recipe, sampler: Sampler, base_hash: str, files: Files, conditions: Given = None) -> None:
    """Raise what `quantized` would find out about its files, or about the recipe and the sampler, before any work is done.

    The network stays as it is.
    """
    _Task(recipe, sampler, base_hash, files, conditions, OneProcess()).check()


def quantized(
    recipe: Recipe,
    sampler: Sampler,
    base_hash: str,
    files: Files,
    conditions: Given = None,
    processes: Processes | None = None,
) -> tuple[Corrector | None, float]:
    """Turn the network of `sampler` into the quantized one: from the checkpoint where it exists, else by calibrating.

    A checkpoint of Q-Diffusion (.pth) brings weights and activation ranges; the correction is this package's.

    Args:
        base_hash: of the full-precision weights.
        conditions: one for each of the calibration trajectories.
        processes: who shares the reconstruction, all with the same arguments; the first one writes the files.

    Returns:
        the corrector, where one is asked for, and the seconds that calibrating took.
    """
    task = _Task(recipe, sampler, base_hash, files, conditions, processes or OneProcess())
    path = files.checkpoint
    # One process may be done with a file before another one looks.
    there = task.processes.share(path is not None and path.is_file())
    if there and path is not None and path.suffix != ".safetensors":
        return task.from_qdiffusion(path), 0.0
    if there and path is not None and not files.weights_only:
        return task.from_checkpoint(path), 0.0
    return task.by_calibrating()


class _Task:
    """The three ways to a quantized network, and what they share: the arguments of `quantized`, and what follows from them."""

    def __init__(
        self,
        recipe: Recipe,
        sampler: Sampler,
        base_hash: str,
        files: Files,
        conditions: Given,
        processes: Processes,
    ) -> None:
        self.recipe, self.sampler, self.base_hash, self.files, self.processes = recipe, sampler, base_hash, files, processes
        self.guidance = conditions.scale if isinstance(conditions, Conditions) else None
        self.runs = runs_of(sampler, recipe.calibration, conditions, bars, processes)
        self.network = sampler.network
        self.kind = kind_of(recipe)

    def check(self) -> None:
        """Read what the three ways read, and compare it with what is asked for."""
        path, recipe, steps = self.files.checkpoint, self.recipe, self.sampler.step_count
        if self.kind is not None:
            self.kind.recorder(recipe)
        if recipe.controlled:
            check_interval(recipe.controlled.interval, steps)
        if path is not None and path.is_file() and path.suffix != ".safetensors":
            self._qdiffusion(path)
            return
        if path is not None and path.is_file() and not self.files.weights_only:
            self._fitting(path)
            return
        if self.files.weights_only:
            self._check_weights()
        if self.files.calibration is not None and self.files.calibration.exists():
            self._calibration(self.files.calibration)
        else:
            CalibrationCollector(steps, recipe.calibration.steps)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint depends on beside its QuantConfig; the recipe is all that was asked for."""
        recipe, controlled = self.recipe, self.recipe.controlled
        return {
            "reconstruction": recipe.reconstruction and dataclasses.asdict(recipe.reconstruction),
            "sampler": self.sampler.settings,
            "guidance": self.guidance,
            "correction": {"interval": controlled.interval, "target": controlled.target} if controlled else None,
            "recipe": recipe.to_json(),
            "times": list(self.runs.times),
        }

    def _qdiffusion(self, path: Path) -> tuple[Mapping[str, Tensor], KeyTable, QuantConfig]:
        """What a checkpoint of Q-Diffusion holds, the names in it and how it is read: it fits the network."""
        content = load_checkpoint(path)
        if not is_qdiffusion(content):
            raise ValueError(f"{path}: neither a .safetensors file of this package nor a quantized checkpoint of Q-Diffusion")
        if self.files.key_table is None:
            raise ValueError(f"{path}: names layers as the original code does: give the original yaml with --config")
        if self.files.weights_only:
            raise ValueError(f"--resume_w: allowed with this package's checkpoints; {path.name} is one of Q-Diffusion")
        with _naming(path):
            check_qdiffusion(self.network, content, self.files.key_table, self.recipe.quant)
        return content, self.files.key_table, self.recipe.quant

    def from_qdiffusion(self, path: Path) -> Corrector | None:
        """A checkpoint of Q-Diffusion."""
        given = self._qdiffusion(path)  # before the long work of `record_before`
        record = record_before(self.runs, self.recipe)

        def load() -> None:
            with _naming(path):
                load_qdiffusion_(self.network, *given)
            log.info("loaded %s: %s as Q-Diffusion wrote it", path, self.recipe.quant.label)

        record = fitted_around(load, self.runs, self.recipe, record)
        self._write_layers(None)
        return corrector_of(self.recipe, record)

    def _fitting(self, path: Path) -> QuantizedInfo:
        """What a checkpoint of this package says of itself: it is what is asked for, and fits the network."""
        recipe, info = self.recipe, peek_quantized(path)
        _check_same(path, info, recipe.quant, recipe.smoothing is not None)
        if recipe.reconstruction and _reconstruction_of(info) != self.settings["reconstruction"]:
            how = info.settings.get("reconstruction") or "not at all"
            raise ValueError(f"{path}: was reconstructed otherwise: {how}: --no-recon takes its weights as they are")
        check_quantized(self.network, path, self.base_hash)
        return info

    def from_checkpoint(self, path: Path) -> Corrector | None:
        """A checkpoint of this package, with what it holds for the correction where that was made with the same settings."""
        recipe, info = self.recipe, self._fitting(path)
        if info.settings.get("sampler") != self.settings["sampler"] and recipe.smoothing:
            log.warning("%s was smoothed for the time steps of %s", path, info.settings.get("sampler"))
        record = self._record_in(info)
        if record is None:
            record = record_before(self.runs, recipe)

        def load() -> None:
            load_quantized_(self.network, path, self.base_hash)
            log.info("loaded %s: %s", path, info.config.label)

        record = fitted_around(load, self.runs, recipe, record)
        self._write_layers(info.layers)
        return corrector_of(recipe, record)

    def _record_in(self, info: QuantizedInfo) -> Record | None:
        """What a checkpoint holds for the correction, where it was made for the same sampler and correction."""
        if self.kind is None:
            return None
        record, settings = info.records.get(self.kind.prefix), self.settings
        keys = ("sampler", "guidance", "correction") if self.kind.calls_network else ("sampler", "guidance")
        old, new = (_flat(found, keys) for found in (info.settings, settings))
        other = [f"{name} {old.get(name)} there, {value} asked for" for name, value in new.items() if old.get(name) != value]
        if record is not None and other:
            log.warning(
                "%s: its noise correction was fitted otherwise (%s): fitted anew", self.files.checkpoint, "; ".join(other)
            )
        return record if not other and fits(self.kind, self.recipe, record) else None

    def by_calibrating(self) -> tuple[Corrector | None, float]:
        """Calibrate, with `weights_only` around the checkpoint's weights, and write the checkpoint. Also the seconds taken."""
        recipe, files, first = self.recipe, self.files, self.processes.is_first
        weights = self._weights() if files.weights_only else None
        start = time.perf_counter()
        if self.processes.share(files.calibration is not None and files.calibration.exists()):
            assert files.calibration is not None
            data = self._calibration(files.calibration)
            record = record_before(self.runs, recipe)
        else:
            data, record = sample_calibration(self.runs, recipe, self.base_hash)
            if files.calibration and first:
                save_calibration(data, files.calibration)
        folder = files.folder / "reconstruction" if recipe.reconstruction else None
        job = Job(bars, folder, self.processes, weights, measured=True)
        outcome = quantize_network(self.runs, recipe, data, record, job)
        log.info("bits in the mean, first and last layer and softmax outputs included: %s", outcome.bits)
        target = files.folder / "quantized.safetensors" if files.weights_only else files.checkpoint
        if target and first:
            settings = json.loads(json.dumps(self.settings))
            save_quantized(self.network, target, recipe.quant, self.base_hash, settings, outcome.record, outcome.layers)
            log.info("quantized checkpoint: %s, %.1f MB", target, target.stat().st_size / 1e6)
        self._write_layers(outcome.layers)
        return corrector_of(recipe, outcome.record), time.perf_counter() - start

    def _write_layers(self, layers: NetworkRecord | None) -> None:
        """LAYERS_FILE, for `qncd report`; without errors where none are known."""
        if self.processes.is_first:
            record = (layers or what_layers_got(self.network)).to_json()
            write_text(self.files.folder / LAYERS_FILE, json.dumps(record, separators=(",", ":")))

    def _calibration(self, path: Path) -> CalibrationSet:
        """The calibration set of a file. Raises ValueError where it is none, or of another model."""
        calibration = self.recipe.calibration
        data = load_calibration(path, calibration.samples, calibration.steps, self.network.condition)
        with _naming(path):
            data.check_model(self.network, self.base_hash)
        return data

    def _check_weights(self) -> Path:
        """The checkpoint, whose weights are wanted. Raises ValueError where they were quantized otherwise, or do not fit."""
        path, quant = self.files.checkpoint, self.recipe.quant
        assert path is not None
        _check_same(path, peek_quantized(path), quant, self.recipe.smoothing is not None, WEIGHT_SETTINGS)
        check_quantized(self.network, path, self.base_hash, quant)
        return path

    def _weights(self) -> Any:
        """What gives the network the checkpoint's weights."""
        path, quant = self._check_weights(), self.recipe.quant

        def load(network: Network) -> None:
            load_weights_(network, path, quant, self.base_hash)
            log.info("weights of %s; activations are calibrated anew", path)

        return load


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Within it, a ValueError begins with the file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _flat(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The settings of these names, those of dicts among them one by one."""
    found: dict[str, Any] = {}
    for key in keys:
        value = settings.get(key)
        found |= value if isinstance(value, dict) else {key: value}
    return found


def _reconstruction_of(info: QuantizedInfo) -> dict[str, Any] | None:
    """How a checkpoint was reconstructed; settings that are younger than the file have the value that was the only one then."""
    found = info.settings.get("reconstruction")
    return found and {"cache": "fp16", "act_iterations": 0, "act_lr": ReconstructionConfig.act_lr, **found}


def _check_same(path: Path, info: QuantizedInfo, wanted: QuantConfig, smooth: bool, names: Sequence[str] | None = None) -> None:
    smooth = info.smoothed if wanted.smoothing_search else smooth  # a search may find that no layer gains
    old, new = dataclasses.asdict(info.config) | {"smoothed": info.smoothed}, dataclasses.asdict(wanted) | {"smoothed": smooth}
    differing = [f"{key} {old[key]} there, {new[key]} asked for" for key in names or old if old[key] != new[key]]
    if differing:
        raise ValueError(
            f"{path}: was quantized otherwise ({'; '.join(differing)}): name another --cali_ckpt or the same settings"
        )
