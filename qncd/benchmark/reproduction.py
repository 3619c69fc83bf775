"""One published evaluation from start to table: what it needs, what it will cost, its runs, its rows."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qncd.benchmark.plan import FULL, integer_bits
from qncd.benchmark.protocols import PROTOCOLS, Protocol
from qncd.io.files import read_json, write_json, write_text
from qncd.io.runs import Run
from qncd.metrics.report.conventions import CONVENTIONS
from qncd.modes import MODES
from qncd.recipe import CalibrationConfig, Recipe
from qncd.workers import GO_ON, dying_with_this

log = logging.getLogger("qncd")
PNG_SHARE = 0.6  # of an image's bytes that its PNG takes, about
CALIBRATION_RUNS = 3  # of the sampler: the set, and as much again for ranges and corrections, about
SIMULATED = 1.6  # times a network call in full precision, about: fake quantization
REHEARSED = {"steps": 4, "images": 2, "cali_n": 4, "cali_st": 2}  # as many as every part needs to be exercised
FIGURES = {
    "fid": ("FID", ".2f"), "sfid": ("sFID", ".2f"), "inception_score_adm": ("IS", ".1f"), "inception_score_mean": ("IS", ".1f"),
    "clip_score": ("CLIP", ".2f"), "psnr": ("PSNR to FP, dB", ".2f"), "psnr_p5": ("5th percentile", ".2f"),
    "lpips": ("LPIPS to FP", ".4f"),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One row of the table: full precision, or a mode at a width."""

    width: str
    mode: str = FULL

    @property
    def name(self) -> str:
        return FULL if self.mode == FULL else f"{self.width}_{self.mode}"


@dataclass(frozen=True)
class Reproduction:
    """What is run.

    Attributes:
        name: in PROTOCOLS.
        out: folder of the runs and the table.
        weights: arguments of `qncd sample` that name the model's weights.
        reference: real images or statistics; None in a rehearsal without them.
        prompts: file of captions, where the protocol takes some.
        images: of each row.
        entries: full precision first.
        checkpoints: quantized checkpoints of others, by width.
        common: arguments that every sampling run gets: device, devices, seed.
        calibration: arguments of every quantized run.
        rehearsal: random weights, few steps and images.
    """

    name: str
    out: Path
    weights: tuple[str, ...]
    reference: Path | None
    prompts: Path | None
    images: int
    entries: tuple[Entry, ...]
    checkpoints: dict[str, Path] = field(default_factory=dict)
    common: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    rehearsal: bool = False

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.name]

    @property
    def steps(self) -> int:
        """Network calls of one image, without those of a correction."""
        return REHEARSED["steps"] if self.rehearsal else self.protocol.steps

    @property
    def calibrated(self) -> int:
        """Images of the calibration set."""
        return REHEARSED["cali_n"] if self.rehearsal else CalibrationConfig().samples

    def sampling(self, entry: Entry) -> list[str]:
        """The command line that samples a row."""
        protocol = self.protocol
        words = ["sample", *self.weights, *self._flags(), protocol.count_flag, str(self.images), "-l", str(self.out / entry.name)]
        if self.prompts is not None:
            words += ["--from_file", str(self.prompts), "--n_samples", "1"]
        words += self.common
        if entry.mode != FULL:
            weights, acts = map(str, integer_bits(entry.width))
            words += ["--ptq", "--quant_mode", entry.mode, "--weight_bit", weights, "--quant_act", "--act_bit", acts]
            checkpoint = self.checkpoints.get(entry.width, self.out / f"{entry.name}.safetensors")
            words += ["--cali_ckpt", str(checkpoint), *self.calibration]
            if _recipe_of(entry).correction:
                words += ["--sample_reverse", str(2 if self.rehearsal else protocol.interval)]
        return words

    def _flags(self) -> list[str]:
        """The protocol's own, a rehearsal's with few steps."""
        flags = list(self.protocol.flags)
        if self.rehearsal:
            at = next(flags.index(name) for name in ("--timesteps", "-c", "--ddim_steps") if name in flags)
            flags[at + 1] = str(REHEARSED["steps"])
        return flags

    def evaluation(self, entry: Entry) -> list[str] | None:
        """The command line that judges a row; None where there is nothing to compare it with."""
        if self.reference is None:
            return None if entry.mode == FULL else self._compared(entry, self.scores(entry))
        protocol = self.protocol
        words = ["evaluate", str(self.reference), str(self.out / entry.name / "images"), "--convention", protocol.convention]
        words += ["--metrics", *protocol.metrics, "--json", str(self.scores(entry))]
        return [*words, *(("--prompts", str(self.prompts)) if "clip_score" in protocol.metrics else ())]

    def pairing(self, entry: Entry) -> list[str] | None:
        """The command line that compares a row with full precision, image by image; None where `evaluation` does."""
        if entry.mode == FULL or self.reference is None:
            return None
        return self._compared(entry, self.scores(entry, "_pairs"))

    def _compared(self, entry: Entry, scores: Path) -> list[str]:
        folders = [str(self.out / name / "images") for name in (FULL, entry.name)]
        return ["evaluate", *folders, "--metrics", "psnr", "--json", str(scores)]

    def scores(self, entry: Entry, end: str = "") -> Path:
        return self.out / f"{entry.name}{end}_scores.json"


@dataclass(frozen=True)
class Cost:
    """What a reproduction will take.

    Attributes:
        images: in all.
        calls: of the network, of one input each.
        hours: on this device, sampling and calibration.
        disk: bytes.
        memory: bytes, at least.
    """

    images: int
    calls: float
    hours: float
    disk: int
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.images:,} images, {self.calls:,.0f} network calls, about {self.hours:.3g} hours of them on this device, "
            f"{self.disk / 1e9:.3g} GB of disk, {self.memory / 1e9:.3g} GB of memory or more"
        )


def _recipe_of(entry: Entry) -> Recipe:
    """As published: with the noise estimation at runtime where the mode would track instead."""
    return Recipe.of(entry.mode, entry.width, **({"correction": True} if MODES[entry.mode].runtime else {}))


def cost_of(plan: Reproduction, seconds: float, parameters: int, iterations: int = 2000, inputs: int = 32) -> Cost:
    """The cost, from the seconds of one network call for one input.

    Args:
        parameters: of all networks of the model.
        iterations, inputs: of reconstruction, a block: over all blocks that is so many passes forward and back.
    """
    protocol, quantized = plan.protocol, [entry for entry in plan.entries if entry.mode != FULL]
    each = plan.steps * (2 if protocol.guided else 1)
    calls = float(plan.images * each)
    time_calls = calls
    for entry in quantized:
        if plan.scores(entry).is_file():
            continue
        recipe = _recipe_of(entry)
        own = plan.images * each * (1 + (1 / protocol.interval if recipe.correction else 0))
        own += CALIBRATION_RUNS * plan.calibrated * each
        reconstructing = 0.0
        if recipe.reconstruction and "--no-recon" not in plan.calibration:
            reconstructing = 3.0 * iterations * inputs  # forward, and twice as much back
        calls += own + reconstructing
        time_calls += own * SIMULATED + reconstructing
    images = plan.images * len(plan.entries)
    disk = (
        int(images * PNG_SHARE * 3 * protocol.size**2) + len(quantized) * parameters + (4 * parameters if plan.rehearsal else 0)
    )
    return Cost(images, calls, time_calls * seconds / 3600, disk, int(2.5 * 4 * parameters))


def check_room(cost: Cost, out: Path, device: str) -> None:
    """Raise ValueError where the disk or the memory of the device is less than what was announced."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(place).free) < cost.disk:
        raise ValueError(f"--out {out}: {free / 1e9:.3g} GB free on its disk, {cost.disk / 1e9:.3g} GB are needed")
    if (there := memory_of(device)) is not None and there < cost.memory:
        raise ValueError(
            f"--device {device}: {there / 1e9:.3g} GB of memory free, {cost.memory / 1e9:.3g} GB are needed at least"
        )


def memory_of(device: str) -> int | None:
    """Bytes of memory that are free, None where the system does not say."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def run(plan: Reproduction, record: Run) -> None:
    """Sample and judge every row that is not judged yet, one process a step, and write the table after each.

    Raises:
        ValueError: a step failed; it has told why.
    """
    for entry in plan.entries:
        if plan.scores(entry).is_file() or (entry.mode == FULL and plan.reference is None and _sampled(plan, entry)):
            continue
        steps = [("sampling", plan.sampling(entry)), ("judging", plan.evaluation(entry)), ("comparing", plan.pairing(entry))]
        taken: dict[str, Any] = {}
        for title, words in steps:
            if words is not None:
                log.info("%s %s: qncd %s", title, entry.name, " ".join(words))
                taken[title] = _step(words)
        write_json(plan.out / f"{entry.name}_cost.json", taken)
        write_table(plan)
    record.finish(rows=len(plan.entries))


def _sampled(plan: Reproduction, entry: Entry) -> bool:
    """Whether a row's images are all there."""
    try:
        return bool(read_json(plan.out / entry.name / "run.json")["finished"])
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _step(words: Sequence[str]) -> dict[str, float]:
    """Seconds and peak memory of one command. Raises ValueError with its name where it fails; it has told why."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qncd", *words], stdin=subprocess.DEVNULL, preexec_fn=dying_with_this())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"qncd {words[0]} ended with status {process.returncode} (above); {GO_ON}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": float(peak)}


def rows_of(plan: Reproduction) -> list[dict[str, Any]]:
    """The rows that are judged, then the published ones of the same widths."""
    rows = []
    for entry in plan.entries:
        figures: dict[str, Any] = {}
        for path in (plan.scores(entry, "_pairs"), plan.scores(entry)):
            if path.is_file():
                figures |= {key: value for key, value in read_json(path).items() if key in FIGURES and value is not None}
        if figures:
            rows.append({"method": entry.mode, "width": entry.width, "figures": figures, "source": "here", "differs": ""})
    widths = {entry.width for entry in plan.entries}
    return rows + [dataclasses.asdict(row) for row in plan.protocol.published if row.width in widths]


def table_lines(plan: Reproduction) -> list[str]:
    """The table in Markdown, with the protocol above and what differs in others' below."""
    rows, protocol = rows_of(plan), plan.protocol
    keys = [key for key in FIGURES if any(key in row["figures"] for row in rows)]
    notes = {(row["source"], row["differs"]): f"[{i}]" for i, row in enumerate(rows, 1) if row["source"] != "here"}
    numbers = {note: f"[{i}]" for i, note in enumerate(notes, 1)}
    lines = [f"# {protocol.title}", ""]
    if plan.rehearsal:
        lines += ["**A rehearsal: random weights, few steps and images. None of the figures from here means anything.**", ""]
    convention = CONVENTIONS[protocol.convention].description if plan.reference else "no reference: paired figures only"
    lines += [f"{plan.images} images a row (published: {protocol.images}), seeds as in run.json; {convention}.", ""]
    lines += [f"| width | method | {' | '.join(FIGURES[key][0] for key in keys)} | source |", "|---" * (len(keys) + 3) + "|"]
    for row in rows:
        shown = [_shown(row["figures"].get(key), FIGURES[key][1]) for key in keys]
        source = numbers.get((row["source"], row["differs"]), "here")
        lines.append(f"| {row['width']} | {row['method']} | {' | '.join(shown)} | {source} |")
    told = [f"- {number} {source}" + (f"; {differs}" if differs else "") for (source, differs), number in numbers.items()]
    return [*lines, "", *told] if told else lines


def _shown(value: float | str | None, style: str) -> str:
    return "–" if value is None else value if isinstance(value, str) else format(value, style)


def write_table(plan: Reproduction) -> None:
    """OUT/table.md and OUT/table.json."""
    costs = {entry.name: path for entry in plan.entries if (path := plan.out / f"{entry.name}_cost.json").is_file()}
    content = {"rows": rows_of(plan), "costs": {name: json.loads(path.read_text()) for name, path in costs.items()}}
    write_json(plan.out / "table.json", content)
    write_text(plan.out / "table.md", "\n".join(table_lines(plan)) + "\n")
