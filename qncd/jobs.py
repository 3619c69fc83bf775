"""One run of a sampling script: quantize the network or load it, sample what is missing, write images and figures."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from qncd import cli
from qncd.config import CalibrationConfig, CorrectionConfig, QuantConfig, ReconstructionConfig, SmoothingConfig
from qncd.io.images import contact_sheet, image_name, save_npz, save_png, to_uint8
from qncd.io.runs import Run
from qncd.metrics.statistics import mse_to_psnr, paired_mse
from qncd.ptq.calibration import CalibrationSet, calibrate_, load_calibration, save_calibration
from qncd.ptq.checkpoint import QuantizedInfo, load_quantized_, load_weights_, peek_quantized, save_quantized
from qncd.ptq.pipeline import Diffusion, quantize_with_, record_noise_table, sample_calibration
from qncd.sampling.correctors import Corrector
from qncd.sampling.guidance import Conditions
from qncd.sampling.runtime_noise import NoiseTable, RuntimeNoiseCorrector

log = logging.getLogger("qncd")
SHEET_IMAGES = 64  # the most that a contact sheet shows of one model
SEQUENCE_IMAGES, SEQUENCE_STEPS = 8, 16
WEIGHT_SETTINGS = ("weight_bits", "edge_bits", "weight_range", "split", "quantize_embedding", "smoothed")


def set_up_logging(level: str) -> None:
    """Messages of the package as plain lines on stderr."""
    logging.basicConfig(level=level.upper(), format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def is_quiet() -> bool:
    """Whether progress bars stay away: --verbose warning or critical."""
    return log.getEffectiveLevel() > logging.INFO


def check_quantization_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that need --ptq without it, or a checkpoint to resume from that is not there."""
    needing = ("cali_ckpt", "cali_data_path", "resume", "resume_w", "compare_fp", "quant_act", "weight_only", "running_stat")
    for name in (*needing, "rs_sm_only", "a_sym", "emb_float"):
        if getattr(args, name) and not args.ptq:
            raise ValueError(f"--{name} needs --ptq")
    if args.resume_w and args.recon:
        raise ValueError("--resume_w takes weights as they are: it excludes --recon")
    if args.resume and args.resume_w:
        raise ValueError("--resume and --resume_w exclude one another: all of the checkpoint, or its weights alone")
    for name in ("resume", "resume_w"):
        if getattr(args, name) and (args.cali_ckpt is None or not args.cali_ckpt.is_file()):
            raise FileNotFoundError(f"--{name} needs a quantized checkpoint: --cali_ckpt {args.cali_ckpt} is none")


def environment(args: argparse.Namespace, device: str, batch_size: int) -> dict[str, Any]:
    """What changes no image, for run.json: the arguments as they were, the device, the batch size."""
    plain = {k: v if v is None or isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()}
    return {"arguments": plain, "device": device, "batch_size": batch_size}


@dataclass(frozen=True)
class Quantization:
    """Everything that the quantization flags ask for; the parts are None where they are off."""

    mode: str
    quant: QuantConfig | None
    smoothing: SmoothingConfig | None
    reconstruction: ReconstructionConfig | None
    correction: CorrectionConfig | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Quantization:
        """Raises ValueError as the parts do."""
        return cls(
            args.quant_mode, cli.quant_config(args), cli.smoothing_config(args), cli.reconstruction_config(args),
            cli.correction_config(args),
        )  # fmt: skip

    @property
    def label(self) -> str:
        """FP32, W4A8 qncd and so on."""
        return f"{self.quant.label} {self.mode}" if self.quant else "FP32"

    @property
    def controlled(self) -> CorrectionConfig | None:
        """The correction, if it needs the full-precision model's noise table."""
        return self.correction if self.correction and (self.correction.control or self.correction.shrink) else None

    def settings(self, args: argparse.Namespace, batch_size: int) -> dict[str, Any]:
        """What of it decides what an image looks like, for run.json."""

        def plain(part: Any) -> dict[str, Any] | None:
            return part and dataclasses.asdict(part)

        calibration = {
            "samples": args.cali_n, "steps": args.cali_st, "seed": args.cali_seed,
            "batch_size": args.cali_batch_size if args.running_stat or args.rs_sm_only else None,
            "data": str(args.cali_data_path) if args.cali_data_path else None,
            "checkpoint": str(args.cali_ckpt) if args.cali_ckpt else None,
            "weights_only_from_checkpoint": args.resume_w,
        }  # fmt: skip
        return {
            "quantization": self.quant and {"mode": self.mode, **dataclasses.asdict(self.quant)},
            "smoothing": plain(self.smoothing),
            "reconstruction": plain(self.reconstruction),
            "correction": plain(self.correction),
            "calibration": calibration if self.quant else None,
            "batch": batch_size if self.correction and self.correction.statistics == "batch" else None,
        }


def prepare_quantized(
    args: argparse.Namespace,
    wanted: Quantization,
    diffusion: Diffusion,
    base_hash: str,
    folder: Path,
    conditions: Conditions | None = None,
) -> tuple[Corrector | None, float]:
    """Turn the network of `diffusion` into the quantized one: from --cali_ckpt where it exists, else by calibrating.

    Args:
        folder: of the run; with --resume_w the new checkpoint is written into it.
        conditions: one for each of the --cali_n calibration trajectories.

    Returns:
        the corrector, where one is asked for, and the seconds that calibrating took.
    """
    quant, controlled = wanted.quant, wanted.controlled
    assert quant is not None
    calibration = CalibrationConfig(args.cali_n, args.cali_st, args.cali_batch_size, args.cali_seed)
    settings = {
        "reconstruction": wanted.reconstruction and dataclasses.asdict(wanted.reconstruction),
        "sampler": dataclasses.asdict(diffusion.config),
        "guidance": conditions.scale if conditions else None,
        "correction": {"interval": controlled.interval, "target": controlled.target} if controlled else None,
    }

    def record() -> NoiseTable:
        assert controlled is not None
        with cli.progress_bar("full-precision noise table", "image", is_quiet()) as bar:
            return record_noise_table(diffusion, calibration, controlled, bar, conditions)

    def corrector(table: NoiseTable | None) -> Corrector | None:
        return RuntimeNoiseCorrector(wanted.correction, table if controlled else None) if wanted.correction else None

    there = args.cali_ckpt is not None and args.cali_ckpt.is_file()
    if there and not args.resume_w:
        info, table = peek_quantized(args.cali_ckpt)
        _check_same(args.cali_ckpt, info, quant, wanted.smoothing is not None)
        if wanted.reconstruction and info.settings.get("reconstruction") != settings["reconstruction"]:
            raise ValueError(f"{args.cali_ckpt}: was reconstructed otherwise: {info.settings.get('reconstruction')}")
        if info.settings.get("sampler") != settings["sampler"] and info.smoothed:
            log.warning("%s was smoothed for the time steps of %s", args.cali_ckpt, info.settings.get("sampler"))
        made_for = {key: info.settings.get(key) for key in ("sampler", "guidance", "correction")}
        if controlled and (table is None or any(made_for[key] != settings[key] for key in made_for)):
            table = record()
        load_quantized_(diffusion.unet, args.cali_ckpt, base_hash)
        log.info("loaded %s: %s", args.cali_ckpt, info.config.label)
        return corrector(table), 0.0
    if there:
        info, _ = peek_quantized(args.cali_ckpt)
        _check_same(args.cali_ckpt, info, quant, wanted.smoothing is not None, WEIGHT_SETTINGS)
    start, table = time.perf_counter(), None
    if args.cali_data_path and args.cali_data_path.exists():
        data = load_calibration(args.cali_data_path, args.cali_n, args.cali_st)
        data.check_model(diffusion.unet, base_hash)
        table = record() if controlled else None
    else:
        with cli.progress_bar("calibration set", "image", is_quiet()) as bar:
            data, table = sample_calibration(diffusion, calibration, controlled, base_hash, bar, conditions)
        if args.cali_data_path:
            save_calibration(data, args.cali_data_path)
    _quantize_(args, wanted, diffusion, data, base_hash, folder)
    target = folder / "quantized.safetensors" if args.resume_w else args.cali_ckpt
    if target:
        save_quantized(diffusion.unet, target, quant, base_hash, table, settings)
        log.info("quantized checkpoint: %s, %.1f MB", target, target.stat().st_size / 1e6)
    return corrector(table), time.perf_counter() - start


def _quantize_(
    args: argparse.Namespace, wanted: Quantization, diffusion: Diffusion, data: CalibrationSet, base_hash: str, folder: Path
) -> None:
    quant = wanted.quant
    assert quant is not None
    with (
        cli.progress_bar("reconstruction", "block", is_quiet() or wanted.reconstruction is None) as blocks,
        cli.progress_bar(f"calibrating {quant.label}", "input", is_quiet()) as bar,
    ):
        if args.resume_w:
            load_weights_(diffusion.unet, args.cali_ckpt, quant, base_hash)
            log.info("weights of %s; activations are calibrated anew", args.cali_ckpt)
            calibrate_(diffusion.unet, data, args.cali_batch_size, bar)
        else:
            quantize_with_(
                diffusion, quant, data, wanted.smoothing, args.cali_batch_size, bar, wanted.reconstruction, blocks,
                folder / "reconstruction" if wanted.reconstruction else None,
            )  # fmt: skip


def _check_same(path: Path, info: QuantizedInfo, wanted: QuantConfig, smooth: bool, names: Sequence[str] | None = None) -> None:
    old, new = dataclasses.asdict(info.config) | {"smoothed": info.smoothed}, dataclasses.asdict(wanted) | {"smoothed": smooth}
    differing = [f"{key} {old[key]} there, {new[key]} asked for" for key in names or old if old[key] != new[key]]
    if differing:
        raise ValueError(
            f"{path}: was quantized otherwise ({'; '.join(differing)}): name another --cali_ckpt or the same settings"
        )


@dataclass(frozen=True)
class ImagePlan:
    """The images of a run.

    Attributes:
        count: images 0 to count - 1.
        seed_of: the seed of image i.
        conditions: of a list of images; None for an unconditional model.
        decode: samples (N, C, H, W) of the diffusion -> images uint8 (N, H, W, C).
        columns: of the contact sheet.
    """

    count: int
    seed_of: Callable[[int], int]
    conditions: Callable[[Sequence[int]], Conditions] | None = None
    decode: Callable[[Tensor], np.ndarray] = to_uint8
    columns: int = 8

    def path(self, folder: Path, index: int) -> Path:
        """Of one image: its index and seed are its name."""
        return folder / image_name(index, self.seed_of(index))


class SamplingJob:
    """The images of one run on their way to its folder."""

    def __init__(self, run: Run, plan: ImagePlan, batch_size: int) -> None:
        self.run, self.plan, self.batch_size = run, plan, batch_size
        self.figures: dict[str, Any] = {}

    def sample_and_finish(
        self,
        args: argparse.Namespace,
        wanted: Quantization,
        diffusion: Diffusion,
        base_hash: str,
        calibration_conditions: Conditions | None = None,
        grid: bool = True,
    ) -> None:
        """The whole run: the full-precision images where they are compared with, the quantized ones, sheets and figures."""
        if args.compare_fp:
            self.sample_images(diffusion, "fp", None, "FP32")
        corrector = None
        if wanted.quant:
            corrector, seconds = prepare_quantized(args, wanted, diffusion, base_hash, self.run.folder, calibration_conditions)
            self.figures["calibration_seconds"] = seconds
        self.sample_images(diffusion, "images", corrector, wanted.label)
        if args.sequence:
            self.write_sequence(diffusion, corrector)
        self.finish(wanted.label, args.compare_fp, args.savez, grid)

    def sample_images(self, diffusion: Diffusion, subfolder: str, corrector: Corrector | None, label: str) -> None:
        """Sample what is missing of the plan's images into a subfolder, batch by batch."""
        plan, folder = self.plan, self.run.folder / subfolder
        folder.mkdir(exist_ok=True)
        done = self.run.existing_indices(subfolder)
        missing = [i for i in range(plan.count) if i not in done]
        if len(missing) < plan.count:
            log.info("%s: %d of %d images are there already", folder, plan.count - len(missing), plan.count)
        start = time.perf_counter()
        with cli.progress_bar(f"sampling {label}", "image", is_quiet()) as bar:
            for first in range(0, len(missing), self.batch_size):
                indices = missing[first : first + self.batch_size]
                images = plan.decode(self._sample(diffusion, indices, corrector))
                for index, image in zip(indices, images, strict=True):
                    save_png(image, plan.path(folder, index))
                bar(first + len(indices), len(missing))
        seconds = time.perf_counter() - start
        if missing:
            self.figures[f"{subfolder}_seconds"] = seconds
            self.figures[f"{subfolder}_per_second"] = len(missing) / seconds

    def _sample(self, diffusion: Diffusion, indices: Sequence[int], corrector: Corrector | None, callback: Any = None) -> Tensor:
        conditions = self.plan.conditions(indices) if self.plan.conditions else None
        seeds = [self.plan.seed_of(i) for i in indices]
        return diffusion.sample(seeds, corrector, callback, conditions=conditions)

    def write_sequence(self, diffusion: Diffusion, corrector: Corrector | None) -> None:
        """sequence.png: the first images on their way from noise."""
        total = len(diffusion.steps)
        kept = {round(i * (total - 1) / max(1, SEQUENCE_STEPS - 1)) for i in range(SEQUENCE_STEPS)}
        rows: list[np.ndarray] = []

        def keep(state: Any) -> None:
            if state.step.index in kept:
                rows.append(self.plan.decode(state.x_prev))

        self._sample(diffusion, range(min(SEQUENCE_IMAGES, self.plan.count)), corrector, keep)
        images = np.stack(rows, 1)  # (images, steps, H, W, C)
        sheet = contact_sheet([images.reshape(-1, *images.shape[2:])], ["x_t on its way"], len(rows))
        sheet.save(self.run.folder / "sequence.png")

    def finish(self, label: str, compared: bool, savez: bool = False, grid: bool = True) -> None:
        """Write the contact sheet, samples.npz and the figures; `compared`: images of the FP32 model lie in fp/."""
        blocks, labels = [self._read("images", SHEET_IMAGES)], [label]
        if compared:
            blocks.insert(0, self._read("fp", SHEET_IMAGES))
            labels.insert(0, "FP32")
            mse = np.concatenate([
                paired_mse(self._read("fp", rows=part), self._read("images", rows=part)) for part in _parts(self.plan.count)
            ])  # fmt: skip
            psnr = float(mse_to_psnr(mse).mean())
            self.figures |= {"psnr_to_fp_db": psnr, "mse_to_fp": float(mse.mean())}
            log.info("PSNR to full precision %.2f dB (mean over %d images, peak 255)", psnr, len(mse))
        if grid:
            contact_sheet(blocks, labels, self.plan.columns).save(self.run.folder / "contact_sheet.png")
        if savez:
            save_npz(self._read("images"), self.run.folder / "samples.npz")
        self.run.finish(**self.figures)
        log.info("%d images in %s", self.plan.count, self.run.folder / "images")

    def _read(self, subfolder: str, limit: int | None = None, rows: range | None = None) -> np.ndarray:
        indices = rows if rows is not None else range(min(self.plan.count, limit or self.plan.count))
        arrays = [np.asarray(Image.open(self.plan.path(self.run.folder / subfolder, i))) for i in indices]
        return np.stack([a if a.ndim == 3 else a[..., None] for a in arrays])


def _parts(count: int, size: int = 256) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
