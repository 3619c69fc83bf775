"""One run of a sampling command: sample what is missing, write images, sheets and figures."""

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
import torch
from PIL import Image
from torch import Tensor

from qncd.app import parser as cli
from qncd.app.quantizing import Files, is_quiet, quantized
from qncd.distributed import OneProcess, Processes, start_processes
from qncd.engines.registry import TORCH
from qncd.io.images import contact_sheet, image_name, save_npz, save_png, to_uint8
from qncd.io.runs import Run
from qncd.metrics.statistics.moments import mse_to_psnr, paired_mse
from qncd.models.network import network_of
from qncd.models.original.key_tables import KeyTable
from qncd.progress import progress_bar
from qncd.recipe import Recipe
from qncd.sampling.corrector import Corrector
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions

log = logging.getLogger("qncd")
SHEET_IMAGES = 64  # the most that a contact sheet shows of one model
SEQUENCE_IMAGES, SEQUENCE_STEPS = 8, 16


def set_up_logging(level: str) -> None:
    """Messages of the package as plain lines on stderr."""
    logging.basicConfig(level=level.upper(), format="%(message)s", force=True)
    for library in ("httpx", "onnx_ir", "torch.onnx"):
        logging.getLogger(library).setLevel(logging.WARNING)


def start_job(args: argparse.Namespace) -> Processes:
    """The processes of --device, --devices and --num_nodes; all but the first are silent.

    Raises:
        ValueError: there are not that many devices.
    """
    cli.check_counts(args, ("devices", "num_nodes"))
    processes = start_processes(cli.choose_device(args.device), args.devices, args.num_nodes)
    set_up_logging(args.verbose if processes.is_first else "critical")
    return processes


def in_processes(
    args: argparse.Namespace,
    recipe: Recipe | None,
    sample: Callable[[argparse.Namespace, Recipe | None, Processes], None],
) -> None:
    """Run `sample` in each of the processes that the flags ask for; of an error, the first one tells."""
    processes = start_job(args)
    with processes.quiet_failure():
        sample(args, recipe, processes)


def environment(args: argparse.Namespace, device: str | torch.device, batch_size: int) -> dict[str, Any]:
    """What changes no image, for run.json: the arguments as they were, the device, the batch size."""
    plain = {k: v if v is None or isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()}
    return {"arguments": plain, "device": str(device), "batch_size": batch_size}


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


def on_engine(args: argparse.Namespace, recipe: Recipe | None, diffusion: Diffusion, base_hash: str, folder: Path) -> Diffusion:
    """The same with the network on --backend: from --onnx, else exported to `folder` unless it lies there already.

    An engine that runs no file needs none.

    Raises:
        ValueError: --onnx holds another network, or one for samples of another shape.
        FileNotFoundError: --onnx holds none.
    """
    from qncd.engines.engine import engine_of, export, open_engine
    from qncd.engines.onnx.model import FILE, check_fits, is_current

    network = diffusion.network
    if not engine_of(args.backend).file:
        log.info("%s runs the network on %s", args.backend, network.device)
    elif args.onnx is not None:
        folder = args.onnx
        check_fits(folder, network, diffusion.shape)
    elif not is_current(folder, network, diffusion.shape):
        path = export(network, folder, recipe.quant if recipe else None, base_hash, shape=diffusion.shape)
        log.info("exported %s: %.1f MB", path, path.stat().st_size / 1e6)
    if engine_of(args.backend).file:
        log.info("%s runs %s", args.backend, folder / FILE)
    opened = open_engine(network, folder, args.backend, args.engine_precision)
    return dataclasses.replace(diffusion, network=network_of(opened))


@dataclass(frozen=True)
class Task:
    """What a run samples with.

    Attributes:
        diffusion: in full precision.
        base_hash: of its weights.
        recipe: of the quantization; None for full precision.
        conditions: of the calibration trajectories.
        key_table: names of the original model's layers, where they are known.
    """

    diffusion: Diffusion
    base_hash: str
    recipe: Recipe | None = None
    conditions: Conditions | None = None
    key_table: KeyTable | None = None


class SamplingJob:
    """The images of one run on their way to its folder.

    Several processes share the batches of images; the first one writes everything else.
    """

    def __init__(self, run: Run, plan: ImagePlan, batch_size: int, processes: Processes | None = None) -> None:
        self.run, self.plan, self.batch_size, self.processes = run, plan, batch_size, processes or OneProcess()
        self.figures: dict[str, Any] = {}

    def sample_and_finish(self, args: argparse.Namespace, task: Task, grid: bool = True) -> None:
        """The whole run: the full-precision images where they are compared with, the quantized ones, sheets and figures.

        Without images in the plan it ends with the quantized network.
        """
        diffusion, recipe = task.diffusion, task.recipe
        label = recipe.label if recipe else "FP32"
        if args.compare_fp and self.plan.count:
            self.sample_images(diffusion, "fp", None, "FP32")
        corrector = None
        if recipe:
            files = Files.of(args, self.run.folder, task.key_table)
            corrector, seconds = quantized(recipe, diffusion, task.base_hash, files, task.conditions, self.processes)
            self.figures["calibration_seconds"] = seconds
        if not self.plan.count:
            if self.processes.is_first:
                self.run.finish(**self.figures)
            return
        if args.backend != TORCH:
            start = time.perf_counter()
            diffusion = on_engine(args, recipe, diffusion, task.base_hash, self.run.folder / "onnx")
            self.figures["engine_seconds"] = time.perf_counter() - start
        self.sample_images(diffusion, "images", corrector, label)
        if not self.processes.is_first:
            return
        if args.sequence:
            self.write_sequence(diffusion, corrector)
        self.finish(label, args.compare_fp, args.savez, grid)

    def sample_images(self, diffusion: Diffusion, subfolder: str, corrector: Corrector | None, label: str) -> None:
        """Sample what is missing of the plan's images into a subfolder, batch by batch."""
        plan, folder = self.plan, self.run.folder / subfolder
        folder.mkdir(exist_ok=True)
        done = self.processes.first(lambda: self.run.existing_indices(subfolder))
        missing = [i for i in range(plan.count) if i not in done]
        if len(missing) < plan.count:
            log.info("%s: %d of %d images are there already", folder, plan.count - len(missing), plan.count)
        start = time.perf_counter()
        error = None
        with progress_bar(f"sampling {label}", "image", is_quiet()) as bar:
            try:
                for first in range(self.processes.rank * self.batch_size, len(missing), self.processes.world * self.batch_size):
                    indices = missing[first : first + self.batch_size]
                    images = plan.decode(self._sample(diffusion, indices, corrector))
                    for index, image in zip(indices, images, strict=True):
                        save_png(image, plan.path(folder, index))
                    bar(min(len(missing), first + self.processes.world * self.batch_size), len(missing))
            except (ValueError, OSError) as problem:
                if self.processes.world == 1:
                    raise
                error = str(problem)
        self.processes.agree(error)
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
