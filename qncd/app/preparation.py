"""From the quantization flags of a script to a quantized network and its corrector."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd.app import parser as cli
from qncd.distributed import OneProcess, Processes
from qncd.engines.packages import check_backend
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.original.key_tables import KeyTable
from qncd.ptq.calibration import CalibrationSet, calibrate_, load_calibration, save_calibration
from qncd.ptq.checkpoint import QuantizedInfo, load_quantized_, load_weights_, peek_quantized, save_quantized
from qncd.ptq.pipeline import (
    Diffusion,
    quantize_with_,
    record_noise_table,
    record_offline,
    sample_calibration,
    set_stepwise_,
)
from qncd.ptq.qdiffusion import is_qdiffusion, load_qdiffusion_
from qncd.ptq.stages.bit_allocation import allocate_bits_
from qncd.recipe import QuantConfig, Recipe, ReconstructionConfig
from qncd.sampling.corrector import Corrector
from qncd.sampling.correctors.registry import OfflineRecord, fits, offline_corrector
from qncd.sampling.correctors.runtime import NoiseTable, RuntimeNoiseCorrector
from qncd.sampling.guidance import Conditions

log = logging.getLogger("qncd")
WEIGHT_SETTINGS = (
    "weight_bits", "edge_bits", "weight_range", "gptq", "smoothing_search", "split", "quantize_embedding", "smoothed",
)  # fmt: skip


def is_quiet() -> bool:
    """Whether progress bars stay away: --verbose warning or critical."""
    return log.getEffectiveLevel() > logging.INFO


def check_quantization_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that need --ptq without it, a checkpoint that is not there, or a backend that is not."""
    for name in ("cali_ckpt", "cali_data_path", "resume", "resume_w", "compare_fp"):
        if getattr(args, name) and not args.ptq:
            raise ValueError(f"--{name} needs --ptq")
    if args.resume_w and args.recon:
        raise ValueError("--resume_w takes weights as they are: it excludes --recon")
    if args.resume_w and args.gptq:
        raise ValueError("--resume_w takes weights as they are: it excludes --gptq")
    if args.resume and args.resume_w:
        raise ValueError("--resume and --resume_w exclude one another: all of the checkpoint, or its weights alone")
    for name in ("resume", "resume_w"):
        if getattr(args, name) and (args.cali_ckpt is None or not args.cali_ckpt.is_file()):
            raise FileNotFoundError(f"--{name} needs a quantized checkpoint: --cali_ckpt {args.cali_ckpt} is none")
    check_backend(args.backend, args.engine_precision)
    if args.onnx and args.backend in ("torch", "triton"):
        raise ValueError(f"--onnx needs --backend onnxruntime, openvino or tensorrt: {args.backend} does not run it")
    if args.backend != "torch" and getattr(args, "precision", "full") != "full":
        raise ValueError(f"--precision {args.precision} is torch's: with --backend {args.backend} there is --engine_precision")


def run_settings(wanted: Recipe | None, args: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """What decides what an image looks like beside the model and the sampler, for run.json."""
    keys = ("quantization", "smoothing", "reconstruction", "correction", "offline_correction", "calibration")
    settings: dict[str, Any] = wanted.settings() if wanted else dict.fromkeys(keys)
    if wanted:
        settings["calibration"] |= {
            "data": str(args.cali_data_path) if args.cali_data_path else None,
            "checkpoint": str(args.cali_ckpt) if args.cali_ckpt else None,
            "weights_only_from_checkpoint": args.resume_w,
        }
    by_batch = wanted and wanted.correction and wanted.correction.statistics == "batch"
    return {
        **settings,
        "batch": batch_size if by_batch else None,
        **({} if args.backend == "torch" else {"backend": args.backend}),
        **({} if args.engine_precision == "fp32" else {"engine_precision": args.engine_precision}),
    }


def prepare_quantized(
    args: argparse.Namespace,
    wanted: Recipe,
    diffusion: Diffusion,
    base_hash: str,
    folder: Path,
    conditions: Conditions | None = None,
    key_table: KeyTable | None = None,
    processes: Processes | None = None,
) -> tuple[Corrector | None, float]:
    """Turn the network of `diffusion` into the quantized one: from --cali_ckpt where it exists, else by calibrating.

    A --cali_ckpt of Q-Diffusion (.pth) brings weights and activation ranges; the correction is this package's.

    Args:
        folder: of the run; with --resume_w the new checkpoint is written into it.
        conditions: one for each of the calibration trajectories.
        key_table: names of the original model's layers, for a checkpoint of Q-Diffusion; None where they are unknown.
        processes: who shares the reconstruction, all with the same arguments; the first one writes the files.

    Returns:
        the corrector, where one is asked for, and the seconds that calibrating took.
    """
    preparation = _Preparation(args, wanted, diffusion, base_hash, conditions, processes or OneProcess())
    # One process may be done with a file before another one looks.
    there = preparation.processes.share(args.cali_ckpt is not None and args.cali_ckpt.is_file())
    if there and args.cali_ckpt.suffix != ".safetensors":
        return _from_qdiffusion(preparation, key_table), 0.0
    if there and not args.resume_w:
        return _from_checkpoint(preparation), 0.0
    return _by_calibrating(preparation, folder)


@dataclass(frozen=True)
class _Preparation:
    """What the three ways to a quantized network share: the arguments of `prepare_quantized`, and what follows from them."""

    args: argparse.Namespace
    wanted: Recipe
    diffusion: Diffusion
    base_hash: str
    conditions: Conditions | None
    processes: Processes

    @property
    def quant(self) -> QuantConfig:
        return self.wanted.quant

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint depends on beside its QuantConfig."""
        reconstruction, controlled = self.wanted.reconstruction, self.wanted.controlled
        return {
            "reconstruction": reconstruction and dataclasses.asdict(reconstruction),
            "sampler": dataclasses.asdict(self.diffusion.config),
            "guidance": self.conditions.scale if self.conditions else None,
            "correction": {"interval": controlled.interval, "target": controlled.target} if controlled else None,
        }

    def noise_table(self) -> NoiseTable | None:
        """The control table by a full-precision run, where the correction needs one; the network is not quantized yet."""
        if self.wanted.controlled is None:
            return None
        with cli.progress_bar("full-precision noise table", "image", is_quiet()) as bar:
            return record_noise_table(self.diffusion, self.wanted.calibration, self.wanted.controlled, bar, self.conditions)

    def reference(self) -> Diffusion | None:
        """The full-precision model beside the one that will be quantized, where a correction compares the two."""
        return dataclasses.replace(self.diffusion, unet=copy.deepcopy(self.diffusion.unet)) if self.wanted.offline else None

    def offline_record(self, reference: Diffusion | None) -> OfflineRecord | None:
        """What an offline correction needs to know, None without a reference; the network is quantized by now."""
        kind = self.wanted.offline
        if reference is None or kind is None:
            return None
        with cli.progress_bar(f"offline correction ({kind})", "image", is_quiet()) as bar:
            return record_offline(kind, reference, self.diffusion, self.wanted.calibration, bar, self.conditions)

    def corrector(self, table: NoiseTable | None, offline: OfflineRecord | None) -> Corrector | None:
        wanted = self.wanted
        if wanted.offline and offline:
            return offline_corrector(wanted.offline, offline)
        return RuntimeNoiseCorrector(wanted.correction, table if wanted.controlled else None) if wanted.correction else None


def _from_qdiffusion(preparation: _Preparation, key_table: KeyTable | None) -> Corrector | None:
    """A --cali_ckpt of Q-Diffusion."""
    table, reference = preparation.noise_table(), preparation.reference()
    _load_qdiffusion_(preparation.args, preparation.diffusion, preparation.quant, key_table)
    return preparation.corrector(table, preparation.offline_record(reference))


def _from_checkpoint(preparation: _Preparation) -> Corrector | None:
    """A --cali_ckpt of this package, with what it holds for the correction where that was made with the same settings."""
    path, wanted, settings = preparation.args.cali_ckpt, preparation.wanted, preparation.settings
    info, table = peek_quantized(path)
    _check_same(path, info, preparation.quant, wanted.smoothing is not None)
    if wanted.reconstruction and _reconstruction_of(info) != settings["reconstruction"]:
        raise ValueError(f"{path}: was reconstructed otherwise: {info.settings.get('reconstruction')}")
    if info.settings.get("sampler") != settings["sampler"] and wanted.smoothing:
        log.warning("%s was smoothed for the time steps of %s", path, info.settings.get("sampler"))
    made_for = {key: info.settings.get(key) for key in ("sampler", "guidance", "correction")}
    if wanted.controlled and (table is None or any(made_for[key] != settings[key] for key in made_for)):
        table = preparation.noise_table()
    offline, reference = info.offline, preparation.reference()
    load_quantized_(preparation.diffusion.unet, path, preparation.base_hash)
    log.info("loaded %s: %s", path, info.config.label)
    current = all(made_for[key] == settings[key] for key in ("sampler", "guidance"))
    if wanted.offline and not (current and fits(wanted.offline, offline)):
        offline = preparation.offline_record(reference)
    return preparation.corrector(table, offline)


def _by_calibrating(preparation: _Preparation, folder: Path) -> tuple[Corrector | None, float]:
    """Calibrate, with --resume_w around the weights of --cali_ckpt, and write the checkpoint. Also the seconds taken."""
    args, wanted, diffusion, base_hash = preparation.args, preparation.wanted, preparation.diffusion, preparation.base_hash
    processes = preparation.processes
    if args.resume_w:
        info, _ = peek_quantized(args.cali_ckpt)
        _check_same(args.cali_ckpt, info, preparation.quant, wanted.smoothing is not None, WEIGHT_SETTINGS)
    start = time.perf_counter()
    if processes.share(args.cali_data_path is not None and args.cali_data_path.exists()):
        data = load_calibration(args.cali_data_path, wanted.calibration.samples, wanted.calibration.steps)
        data.check_model(diffusion.unet, base_hash)
        table = preparation.noise_table()
    else:
        with cli.progress_bar("calibration set", "image", is_quiet()) as bar:
            data, table = sample_calibration(
                diffusion, wanted.calibration, wanted.controlled, base_hash, bar, preparation.conditions
            )
        if args.cali_data_path and processes.is_first:
            save_calibration(data, args.cali_data_path)
    reference = preparation.reference()
    _quantize_(args, wanted, diffusion, data, base_hash, folder, processes, preparation.conditions)
    offline = preparation.offline_record(reference)
    target = folder / "quantized.safetensors" if args.resume_w else args.cali_ckpt
    if target and processes.is_first:
        save_quantized(diffusion.unet, target, preparation.quant, base_hash, table, preparation.settings, offline)
        log.info("quantized checkpoint: %s, %.1f MB", target, target.stat().st_size / 1e6)
    return preparation.corrector(table, offline), time.perf_counter() - start


def _load_qdiffusion_(args: argparse.Namespace, diffusion: Diffusion, quant: QuantConfig, table: KeyTable | None) -> None:
    path = args.cali_ckpt
    content = load_checkpoint(path)
    if not is_qdiffusion(content):
        raise ValueError(f"{path}: neither a .safetensors file of this package nor a quantized checkpoint of Q-Diffusion")
    if table is None:
        raise ValueError(f"{path}: names layers as the original code does: give the original yaml with --config")
    if args.resume_w:
        raise ValueError(f"--resume_w: allowed with this package's checkpoints; {path.name} is one of Q-Diffusion")
    try:
        load_qdiffusion_(diffusion.unet, content, table, quant)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    log.info("loaded %s: %s as Q-Diffusion wrote it", path, quant.label)


def _quantize_(
    args: argparse.Namespace,
    wanted: Recipe,
    diffusion: Diffusion,
    data: CalibrationSet,
    base_hash: str,
    folder: Path,
    processes: Processes,
    conditions: Conditions | None,
) -> None:
    quant, batch_size = wanted.quant, wanted.calibration.batch_size
    assert batch_size is not None
    learns_steps = wanted.reconstruction is not None and wanted.reconstruction.act_iterations > 0
    with (
        cli.progress_bar("reconstruction", "block", is_quiet() or wanted.reconstruction is None) as blocks,
        cli.progress_bar(f"calibrating {quant.label}", "input", is_quiet()) as bar,
        cli.progress_bar("activation steps", "block", is_quiet() or not learns_steps) as steps,
        cli.progress_bar("allocating bits", "sample", is_quiet() or not quant.bit_allocation) as widths,
    ):
        if args.resume_w:
            load_weights_(diffusion.unet, args.cali_ckpt, quant, base_hash)
            log.info("weights of %s; activations are calibrated anew", args.cali_ckpt)
            set_stepwise_(diffusion, quant)
            if quant.bit_allocation:
                allocate_bits_(diffusion, quant, data, conditions, batch_size, widths)
            calibrate_(diffusion.unet, data, batch_size, bar)
        else:
            quantize_with_(
                diffusion, quant, data, wanted.smoothing, batch_size, bar, wanted.reconstruction, blocks,
                folder / "reconstruction" if wanted.reconstruction else None, steps, processes, conditions, widths,
            )  # fmt: skip


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
