"""Run the cells of a quality benchmark in one process or several, after computing what they share."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from qncd.app import parser as cli
from qncd.benchmark.peers import quantize_with_peer
from qncd.benchmark.plan import ERROR_IMAGES, FULL, PART, SAMPLES, Cell, Plan, integer_bits
from qncd.benchmark.subjects import Subject
from qncd.io.files import whole_file, write_json
from qncd.io.images import image_name, save_png
from qncd.io.runs import Run
from qncd.metrics.statistics.moments import PairedQuality, paired_mse
from qncd.metrics.statistics.paired import Lpips, lpips_obstacle, worst_and_median
from qncd.models.files.safetensors_files import write_safetensors
from qncd.models.network import Network
from qncd.ptq.checkpoint import checkpoint_bytes
from qncd.ptq.context import copied
from qncd.ptq.data import CalibrationSet, load_calibration, save_calibration
from qncd.ptq.evaluation import NoiseErrorRecorder, sample_images
from qncd.ptq.pipeline import Job, Outcome, quantize_network, sample_calibration
from qncd.ptq.pipeline_runs import PipelineRuns, Sampler, runs_of
from qncd.ptq.runs import DiffusionRuns
from qncd.recipe import CalibrationConfig, Recipe
from qncd.sampling.corrector import Corrector
from qncd.sampling.correctors.registry import corrector_of, kind_of
from qncd.sampling.correctors.runtime import NoiseTable
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.pipeline import PipelineSampler
from qncd.workers import GO_ON

log = logging.getLogger("qncd")
FIRST, EXTREMES = 8, 2  # images that are kept of a cell: the first ones, and the worst and as many in the middle
WHOLE = "whole.json"  # in the folder of a reconstruction: it is finished


def compute(run: Run, plan: Plan, cells: Sequence[Cell], workers: int | None = None) -> None:
    """Run the unfinished cells in `workers` processes (default: one a core), after computing what they share."""
    jobs = workers or (1 if plan.device.startswith("cuda") else cores())
    threads = max(1, cores() // jobs)
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
        sample_calibration_sets(plan, {cell.seed for cell in missing if cell.mode != FULL}, jobs, threads)
        folders = {cell.reconstruction_folder(plan): cell for cell in missing}
        open_ = [cell for folder, cell in folders.items() if folder and not (folder / WHOLE).is_file()]
        run_tasks("reconstructions", "network", reconstruct_weights, plan, open_, jobs, threads)
        run_tasks("cells", "cell", run_cell, plan, missing, jobs, threads)
    run.finish(cells=len(cells), cells_computed=len(missing), seconds=time.perf_counter() - start)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    title: str, unit: str, function: Callable[[Plan, Any], None], plan: Plan, items: Sequence[Any], jobs: int, threads: int
) -> None:
    """function(plan, item) for all items, in this process or in `jobs` others, with a progress line on stderr."""
    if not items:
        return
    with cli.progress_bar(title, unit) as bar:
        bar(0, len(items))
        if jobs == 1:
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
                raise OSError(f"a worker process died (short of memory?): {GO_ON}") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def start_worker(threads: int) -> None:
    """Share the cores, end at Ctrl-C without a traceback, and do not outlive the benchmark."""
    import multiprocessing
    import signal
    import threading

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
    stop = min(start + PART, plan.images)
    subject = plan.subject()
    conditions = subject.conditions
    images = sample_images(
        subject.sampler,
        range(plan.image_seed + start, plan.image_seed + stop),
        plan.batch_size,
        conditions=(lambda rows: conditions([start + row for row in rows])) if conditions else None,
        decode=subject.decode,
    )
    with whole_file(plan.part_path(start)) as part, part.open("wb") as stream:
        np.savez(stream, images=images)


def full_precision_images(plan: Plan) -> np.ndarray:
    """All of them, uint8 (N, H, W, C)."""
    parts = []
    for start in range(0, plan.images, PART):
        with np.load(plan.part_path(start)) as file:
            parts.append(file["images"])
    return np.concatenate(parts)


def sample_calibration_sets(plan: Plan, seeds: set[int], jobs: int, threads: int) -> None:
    """Those of the repetitions that are not in the cache yet."""
    absent = [seed for seed in sorted(seeds) if not plan.calibration_paths(seed)[0].is_file()]
    run_tasks("calibration sets", "set", sample_calibration_set, plan, absent, jobs, threads)


def sample_calibration_set(plan: Plan, seed: int) -> None:
    """Calibration set and noise table of one repetition, into the cache; the set is written last and marks both as complete."""
    recipe = plan.calibration_recipe(seed)
    data, record = sample_calibration(
        calibration_runs(plan.subject(), recipe.calibration), recipe, plan.subject_settings["model"]
    )
    data_path, table_path = plan.calibration_paths(seed)
    if record is not None:
        tensors, head = record.to_tensors()
        write_safetensors(tensors, table_path, {"noise_table": head})
    save_calibration(data, data_path)


def calibration_runs(subject: Subject, calibration: CalibrationConfig) -> DiffusionRuns | PipelineRuns:
    """Calibration runs of a subject, with a condition for each trajectory where it is conditional."""
    given = subject.calibration_conditions
    return runs_of(subject.sampler, calibration, given(calibration.samples, calibration.seed) if given else None)


def load_calibration_set(plan: Plan, seed: int, network: Network) -> tuple[CalibrationSet, NoiseTable | None]:
    """What `sample_calibration_set` has written for a network."""
    data_path, table_path = plan.calibration_paths(seed)
    table = None
    if plan.controlled:
        with safe_open(table_path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            table = NoiseTable.from_tensors(tensors, file.metadata()["noise_table"])
    return load_calibration(data_path, plan.calibration.samples, plan.calibration.steps, network.condition), table


def reconstruct_weights(plan: Plan, cell: Cell) -> None:
    """Reconstruct the blocks that cells with the same weights share, into the cache; a file WHOLE marks them as complete."""
    folder, recipe = cell.reconstruction_folder(plan), cell.recipe_in(plan)
    assert folder is not None and recipe is not None
    recipe = recipe.without("offline").without("correction")  # of the cell that takes the blocks
    outcome = _quantize_(plan, cell, recipe, calibration_runs(plan.subject(), recipe.calibration))
    write_json(folder / WHOLE, {"seconds": outcome.seconds})


def _quantize_(plan: Plan, cell: Cell, recipe: Recipe, runs: DiffusionRuns | PipelineRuns) -> Outcome:
    """Quantize the network of `runs` in place, with the blocks reconstructed so far, and fit its correction."""
    data, table = load_calibration_set(plan, cell.seed, runs.network)
    if isinstance(runs, PipelineRuns):
        runs.calibration_set()  # shows the time steps and the first calls, which stages ask for
    record = table if recipe.controlled else None
    return quantize_network(runs, recipe, data, record, Job(folder=cell.reconstruction_folder(plan)))


def run_cell(plan: Plan, cell: Cell) -> None:
    """Quantize, sample, measure, and write the cell's file."""
    full, figures, start = full_precision_images(plan), dict[str, Any](), time.perf_counter()
    images, subject, kept = full, plan.subject(), None
    if cell.mode == FULL:
        figures["megabytes"] = sum(value.nbytes for value in subject.sampler.network.module.parameters()) / 1e6
    else:
        runs = calibration_runs(subject, dataclasses.replace(plan.calibration, seed=cell.seed))
        errors = None
        if isinstance(subject.sampler, Diffusion):
            errors = NoiseErrorRecorder(subject.sampler.with_network(copied(runs.network)), ERROR_IMAGES)
        sampler, corrector, figures = quantize_cell_(plan, cell, subject.sampler, runs)
        try:
            seeds = range(plan.image_seed, plan.image_seed + plan.images)
            images = sample_images(sampler, seeds, plan.batch_size, corrector, errors, subject.conditions, subject.decode)
        except FloatingPointError as error:
            raise FloatingPointError(f"{cell.name}: {error}") from None
        mse = paired_mse(full, images)
        kept = keep_samples(plan, cell, full, images, mse) if cell.seed == 0 else None
        changed = mse[mse > 0]
        figures |= {
            **(dataclasses.asdict(PairedQuality.of(changed)) if len(changed) else {}),
            "lpips": None if lpips_obstacle() else lpips_of(full, images, plan.device),
            "identical_images": len(mse) - len(changed),
            "mse": float(mse.mean()),
        }
        if errors is not None:
            figures |= {
                "noise_error": errors.mean_error(),
                "noise_error_per_step": errors.error_per_step(),
                "gain_per_step": errors.gain_per_step(),
                "bias_per_step": errors.bias_per_step(),
            }
    figures |= subject.score(images)
    record = {
        "cell": dataclasses.asdict(cell), "settings": cell.settings(plan), "figures": figures,
        "samples": kept, "seconds": time.perf_counter() - start, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "peer": cell.peer and {"package": cell.peer.package, "version": cell.peer.version}, "git_commit": plan.commit,
    }  # fmt: skip
    write_json(cell.path(plan), record)


def keep_samples(plan: Plan, cell: Cell, full: np.ndarray, images: np.ndarray, mse: np.ndarray) -> dict[str, list[str]]:
    """Write a few images of a cell and those of full precision as files, for reports; their names by what they are."""
    worst, median = worst_and_median(mse, EXTREMES)
    chosen = {"first": list(range(min(FIRST, len(images)))), "worst": worst, "median": median}
    names = {i: image_name(i, plan.image_seed + i) for i in sorted({i for places in chosen.values() for i in places})}
    for folder, of in ((cell.name, images), (FULL, full)):
        for i, name in names.items():
            save_png(of[i], plan.out / SAMPLES / folder / name)
    return {key: [names[i] for i in places] for key, places in chosen.items()}


def lpips_of(full: np.ndarray, images: np.ndarray, device: str, batch_size: int = 64) -> float:
    """Mean LPIPS of images uint8 (N, H, W, C) to those of full precision."""
    lpips, starts = Lpips(device=device), range(0, len(full), batch_size)
    parts = [lpips(*(side[start : start + batch_size] for side in (full, images))) for start in starts]
    return float(np.concatenate(parts).mean())


def quantize_cell_(
    plan: Plan, cell: Cell, sampler: Sampler, runs: DiffusionRuns | PipelineRuns
) -> tuple[Sampler, Corrector | None, dict[str, Any]]:
    """The sampler of `runs` as the cell's mode quantizes it, in place, what corrects it, and the figures of that."""
    recipe = cell.recipe_in(plan)
    if recipe is not None:
        outcome = _quantize_(plan, cell, recipe, runs)
        size = checkpoint_bytes(sampler.network, recipe.quant, outcome.record)
        figures = {"calibration_seconds": outcome.seconds, **dataclasses.asdict(outcome.bits), "megabytes": size / 1e6}
        if isinstance(sampler, PipelineSampler):
            kind = kind_of(recipe)
            sampler = dataclasses.replace(sampler, corrects_by_calls=kind is not None and kind.calls_network)
        return sampler, corrector_of(recipe, outcome.record), figures
    data, _ = load_calibration_set(plan, cell.seed, sampler.network)
    start = time.perf_counter()
    bits, size = integer_bits(cell.width), plan.calibration.batch_size
    network, integer = quantize_with_peer(cell.mode, sampler.network, data, *bits, size)
    figures = {"calibration_seconds": time.perf_counter() - start, "integer": integer}
    return sampler.with_network(network), None, figures
