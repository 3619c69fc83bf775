"""The results of a quality benchmark in words and as a machine-readable file; the pictures are in plots.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qncd.benchmark.cell_engines import measured
from qncd.benchmark.peers import PEERS
from qncd.benchmark.plan import ERROR_IMAGES, FULL, UNBIASED_IMAGES, Cell, Plan
from qncd.benchmark.plots import bars_figure, errors_figure, save_figure
from qncd.benchmark.subjects import Words
from qncd.benchmark.table import FIGURES, table_lines
from qncd.io.files import write_json, write_text
from qncd.io.runs import Run
from qncd.metrics.statistics.paired import lpips_obstacle

log = logging.getLogger("qncd")


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, extremes and standard deviation (N - 1; 0 of one value), None where a value is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    return {"mean": float(np.mean(numbers)), "min": min(numbers), "max": max(numbers), "std": deviation}


def summarize(
    records: dict[Cell, dict[str, Any]], cells: Sequence[Cell], speeds: Mapping[Cell, dict[str, float]] | None = None
) -> list[dict[str, Any]]:
    """One row for full precision and one for each width and mode that has cells, over the seeds whose cells are there.

    Args:
        speeds: images per second of cells by engine.
    """
    full = records.get(Cell(FULL))
    rows = []
    for width, mode in dict.fromkeys((cell.width, cell.mode) for cell in cells):
        found = [records[cell]["figures"] for cell in cells if (cell.width, cell.mode) == (width, mode) and cell in records]
        if not found:
            continue
        row: dict[str, Any] = {"width": width, "mode": mode, "seeds": len(found)}
        row |= {key: spread([f.get(key) for f in found]) for key in FIGURES}
        row["fid_difference"] = spread([f["fid"] - full["figures"]["fid"] for f in found]) if full and mode != FULL else None
        row["images_per_second"] = {
            name: spread([value])
            for cell, by_engine in (speeds or {}).items()
            if (cell.width, cell.mode) == (width, mode)
            for name, value in by_engine.items()
        }
        row["identical_images"] = sum(f.get("identical_images", 0) for f in found)
        if all("noise_error_per_step" in f for f in found):
            steps = np.array([f["noise_error_per_step"] for f in found])  # (seeds, steps)
            row["noise_error_per_step"] = {
                "mean": steps.mean(0).tolist(), "min": steps.min(0).tolist(), "max": steps.max(0).tolist(),
            }  # fmt: skip
        rows.append(row)
    return rows


def caption(
    command: str, plan: Plan, seeds: int, words: Words, rows: Sequence[dict[str, Any]], commits: Sequence[str]
) -> list[str]:
    """How the figures were made, in words."""
    identical = sum(row["identical_images"] for row in rows)
    repeated = "One calibration seed; "
    if seeds > 1:
        repeated = f"Mean (min to max) over {seeds} calibration seeds: the spread of calibration, not of sampling; "
    notes = [
        f"`{command}`",
        repeated + f"every cell makes the same {plan.images} images (seeds {plan.image_seed} to "
        f"{plan.image_seed + plan.images - 1}).",
        f"Sampling: {words.sampling}. Calibration: {plan.calibration.samples} images at {plan.calibration.steps} time steps. "
        f"Correction: every {plan.correction.interval} steps.",
        f"FID and sFID: {words.convention}; not on the scale of Inception's."
        + (f" Biased upwards at fewer than {UNBIASED_IMAGES} images." if plan.images < UNBIASED_IMAGES else ""),
        "Bits: in the mean, of weights over all weights, of activations over all that enter multiplications, counted as often as "
        "they are multiplied; first and last layer and softmax outputs included.",
        "PSNR: mean over images, peak 255, uint8, to full precision with the same seeds"
        + (f"; all figures of it without the {identical} images that equal it." if identical else ".")
        + " The PSNR of the mean error, the 5th percentile and the share under 20 dB show the poor images that this mean hides.",
        "Checkpoint: the tensors of the saved file, in full precision the network's parameters.",
        *(
            [
                "Images/s: the network alone, one call of a lane of images times the steps, without decoder and without calls "
                "that a correction makes; the first calibration seed."
            ]
            if any(row["images_per_second"] for row in rows)
            else []
        ),
        *([f"No LPIPS: {lpips_obstacle()}."] if not any(row["lpips"] for row in rows) and lpips_obstacle() else []),
        *(
            [
                "Noise-prediction error: ‖ε − ε_FP‖² / ‖ε_FP‖² at the quantized model's own x_t, ε after correction, mean over "
                f"the steps, first {min(ERROR_IMAGES, plan.images)} images."
            ]
            if any(row["noise_error"] for row in rows)
            else []
        ),
        "Ranges: linear has min-max ranges and no split; this package's other modes have mse weight ranges, activation ranges "
        "that are min-max at 8 bits and mse below, and split.",
        f"Weights below 8 bits: qdiff, ptqd, tfmq, d2dpm, modiff and qncd use BRECQ, {plan.reconstruction.iterations} iterations "
        f"a block on {plan.reconstruction.batch_size} inputs each; qncd+, svdquant and hadamard use GPTQ at all widths; linear "
        "rounds to nearest, as the others do at 8 bits. Rows with changes say so.",
        "qncd has bias correction, smoothing by the embedding and tracking, or with correction=true runtime correction instead; "
        "tfmq and qncd+ have a range for each time step at every activation, modiff rounds the differences of time steps. qncd+ "
        "has bias correction, a smoothing search at 4-bit activations, mixed precision of activations below 8 bits, and "
        "tracking. svdquant (low-rank branches, a smoothing search) and hadamard (rotations) have bias correction and GPTQ "
        "weights.",
        "Tracking aims at the full-precision trajectory, not at the full-precision prediction at the quantized model's x_t: "
        "the noise-prediction error does not measure it.",
        f"Code: {', '.join(commits) or 'unknown commit'}.",
    ]
    if len(commits) > 1:
        notes.append("The cells come from more than one state of the code.")
    return notes


def peer_notes(records: dict[Cell, dict[str, Any]]) -> list[str]:
    """What the other toolkits did: their versions and settings, and how much of the network they quantized."""
    notes = []
    for mode, peer in PEERS.items():
        found = {cell: record for cell, record in records.items() if cell.mode == mode}
        if not found:
            continue
        versions = sorted({record["peer"]["version"] for record in found.values()})
        counts = {cell: record["figures"]["integer"] for cell, record in found.items()}
        shares = {f"{cell.width} {n['weights']} and {n['inputs']} of {n['layers']}": None for cell, n in counts.items()}
        notes.append(
            f"{peer.title}: {peer.package} {', '.join(versions)}, {peer.settings}. Convolutions and linear layers with integer "
            f"weights and with integer inputs: {'; '.join(shares)}."
        )
    return notes


def write_report(command: str, run: Run, plan: Plan, cells: Sequence[Cell], words: Words) -> None:
    """quality.json, quality.md and the pictures of the cells that are there, and the table on stdout."""
    records = {cell: record for cell in cells if (record := cell.finished(plan)) is not None}
    if not records:
        raise ValueError(f"{plan.out}: no finished cell with these settings")
    rows = summarize(records, cells, {cell: measured(plan, cell) for cell in records})
    commits = sorted({record["git_commit"] for record in records.values() if record["git_commit"]})
    notes = caption(command, plan, 1 + max(cell.seed for cell in cells), words, rows, commits)
    notes[-1:-1] = peer_notes(records)
    if missing := [cell.name for cell in cells if cell not in records]:
        notes.append(f"Not finished: {len(missing)} of {len(cells)} cells.")
    session = run.record
    content = {
        "command": command, "caption": notes, "settings": Cell(FULL).settings(plan), "rows": rows, "missing": missing,
        "cells": list(records.values()), "git_commits": commits, "versions": session["versions"],
    }  # fmt: skip
    write_json(plan.out / "quality.json", content)
    lines = ["# Quality after quantization", "", *table_lines(rows), "", *(f"- {note}" for note in notes)]
    write_text(plan.out / "quality.md", "\n".join(lines) + "\n")
    for figure, end in ((errors_figure(rows), ""), (bars_figure(rows), "_bars")):
        if figure is not None:
            save_figure(figure, plan.out / f"quality{end}.png")
    print("\n".join(lines[2:]))
    log.info("written: %s", ", ".join(str(plan.out / f"quality{end}") for end in (".md", ".json", ".png", "_bars.png")))
