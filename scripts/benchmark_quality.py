#!/usr/bin/env python3
"""Measure what quantization costs the model in the box, and what each part of QNCD gives back.

    python scripts/benchmark_quality.py --out runs/quality
    python scripts/benchmark_quality.py --out runs/quality --widths W4A8 --modes linear qncd --seeds 1

Rows: full precision, and every mode at every width, each with several calibration seeds. Finished cells are kept in
OUT/cells: the same command goes on with a run that was cut off. Results: OUT/quality.md, quality.json and quality.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd import cli
from qncd.config import (
    CalibrationConfig,
    CorrectionConfig,
    QuantConfig,
    SamplerConfig,
    SmoothingConfig,
)

if TYPE_CHECKING:
    import numpy as np

    from qncd.io.runs import Run
    from qncd.ptq.calibration import CalibrationSet
    from qncd.ptq.pipeline import Diffusion
    from qncd.sampling.runtime_noise import NoiseTable

log = logging.getLogger("qncd")
ROOT = Path(__file__).resolve().parents[1]
MODES = {  # name: what the table calls it
    "linear": "linear",
    "neither": "qncd, neither",
    "smoothing": "qncd, smoothing only",
    "correction": "qncd, correction only",
    "qncd": "qncd",
    "paper": "qncd, no bias correction",
}
WIDTHS = ("W8A8", "W4A8", "W8A6", "W4A6")
FULL = "FP"
LANE = 16  # inputs in each network call, always exactly
PART = 512  # full-precision images in one file of the cache
ERROR_IMAGES = 64
FEATURE_BATCH = 256
UNBIASED_IMAGES = 2048
FORMAT = 1  # of a cell's file; raised when the same settings come to mean something else


@dataclass(frozen=True)
class Plan:
    """What all cells of a benchmark share; sent to every worker.

    Attributes:
        out: folder of the results.
        model_config: the model's yaml.
        ckpt: where its weights are, None for those that the config names.
        model_hash: of the weights.
        calibration: with the seed of the first repetition; others count up from it.
        correction: of the modes that correct.
        controlled: record the full-precision noise table, because some mode corrects.
        image_seed: image i has the seed image_seed + i.
        commit: of the code, for the cells' files.
    """

    out: Path
    model_config: dict[str, Any]
    ckpt: str | None
    model_hash: str
    device: str
    sampler: SamplerConfig
    calibration: CalibrationConfig
    correction: CorrectionConfig
    controlled: bool
    images: int
    image_seed: int
    batch_size: int
    commit: str | None = None

    def diffusion(self) -> Diffusion:
        """The full-precision model, read anew."""
        from qncd.models.loading import load_ddim
        from qncd.ptq.pipeline import Diffusion
        from qncd.sampling.schedule import betas_of

        unet = load_ddim(self.model_config, self.ckpt).to(self.device)  # type: ignore[arg-type]
        size, channels = int(self.model_config["data"]["image_size"]), int(self.model_config["model"]["in_channels"])
        return Diffusion(unet, betas_of(self.model_config), self.sampler, (channels, size, size), LANE)

    def base_settings(self) -> dict[str, Any]:
        """What decides the full-precision images."""
        return {
            "format": FORMAT, "model": self.model_hash, "diffusion": self.model_config["diffusion"],
            "sampler": dataclasses.asdict(self.sampler), "lane": LANE, "image_seed": self.image_seed,
        }  # fmt: skip

    def cached(self, kind: str, suffix: str, settings: dict[str, Any]) -> Path:
        """A file of the cache, named after all that decides its content: other settings never find it."""
        import hashlib

        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return self.out / "cache" / f"{kind}_{key}{suffix}"

    def part_path(self, start: int) -> Path:
        stop = min(start + PART, self.images)
        return self.cached(f"fp_{start:06d}_{stop:06d}", ".npz", self.base_settings())

    def calibration_paths(self, seed: int) -> tuple[Path, Path]:
        """Calibration set and noise table of one repetition."""
        settings = self.base_settings() | {
            "calibration": dataclasses.asdict(self.calibration),
            "correction": dataclasses.asdict(self.correction) if self.controlled else None,
        }
        kind = f"calibration_{seed}"
        return self.cached(kind, ".pt", settings), self.cached(kind, ".safetensors", settings)


@dataclass(frozen=True, order=True)
class Cell:
    """One run of the benchmark: a width and a mode with one calibration seed, or full precision."""

    width: str
    mode: str = FULL
    seed: int = 0

    @property
    def name(self) -> str:
        return FULL if self.mode == FULL else f"{self.width}_{self.mode}_seed{self.seed}"

    def path(self, plan: Plan) -> Path:
        return plan.out / "cells" / f"{self.name}.json"

    @property
    def quant(self) -> QuantConfig | None:
        """Min-max ranges alone (linear), or mse weight ranges, split and bias correction (all others)."""
        if self.mode == FULL:
            return None
        ours, (weight_bits, act_bits) = self.mode != "linear", parse_width(self.width)
        weight_range = "mse" if ours else "max"
        biases = ours and self.mode != "paper"
        return QuantConfig(weight_bits, act_bits, weight_range=weight_range, act_range="max", split=ours, bias_correction=biases)

    @property
    def smoothing(self) -> SmoothingConfig | None:
        return SmoothingConfig() if self.mode in ("smoothing", "qncd", "paper") else None

    def correction(self, plan: Plan) -> CorrectionConfig | None:
        return plan.correction if corrects(self.mode) else None

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Everything that decides the cell's figures, as it comes back from JSON."""
        quant, smoothing, correction = self.quant, self.smoothing, self.correction(plan)
        calibration = dataclasses.replace(plan.calibration, seed=self.seed)
        settings = plan.base_settings() | {
            "images": plan.images,
            "error_images": ERROR_IMAGES,
            "quantization": quant and dataclasses.asdict(quant),
            "smoothing": smoothing and dataclasses.asdict(smoothing),
            "correction": correction and dataclasses.asdict(correction),
            "calibration": quant and dataclasses.asdict(calibration),
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def finished(self, plan: Plan) -> dict[str, Any] | None:
        """The cell's file, None where there is none, or one with other settings, or a damaged one."""
        try:
            record = json.loads(self.path(plan).read_text(encoding="utf-8"))
            return record if record["settings"] == self.settings(plan) and record["figures"] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def corrects(mode: str) -> bool:
    return mode in ("correction", "qncd", "paper")


def parse_width(text: str) -> tuple[int, int]:
    """Bits of weights and activations of a name such as W4A8. Raises ValueError for anything else."""
    match = re.fullmatch(r"[Ww]([2-8])[Aa]([2-8])", text)
    if not match:
        raise ValueError(f"--widths {text}: allowed are names such as W4A8, 2 to 8 bits each")
    return int(match[1]), int(match[2])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "fashion_mnist.yml",
        help="yaml of the model, 32x32 grey (default configs/fashion_mnist.yml)",
    )  # fmt: skip
    group.add_argument("--ckpt", help="weights (default: what the config names)")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--widths", nargs="+", default=list(WIDTHS), metavar="WxAy", help=f"default {' '.join(WIDTHS)}")
    group.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help=f"default {' '.join(MODES)}")
    group.add_argument("--seeds", type=int, default=3, help="repetitions, each with its own calibration images (default 3)")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--images", type=int, default=UNBIASED_IMAGES,
        help=f"images of each cell (default {UNBIASED_IMAGES}; 10000 for figures to publish)",
    )  # fmt: skip
    cli.add_step_arguments(group, 20)
    group.add_argument("--seed", type=int, default=1234, help="image i has the seed SEED + i in every cell (default 1234)")
    group.add_argument("--batch_size", type=int, default=64, help="images at a time (default 64); changes no image")
    group = parser.add_argument_group("calibration and correction")
    group.add_argument("--cali_n", type=int, default=64, help="inputs at each calibration time step (default 64)")
    group.add_argument("--cali_st", type=int, default=10, help="calibration time steps (default 10)")
    group.add_argument("--interval", type=int, default=CorrectionConfig().interval, help="steps between two noise estimates")
    group = parser.add_argument_group("running")
    group.add_argument("--out", type=Path, default=Path("runs/quality"), help="output folder (default runs/quality)")
    group.add_argument("--jobs", type=int, help="worker processes (default: the number of cores; 1 on cuda)")
    group.add_argument("--report", action="store_true", help="compute nothing: write the table of the cells that are there")
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given)
    args.command = shlex.join(["python", "scripts/benchmark_quality.py", *(a for a in given if a != "--report")])
    return args


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cli.check_counts(args, ("images", "seeds", "batch_size", "cali_n", "cali_st", "interval", "jobs"))
    widths = [f"W{w}A{a}" for w, a in dict.fromkeys(parse_width(text) for text in args.widths)]
    plan = make_plan(args)
    modes = [mode for mode in MODES if mode in args.modes]
    cells = [Cell(FULL)] + [Cell(w, mode, seed) for seed in range(args.seeds) for w in widths for mode in modes]
    from qncd.io.runs import RUN_FILE, Run, open_run

    if args.report:
        if not (args.out / RUN_FILE).is_file():
            raise FileNotFoundError(f"{args.out}: no benchmark in this folder (it has no {RUN_FILE})")
        run = Run(args.out)
    else:
        environment = {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in vars(args).items()}
        room = 2 * plan.images * 32 * 32 + args.seeds * 4 * args.cali_n * args.cali_st * 32 * 32 + 1_000_000
        run = open_run(args.out, {"benchmark": "quality"}, environment, min_free_bytes=room)
        compute(args, run, plan, cells)
    write_report(args, run, plan, cells)


def make_plan(args: argparse.Namespace) -> Plan:
    """All settings, checked: what is wrong shows now and not after hours."""
    if args.images < 2:
        raise ValueError(f"--images {args.images}: allowed are 2 or more (the FID's covariance needs them)")
    if args.images < UNBIASED_IMAGES:
        log.info("note: FID and sFID are biased upwards at %d images (fewer than %d)", args.images, UNBIASED_IMAGES)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: allowed are whole numbers, 0 or more")
    sampler = SamplerConfig(args.sample_type, args.skip_type, args.timesteps, args.eta)
    calibration = CalibrationConfig(args.cali_n, args.cali_st)
    correction, controlled = CorrectionConfig(interval=args.interval), any(map(corrects, args.modes))

    import torch

    from qncd.metrics.features import FashionMnistFeatures
    from qncd.models.loading import load_config, state_dict_hash
    from qncd.ptq.calibration import CalibrationCollector
    from qncd.sampling.runtime_noise import is_due

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model_config = load_config(args.config)
    plan = Plan(
        args.out, model_config, args.ckpt, "", device, sampler, calibration, correction, controlled,
        args.images, args.seed, args.batch_size,
    )  # fmt: skip
    diffusion = plan.diffusion()
    if diffusion.shape[0] != 1:
        raise ValueError(f"{args.config}: {diffusion.shape[0]} channels: the Fashion-MNIST features take grey images")
    FashionMnistFeatures().check_size(*diffusion.shape[1:])
    CalibrationCollector(len(diffusion.steps), args.cali_st)
    if controlled and not any(is_due(step.index, args.interval) for step in diffusion.steps):
        raise ValueError(f"--interval {args.interval}: none of the {len(diffusion.steps)} steps would make an estimate")
    if controlled and args.cali_n < 2:
        raise ValueError(f"--cali_n {args.cali_n}: the noise correction's control needs 2 or more")
    return dataclasses.replace(plan, model_hash=state_dict_hash(diffusion.unet))


def compute(args: argparse.Namespace, run: Run, plan: Plan, cells: Sequence[Cell]) -> None:
    """Run the cells that are not there, after what they share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = args.jobs or (1 if plan.device.startswith("cuda") else cores)
    threads = max(1, cores // jobs)
    record = run.record
    plan = dataclasses.replace(plan, commit=(record["resumed"] or [record])[-1]["git_commit"])
    for name in ("cells", "cache"):
        (plan.out / name).mkdir(exist_ok=True)
    missing = [cell for cell in cells if cell.finished(plan) is None]
    log.info("%d of %d cells are there already; %d processes", len(cells) - len(missing), len(cells), jobs)
    start = time.perf_counter()
    if missing:
        parts = [first for first in range(0, plan.images, PART) if not plan.part_path(first).is_file()]
        run_tasks("full precision", "part", sample_part, plan, parts, jobs, threads)
        seeds = sorted({cell.seed for cell in missing if cell.mode != FULL})
        seeds = [seed for seed in seeds if not plan.calibration_paths(seed)[0].is_file()]
        run_tasks("calibration sets", "set", sample_calibration_set, plan, seeds, jobs, threads)
        run_tasks("cells", "cell", run_cell, plan, missing, jobs, threads)
    run.finish(cells=len(cells), cells_computed=len(missing), seconds=time.perf_counter() - start)


def run_tasks(
    title: str, unit: str, function: Callable[[Plan, Any], None], plan: Plan, items: Sequence[Any], jobs: int, threads: int
) -> None:
    """function(plan, item) for all items, in this process or in `jobs` others, with a progress line on stderr."""
    if not items:
        return
    with cli.progress_bar(title, unit) as bar:
        bar(0, len(items))
        if jobs == 1:
            import torch

            torch.set_num_threads(threads)
            for done, item in enumerate(items, 1):
                function(plan, item)
                bar(done, len(items))
            return
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, as_completed
        from concurrent.futures.process import BrokenProcessPool

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(items)), context, start_worker, (threads,)) as pool:
            futures = [pool.submit(function, plan, item) for item in items]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    bar(done, len(items))
            except BrokenProcessPool:
                raise OSError("a worker process died (short of memory?): the same command line goes on from here") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def start_worker(threads: int) -> None:
    """Share the cores, end at Ctrl-C without a traceback, and do not outlive the benchmark."""
    import multiprocessing
    import signal
    import threading

    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def sample_part(plan: Plan, start: int) -> None:
    """Up to PART full-precision images, into the cache."""
    import numpy as np

    from qncd.ptq.evaluation import sample_images

    stop = min(start + PART, plan.images)
    images = sample_images(plan.diffusion(), range(plan.image_seed + start, plan.image_seed + stop), plan.batch_size)
    path = plan.part_path(start)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with partial.open("wb") as stream:
        np.savez(stream, images=images)
    partial.replace(path)


def full_precision_images(plan: Plan) -> np.ndarray:
    """All of them, uint8 (N, H, W, C)."""
    import numpy as np

    parts = []
    for start in range(0, plan.images, PART):
        with np.load(plan.part_path(start)) as file:
            parts.append(file["images"])
    return np.concatenate(parts)


def sample_calibration_set(plan: Plan, seed: int) -> None:
    """Calibration set and noise table of one repetition, into the cache; the set last, as the sign that both are there."""
    from safetensors.torch import save_file

    from qncd.ptq.calibration import save_calibration
    from qncd.ptq.pipeline import sample_calibration

    config = dataclasses.replace(plan.calibration, seed=seed)
    data, table = sample_calibration(plan.diffusion(), config, plan.correction if plan.controlled else None, plan.model_hash)
    data_path, table_path = plan.calibration_paths(seed)
    if table is not None:
        tensors, head = table.to_tensors()
        partial = table_path.with_name(f".{table_path.name}.{os.getpid()}.part")
        save_file(tensors, partial, {"noise_table": head})
        partial.replace(table_path)
    save_calibration(data, data_path)


def load_calibration_set(plan: Plan, seed: int) -> tuple[CalibrationSet, NoiseTable | None]:
    """What `sample_calibration_set` has written."""
    from safetensors import safe_open

    from qncd.ptq.calibration import load_calibration
    from qncd.sampling.runtime_noise import NoiseTable

    data_path, table_path = plan.calibration_paths(seed)
    table = None
    if plan.controlled:
        with safe_open(table_path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            table = NoiseTable.from_tensors(tensors, file.metadata()["noise_table"])
    return load_calibration(data_path, plan.calibration.samples, plan.calibration.steps), table


def run_cell(plan: Plan, cell: Cell) -> None:
    """Quantize, sample, measure, and write the cell's file."""
    import torch

    from qncd.metrics.statistics import mse_to_psnr, paired_mse
    from qncd.ptq.evaluation import NoiseErrorRecorder, sample_images
    from qncd.ptq.pipeline import quantize_with_
    from qncd.sampling.runtime_noise import RuntimeNoiseCorrector

    full, figures, start = full_precision_images(plan), dict[str, Any](), time.perf_counter()
    images = full
    if cell.quant is not None:
        diffusion, reference, correction = plan.diffusion(), plan.diffusion(), cell.correction(plan)
        data, table = load_calibration_set(plan, cell.seed)
        figures["calibration_seconds"] = quantize_with_(diffusion, cell.quant, data, cell.smoothing, plan.calibration.batch_size)
        corrector = RuntimeNoiseCorrector(correction, table) if correction else None
        errors = NoiseErrorRecorder(reference.denoiser(), ERROR_IMAGES)
        try:
            images = sample_images(
                diffusion, range(plan.image_seed, plan.image_seed + plan.images), plan.batch_size, corrector, errors
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{cell.name}: {error}") from None
        mse = paired_mse(full, images)
        changed = mse[mse > 0]
        figures |= {
            "psnr": float(mse_to_psnr(changed).mean()) if len(changed) else None,
            "identical_images": len(mse) - len(changed),
            "mse": float(mse.mean()),
            "noise_error": errors.mean_error(),
            "noise_error_per_step": errors.error_per_step(),
            "gain_per_step": errors.gain_per_step(),
            "bias_per_step": errors.bias_per_step(),
        }
    figures |= frechet_figures(images, plan.device)
    record = {
        "cell": dataclasses.asdict(cell), "settings": cell.settings(plan), "figures": figures,
        "seconds": time.perf_counter() - start, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "git_commit": plan.commit,
    }  # fmt: skip
    write_text(cell.path(plan), json.dumps(record, indent=2) + "\n")


def frechet_figures(images: np.ndarray, device: str) -> dict[str, float]:
    """FID and sFID of uint8 (N, H, W, 1) against the statistics of the training set."""
    import torch

    from qncd.metrics.features import FashionMnistFeatures
    from qncd.metrics.sources import FASHION_MNIST_STATISTICS, SavedStatistics
    from qncd.metrics.statistics import StatisticsAccumulator, frechet_distance

    real, extractor = SavedStatistics.open(FASHION_MNIST_STATISTICS), FashionMnistFeatures(device=device)
    pooled, spatial = StatisticsAccumulator(), StatisticsAccumulator()
    for batch in torch.from_numpy(images).split(FEATURE_BATCH):
        outputs = extractor(batch)
        pooled.update(outputs["features"])
        spatial.update(outputs["spatial"])
    assert real.spatial is not None
    return {
        "fid": frechet_distance(real.features, pooled.finish()),
        "sfid": frechet_distance(real.spatial, spatial.finish()),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, extremes and standard deviation (N - 1; 0 of one value), None where a value is missing."""
    import numpy as np

    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    return {"mean": float(np.mean(numbers)), "min": min(numbers), "max": max(numbers), "std": deviation}


def summarize(records: dict[Cell, dict[str, Any]], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for full precision and one for each width and mode, over the seeds whose cells are there."""
    import numpy as np

    full = records.get(Cell(FULL))
    rows = []
    for width, mode in dict.fromkeys((cell.width, cell.mode) for cell in cells):
        found = [records[cell]["figures"] for cell in cells if (cell.width, cell.mode) == (width, mode) and cell in records]
        row: dict[str, Any] = {"width": width, "mode": mode, "seeds": len(found)}
        row |= {key: spread([f.get(key) for f in found]) for key in ("fid", "sfid", "psnr", "noise_error")}
        row["fid_difference"] = spread([f["fid"] - full["figures"]["fid"] for f in found]) if full and mode != FULL else None
        row["identical_images"] = sum(f.get("identical_images", 0) for f in found)
        if found and mode != FULL:
            steps = np.array([f["noise_error_per_step"] for f in found])  # (seeds, steps)
            row["noise_error_per_step"] = {
                "mean": steps.mean(0).tolist(), "min": steps.min(0).tolist(), "max": steps.max(0).tolist(),
            }  # fmt: skip
        rows.append(row)
    return rows


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown."""
    columns = {"fid": ".3f", "fid_difference": "+.3f", "sfid": ".3f", "psnr": ".2f", "noise_error": ".3g"}

    def show(row: dict[str, Any], key: str) -> str:
        value, style = row[key], columns[key]
        if value is None:
            return "–"
        mean = format(value["mean"], style)
        return mean if row["seeds"] < 2 else f"{mean} ({value['min']:{style}} to {value['max']:{style}})"

    lines = [
        "| width | mode | FID | FID − FID of FP | sFID | PSNR to FP, dB | noise-prediction error | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = "full precision" if row["mode"] == FULL else MODES[row["mode"]]
        seeds = "–" if row["mode"] == FULL else str(row["seeds"])
        width = "FP32" if row["mode"] == FULL else row["width"]
        lines.append(" | ".join([f"| {width}", name, *(show(row, key) for key in columns), f"{seeds} |"]))
    return lines


def caption(args: argparse.Namespace, plan: Plan, rows: Sequence[dict[str, Any]], commits: Sequence[str]) -> list[str]:
    """How the numbers came about, in words."""
    from qncd.metrics.features import FashionMnistFeatures

    sampler = plan.sampler
    identical = sum(row["identical_images"] for row in rows)
    repeated = "One calibration seed; "
    if args.seeds > 1:
        repeated = f"Mean (min to max) over {args.seeds} calibration seeds: the spread of calibration, not of sampling; "
    notes = [
        f"`{args.command}`",
        repeated + f"every cell makes the same {plan.images} images (seeds {plan.image_seed} to "
        f"{plan.image_seed + plan.images - 1}).",
        f"Sampling: {sampler.sample_type}, {sampler.timesteps} steps ({sampler.skip_type}), eta {sampler.eta:g}. Calibration: "
        f"{plan.calibration.samples} images at {plan.calibration.steps} time steps. Correction: every "
        f"{plan.correction.interval} steps.",
        f"FID and sFID: against the training set, {FashionMnistFeatures().convention}; not on the scale of Inception's."
        + (f" Biased upwards at fewer than {UNBIASED_IMAGES} images." if plan.images < UNBIASED_IMAGES else ""),
        "PSNR: mean over images, peak 255, uint8, to full precision with the same seeds"
        + (f"; without the {identical} images that equal it." if identical else "."),
        "Noise-prediction error: ‖ε − ε_FP‖² / ‖ε_FP‖² at the quantized model's own x_t, ε after correction, mean over the "
        f"steps, first {min(ERROR_IMAGES, plan.images)} images.",
        "linear: min-max ranges, no split. All qncd rows: mse weight ranges, min-max activation ranges, split, and (but for "
        "the last) bias correction; neither, smoothing only and correction only leave out the rest.",
        f"Code: {', '.join(commits) or 'unknown commit'}.",
    ]
    if len(commits) > 1:
        notes.append("The cells come from more than one state of the code.")
    return notes


def write_report(args: argparse.Namespace, run: Run, plan: Plan, cells: Sequence[Cell]) -> None:
    """quality.json, quality.md and quality.png of the cells that are there, and the table on stdout."""
    records = {cell: record for cell in cells if (record := cell.finished(plan)) is not None}
    if not records:
        raise ValueError(f"{plan.out}: no finished cell with these settings")
    rows = summarize(records, cells)
    commits = sorted({record["git_commit"] for record in records.values() if record["git_commit"]})
    notes = caption(args, plan, rows, commits)
    if missing := [cell.name for cell in cells if cell not in records]:
        notes.append(f"Not finished: {len(missing)} of {len(cells)} cells.")
    session = run.record
    content = {
        "command": args.command, "caption": notes, "settings": Cell(FULL).settings(plan), "rows": rows, "missing": missing,
        "cells": list(records.values()), "git_commits": commits, "versions": session["versions"],
    }  # fmt: skip
    write_text(plan.out / "quality.json", json.dumps(content, indent=2) + "\n")
    lines = ["# Quality after quantization", "", *table_lines(rows), "", *(f"- {note}" for note in notes)]
    write_text(plan.out / "quality.md", "\n".join(lines) + "\n")
    draw_errors(rows, plan.out / "quality.png")
    print("\n".join(lines[2:]))
    log.info("written: %s", ", ".join(str(plan.out / f"quality.{suffix}") for suffix in ("md", "json", "png")))


def draw_errors(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Noise-prediction error by step: a panel for each width, a line for each mode, the spread over seeds as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(row["width"] for row in rows if "noise_error_per_step" in row))
    if not widths:
        return
    figure = Figure(figsize=(4.2 * len(widths), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(widths), squeeze=False, sharey=True)[0]
    for panel, width in zip(panels, widths, strict=True):
        for row in rows:
            if row["width"] != width or "noise_error_per_step" not in row:
                continue
            values, color = row["noise_error_per_step"], f"C{list(MODES).index(row['mode'])}"
            steps = range(1, len(values["mean"]) + 1)
            panel.plot(steps, values["mean"], label=MODES[row["mode"]], color=color, linewidth=1.5)
            panel.fill_between(steps, values["min"], values["max"], color=color, alpha=0.2, linewidth=0)
        panel.set(title=width, xlabel="step (1: the noisiest)", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative squared error of the noise prediction")
    panels[0].legend(fontsize="small")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
