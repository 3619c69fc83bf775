"""One run of a sampling command: sample what is missing, write images, sheets and figures."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qncd import saving
from qncd.app import messages, stopping
from qncd.app import parser as cli
from qncd.app.quantizing import Files, check_files, is_quiet, quantized, run_settings
from qncd.distributed import OneProcess, Processes, start_processes
from qncd.engines.registry import TORCH
from qncd.io.images import NotFiniteError, contact_sheet, image_name, save_image, save_npz, save_png, to_uint8
from qncd.io.runs import Run, open_run
from qncd.metrics.statistics.moments import PairedQuality, paired_mse
from qncd.models.network import network_of
from qncd.models.original.key_tables import KeyTable
from qncd.progress import progress_bar
from qncd.ptq.pipeline_runs import Given, Sampler
from qncd.recipe import QuantConfig, Recipe
from qncd.sampling.corrector import Corrector
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.pipeline import PipelineSampler
from qncd.workers import GO_ON

log = logging.getLogger("qncd")
SHEET_IMAGES = 64  # the most that a contact sheet shows of one model
SEQUENCE_IMAGES, SEQUENCE_STEPS = 8, 16


def start_job(args: argparse.Namespace) -> Processes:
    """The processes of --device, --devices and --num_nodes; all but the first are silent.

    Raises:
        ValueError: there are not that many devices.
    """
    cli.check_counts(args, ("devices", "num_nodes"))
    processes = start_processes(cli.choose_device(args.device), args.devices, args.num_nodes)
    messages.show(args.verbose if processes.is_first else "critical")
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
    return {
        "command": shlex.join(sys.argv),
        "arguments": plain,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }


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
    conditions: Callable[[Sequence[int]], Any] | None = None
    decode: Callable[[Tensor], np.ndarray] = to_uint8
    columns: int = 8

    def path(self, folder: Path, index: int) -> Path:
        """Of one image: its index and seed are its name."""
        return folder / image_name(index, self.seed_of(index))


def sampler_on_engine(args: argparse.Namespace, task: Task, folder: Path) -> Sampler:
    """A task's sampler with the network on --backend: from --onnx, else exported to `folder` unless it lies there already.

    An engine that runs no file needs none.

    Raises:
        ValueError: --onnx holds another network, or one for samples of another shape.
        FileNotFoundError: --onnx holds none.
    """
    from qncd.engines.engine import engine_of, export, open_engine
    from qncd.engines.onnx.model import FILE, check_fits, is_current

    sampler, network = task.sampler, task.sampler.network
    shape = network.shape_of(sampler.shape)
    if not engine_of(args.backend).file:
        log.info("%s runs the network on %s", args.backend, network.device)
    elif args.onnx is not None:
        folder = args.onnx
        check_fits(folder, network, shape)
    elif not is_current(folder, network, shape):
        log.info("exporting for %s", args.backend)
        path = export(network, folder, task.quant, task.base_hash, shape=shape)
        log.info("exported %s: %.1f MB", path, path.stat().st_size / 1e6)
    if engine_of(args.backend).file:
        log.info("%s runs %s", args.backend, folder / FILE)
    opened = open_engine(network, folder, args.backend, args.engine_precision)
    if task.state is not None and isinstance(sampler, PipelineSampler):
        return replace(sampler, pipe=saving.on_engine(sampler.pipe, opened, task.state))
    return sampler.with_network(network_of(opened))


@dataclass(frozen=True)
class Task:
    """What a run samples with.

    Attributes:
        sampler: in full precision, or of a pipeline that was loaded quantized.
        base_hash: of its weights in full precision.
        recipe: of the quantization; None for none.
        conditions: of the calibration trajectories.
        key_table: names of the original model's layers, where they are known.
        state: what a pipeline that was loaded quantized remembers.
    """

    sampler: Sampler
    base_hash: str
    recipe: Recipe | None = None
    conditions: Given = None
    key_table: KeyTable | None = None
    state: saving.State | None = None

    @property
    def made_by(self) -> Recipe | None:
        """The recipe of the quantization, whenever it was made; None in full precision."""
        return self.state.recipe if self.state else self.recipe

    @property
    def quant(self) -> QuantConfig | None:
        """How layers are quantized; None in full precision."""
        return self.made_by.quant if self.made_by else None

    @property
    def label(self) -> str:
        """W4A8 qncd+ and so on."""
        return self.made_by.label if self.made_by else "FP32"


def open_folder(
    args: argparse.Namespace, task: Task, folder: Path, settings: Mapping[str, Any], batch_size: int, min_free_bytes: int
) -> Run:
    """Claim the output folder of a run, after a look at all files that the run is going to read.

    Args:
        settings: what decides what an image looks like, beside the quantization.
        min_free_bytes: room that the run needs on the disk.

    Raises:
        ValueError, FileNotFoundError: a file does not fit the model or what is asked for; the calibration or the correction
            does not fit the sampler; as `open_run` does.
    """
    recipe, sampler = task.recipe, task.sampler
    if recipe is not None:
        with cli.naming_flags(interval="sample_reverse" if args.sample_reverse else "reverse_interval"):
            check_files(recipe, sampler, task.base_hash, Files.of(args, folder, task.key_table), task.conditions)
    if args.onnx is not None:
        from qncd.engines.onnx.model import check_origin

        check_origin(args.onnx, task.base_hash, task.quant, sampler.network.shape_of(sampler.shape))
    decisive = {**settings, **run_settings(task.made_by, args, batch_size)}
    return open_run(folder, decisive, environment(args, sampler.network.device, batch_size), min_free_bytes)


class SamplingJob:
    """The images of one run on their way to its folder.

    Several processes share the batches of images; the first one writes everything else.
    """

    def __init__(self, run: Run, plan: ImagePlan, batch_size: int, processes: Processes | None = None) -> None:
        self.run, self.plan, self.batch_size, self.processes = run, plan, batch_size, processes or OneProcess()
        self.figures: dict[str, Any] = {}
        stopping.say_how_to_go_on(GO_ON)

    def sample_and_finish(self, args: argparse.Namespace, task: Task, grid: bool = True) -> None:
        """The whole run: the full-precision images where they are compared with, the quantized ones, sheets and figures.

        Without images in the plan it ends with the quantized network.

        Raises:
            SystemExit: with status 1 at the end, where images hold NaN; the line has named them.
        """
        with self.run:
            self._sample_and_finish(args, task, grid)

    def _sample_and_finish(self, args: argparse.Namespace, task: Task, grid: bool) -> None:
        sampler, recipe = task.sampler, task.recipe
        if args.compare_fp and self.plan.count:
            self.sample_images(sampler, "fp", None, "FP32")
        corrector = None
        if recipe:
            files = Files.of(args, self.run.folder, task.key_table)
            corrector, seconds = quantized(recipe, sampler, task.base_hash, files, task.conditions, self.processes)
            self.figures["calibration_seconds"] = seconds
        if not self.plan.count:
            if self.processes.is_first:
                self.run.finish(**self.figures)
            return
        if args.backend != TORCH:
            start = time.perf_counter()
            sampler = sampler_on_engine(args, task, self.run.folder / "onnx")
            self.figures["engine_seconds"] = time.perf_counter() - start
        self.sample_images(sampler, "images", corrector, task.label, bool(task.made_by and task.made_by.by_batch))
        if not self.processes.is_first:
            return
        if args.sequence:
            assert isinstance(sampler, Diffusion)
            self.write_sequence(sampler, corrector)
        self.finish(task.label, args.compare_fp, args.savez, grid)

    def sample_images(
        self, sampler: Sampler, subfolder: str, corrector: Corrector | None, label: str, whole_batches: bool = False
    ) -> None:
        """Sample what is missing of the plan's images into a subfolder, batch by batch.

        A batch that does not fit into the memory is halved. Images with NaN are named and not written.

        Args:
            whole_batches: an image depends on the others of its batch, so a batch is made whole or not at all.
        """
        plan, folder = self.plan, self.run.folder / subfolder
        folder.mkdir(exist_ok=True)
        done = self.processes.first(lambda: self.run.existing_indices(subfolder))
        batches = self._batches(done, whole_batches)
        total = sum(map(len, batches))
        if total < plan.count:
            log.info("%s: %d of %d images are there already", folder, plan.count - total, plan.count)
        start = time.perf_counter()
        mine, made, error = batches[self.processes.rank :: self.processes.world], 0, None
        with progress_bar(f"sampling {label}", "image", is_quiet()) as bar:
            try:
                while mine:
                    indices = mine.pop(0)
                    try:
                        images = self._images(self._sample(sampler, indices, corrector))
                    except Exception as problem:
                        mine[:0] = self._halved(indices, problem, whole_batches)
                        continue
                    with stopping.undisturbed():
                        for index, image in zip(indices, images, strict=True):
                            if image is None:
                                log.warning("image %d (seed %d) holds NaN and is not written", index, plan.seed_of(index))
                            else:
                                save_png(image, plan.path(folder, index))
                    made += len(indices)
                    bar(min(total, made * self.processes.world), total)
            except (ValueError, OSError) as problem:
                if self.processes.world == 1:
                    raise
                error = str(problem)
        self.processes.agree(error)
        seconds = time.perf_counter() - start
        if total:
            self.figures[f"{subfolder}_seconds"] = seconds
            self.figures[f"{subfolder}_per_second"] = total / seconds

    def _batches(self, done: set[int], whole_batches: bool) -> list[list[int]]:
        """The indices that are to be sampled, in the batches in which they are."""
        size = self.batch_size
        if whole_batches:
            parts = [list(range(start, min(start + size, self.plan.count))) for start in range(0, self.plan.count, size)]
            return [part for part in parts if not done.issuperset(part)]
        missing = [i for i in range(self.plan.count) if i not in done]
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def _halved(self, indices: list[int], problem: Exception, whole_batches: bool) -> list[list[int]]:
        """Two halves of a batch that did not fit into the memory. Raises what it met where that is another problem."""
        if not cli.is_out_of_memory(problem):
            raise problem
        problem.__traceback__ = None  # whose frames hold the memory
        if whole_batches:
            raise ValueError(
                f"a batch of {self.batch_size} images does not fit into the memory; a smaller one is another run, because the "
                "correction takes its statistics by batch: name another folder and batch size"
            )
        if len(indices) == 1:
            raise ValueError("not even one image fits into the memory: a smaller --lane is another run in another folder")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(indices) // 2
        log.warning("%d images do not fit into the memory at once: %d at a time", len(indices), len(indices) - middle)
        return [indices[:middle], indices[middle:]]

    def _images(self, samples: Tensor) -> list[np.ndarray | None]:
        """The images of samples, None for those that hold NaN."""
        images: list[np.ndarray | None] = [None] * len(samples)
        rows = [i for i, sample in enumerate(samples) if bool(sample.isfinite().all())]
        try:
            if rows:
                for row, image in zip(rows, self.plan.decode(samples[rows]), strict=True):
                    images[row] = image
        except NotFiniteError:  # of the decoder's making: which rows?
            for row in rows:
                with contextlib.suppress(NotFiniteError):
                    images[row] = self.plan.decode(samples[row : row + 1])[0]
        return images

    def _sample(self, sampler: Sampler, indices: Sequence[int], corrector: Corrector | None, **watching: Any) -> Tensor:
        conditions = self.plan.conditions(indices) if self.plan.conditions else None
        return sampler.sample([self.plan.seed_of(i) for i in indices], corrector, conditions=conditions, **watching)

    def write_sequence(self, diffusion: Diffusion, corrector: Corrector | None) -> None:
        """sequence.png: the first images on their way from noise; those that hold NaN are black from there on."""
        total = len(diffusion.steps)
        kept = {round(i * (total - 1) / max(1, SEQUENCE_STEPS - 1)) for i in range(SEQUENCE_STEPS)}
        rows: list[np.ndarray] = []

        def keep(state: Any) -> None:
            if state.step.index in kept:
                images = self._images(state.x_prev)
                there = next((image for image in images if image is not None), np.zeros((*state.x_prev.shape[2:], 3), np.uint8))
                rows.append(np.stack([np.zeros_like(there) if image is None else image for image in images]))

        self._sample(diffusion, range(min(SEQUENCE_IMAGES, self.plan.count)), corrector, callback=keep)
        images = np.stack(rows, 1)  # (images, steps, H, W, C)
        sheet = contact_sheet([images.reshape(-1, *images.shape[2:])], ["x_t on its way"], len(rows))
        save_image(sheet, self.run.folder / "sequence.png")

    def finish(self, label: str, compared: bool, savez: bool = False, grid: bool = True) -> None:
        """Write the contact sheet, samples.npz and the figures; `compared`: images of the FP32 model lie in fp/.

        Images that hold NaN, in either of the two, are left out.
        """
        there = self.run.existing_indices("images")
        if compared:
            there &= self.run.existing_indices("fp")
        indices = [i for i in range(self.plan.count) if i in there]
        absent = [i for i in range(self.plan.count) if i not in there]
        if indices:
            self._compare_and_show(indices, label, compared, grid)
            if savez:
                one_by_one = (self._read("images", [i])[0] for i in indices)
                save_npz(one_by_one, self.run.folder / "samples.npz", len(indices))
        self.run.finish(**self.figures, **({"images_with_nan": absent} if absent else {}))
        log.info("%d images in %s", len(indices), self.run.folder / "images")
        if absent:
            named = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
            log.error("%d of %d images hold NaN and are not there: %s", len(absent), self.plan.count, named)
            sys.exit(1)

    def _compare_and_show(self, indices: Sequence[int], label: str, compared: bool, grid: bool) -> None:
        shown = indices[:SHEET_IMAGES]
        blocks, labels = [self._read("images", shown)], [label]
        if compared:
            blocks.insert(0, self._read("fp", shown))
            labels.insert(0, "FP32")
            mse = np.empty(0)
            with progress_bar("comparing with full precision", "image", is_quiet()) as bar:
                for part in _parts(indices):
                    mse = np.append(mse, paired_mse(self._read("fp", part), self._read("images", part)))
                    bar(len(mse), len(indices))
            quality = PairedQuality.of(mse)
            self.figures |= {
                "psnr_to_fp_db": quality.psnr, "psnr_of_mean_to_fp_db": quality.psnr_of_mean,
                "psnr_p5_to_fp_db": quality.psnr_p5, "under_20_db_percent": quality.poor, "mse_to_fp": float(mse.mean()),
            }  # fmt: skip
            log.info("PSNR to full precision: %s (%d images, peak 255)", quality, len(mse))
        if grid:
            save_image(contact_sheet(blocks, labels, self.plan.columns), self.run.folder / "contact_sheet.png")

    def _read(self, subfolder: str, indices: Sequence[int]) -> np.ndarray:
        arrays = [np.asarray(Image.open(self.plan.path(self.run.folder / subfolder, i))) for i in indices]
        return np.stack([a if a.ndim == 3 else a[..., None] for a in arrays])


def _parts(indices: Sequence[int], size: int = 256) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
