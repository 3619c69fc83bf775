"""The folders that a report is made of: runs of the sampling commands, quality benchmarks, and what `qncd inspect` wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qncd.benchmark.plan import FULL, SAMPLES, Cell
from qncd.benchmark.table import heads, table_lines
from qncd.inspection.record import INSPECTION_FILE, Inspected
from qncd.io.files import read_json
from qncd.io.runs import RUN_FILE, Run
from qncd.metrics.statistics.paired import worst_and_median
from qncd.ptq.layer_record import LAYERS_FILE, NetworkRecord
from qncd.recipe import QuantConfig
from qncd.report.pairs import Pairs
from qncd.widths import label_of

QUALITY_FILE = "quality.json"
IMAGES, FULL_IMAGES = "images", "fp"  # in the folder of a sampling run
KINDS = (
    "allowed are folders of the sampling commands (images/, run.json), of `qncd benchmark quality` (cells/, quality.json) and of "
    f"`qncd inspect --out` ({INSPECTION_FILE})"
)
SHOWN_FIGURES = ("calibration_seconds", "fp_per_second", "images_per_second")  # of run.json
SHEET_IMAGES = 16
CHOSEN = 3  # worst images of a run, and as many around the median


@dataclass(frozen=True)
class Pictured:
    """Quantized images that a report shows.

    Attributes:
        label: what the report calls them.
        how: W4A8 qncd+ and so on.
        pairs: all images that are at hand.
        group: what images share that are flipped through on one sheet.
        group_title: of that sheet; by default the labels.
        first, worst, median: names of those to show.
    """

    label: str
    how: str
    pairs: Pairs
    group: object
    group_title: str
    first: tuple[str, ...]
    worst: tuple[str, ...]
    median: tuple[str, ...]

    @property
    def title(self) -> str:
        """Label and how."""
        return f"{self.label}: {self.how}" if self.how else self.label


@dataclass(frozen=True)
class SampledRun:
    """A folder of one of the sampling commands.

    Attributes:
        label: what the report calls it.
        record: run.json.
        layers: what each layer got; None in full precision, and of runs that were made before it was written.
        pairs: the images.
    """

    folder: Path
    label: str
    record: dict[str, Any]
    layers: NetworkRecord | None
    pairs: Pairs

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what an image looks like."""
        return dict(self.record["settings"])

    @property
    def how(self) -> str:
        """W4A8 qncd+ and so on."""
        found = self.settings.get("quantization")
        return f"{label_of(numbers_of(found))} {found['mode']}" if found else "full precision"

    @property
    def title(self) -> str:
        """Label and how."""
        return f"{self.label}: {self.how}"

    def pictured(self) -> Pictured:
        """Its images; runs with the same names and full-precision images on the sheet are one group."""
        first = (self.pairs.paired or self.pairs.names)[:SHEET_IMAGES]
        digest = hashlib.sha256()
        for name in first if self.pairs.paired else ():
            digest.update(name.encode() + self.pairs.exact(name).tobytes())
        group = digest.hexdigest() if self.pairs.paired else self.folder
        chosen = worst_and_median(self.pairs.mse, CHOSEN) if self.pairs.quality else ([], [])
        worst, median = (tuple(self.pairs.paired[place] for place in places) for places in chosen)
        return Pictured(self.label, self.how, self.pairs, group, "", first, worst, median)


@dataclass(frozen=True)
class BenchmarkRun:
    """A folder of `qncd benchmark quality`.

    Attributes:
        label: what the report calls it.
        content: quality.json.
    """

    folder: Path
    label: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Widths and modes with their figures over the seeds."""
        return list(self.content["rows"])

    def pictured(self) -> list[Pictured]:
        """Images of the cells that kept some, a group for each width."""
        found = []
        for record in self.content["cells"]:
            kept = record.get("samples")
            if kept:
                (width, mode), name = heads(record["cell"]), Cell(**record["cell"]).name
                pairs = Pairs.open(self.folder / SAMPLES / name, self.folder / SAMPLES / FULL)
                names = (tuple(name for name in kept[key] if name in pairs.paired) for key in ("first", "worst", "median"))
                found.append(Pictured(f"{width} {mode}", "", pairs, (self.folder, width), f"{self.label}, {width}", *names))
        return found


@dataclass(frozen=True)
class InspectedModel:
    """A folder that `qncd inspect --out` has filled.

    Attributes:
        label: what the report calls it.
        found: what was measured.
    """

    folder: Path
    label: str
    found: Inspected

    @property
    def layers(self) -> NetworkRecord:
        """What each layer got."""
        return self.found.record

    @property
    def how(self) -> str:
        """The model, W4A8 qncd+ and so on."""
        return self.found.label

    @property
    def title(self) -> str:
        """Label and how."""
        return f"{self.label}: {self.how}"


def numbers_of(quantization: Mapping[str, Any]) -> Any:
    """What a run.json says of the numbers that weights and activations became; defaults where an older one says less."""
    return SimpleNamespace(**{**asdict(QuantConfig()), **quantization})


def open_folders(paths: Sequence[Path]) -> tuple[list[SampledRun], list[BenchmarkRun], list[InspectedModel]]:
    """The runs, the benchmarks and what was inspected among some folders, each kind in their order.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is of no kind, or damaged; a folder is named twice.
    """
    opened = [_opened(path, label) for path, label in zip(paths, _labels(paths), strict=True)]
    runs = [one for one in opened if isinstance(one, SampledRun)]
    benchmarks = [one for one in opened if isinstance(one, BenchmarkRun)]
    return runs, benchmarks, [one for one in opened if isinstance(one, InspectedModel)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [path.resolve().parts for path in paths]
    if double := next((str(path) for i, path in enumerate(paths) if whole[i] in whole[:i]), None):
        raise ValueError(f"{double}: named twice")
    size = 1
    while len({parts[-size:] for parts in whole}) < len(whole):
        size += 1
    return ["/".join(parts[-size:]) for parts in whole]


def _opened(path: Path, label: str) -> SampledRun | BenchmarkRun | InspectedModel:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder")
    if (path / INSPECTION_FILE).is_file():
        return InspectedModel(path, label, Inspected.open(path))
    if not (path / RUN_FILE).is_file():
        raise ValueError(f"{path}: neither a run nor a benchmark, it has no {RUN_FILE}: {KINDS}")
    record = Run(path).record
    settings = record["settings"]
    if settings.get("benchmark") == "quality":
        if not (path / QUALITY_FILE).is_file():
            raise ValueError(f"{path}: a benchmark without {QUALITY_FILE}: finish it, or write what is there with its --report")
        content = read_json(path / QUALITY_FILE)
        _check_benchmark(path / QUALITY_FILE, content)
        return BenchmarkRun(path, label, content)
    if "model" not in settings or "sampler" not in settings:
        raise ValueError(f"{path}: neither a run of a sampling command nor a quality benchmark: {KINDS}")
    _check_run(path / RUN_FILE, record)
    layers, pairs = NetworkRecord.open(path / LAYERS_FILE), Pairs.open(path / IMAGES, path / FULL_IMAGES)
    return SampledRun(path, label, record, layers, pairs)


def _check_run(file: Path, record: dict[str, Any]) -> None:
    """Raise ValueError where what the report takes of a run.json is none of what a sampling command writes."""
    quantization, figures = record["settings"].get("quantization"), record.get("figures", {})
    wrong = next((key for key in SHOWN_FIGURES if not isinstance(figures.get(key, 0.0), int | float)), "")
    if quantization and not (isinstance(quantization, dict) and {"mode", "weight_bits", "act_bits"} <= quantization.keys()):
        wrong = "quantization"
    if wrong:
        raise ValueError(f"{file}: damaged (no {wrong} in it): {KINDS}")


def _check_benchmark(file: Path, content: Any) -> None:
    """Raise ValueError where a file is none that the benchmark has written."""
    kinds = {"rows": list, "cells": list, "caption": list, "settings": dict, "command": str, "missing": list}
    wrong = next(
        (key for key, kind in kinds.items() if not isinstance(content, dict) or not isinstance(content.get(key), kind)), ""
    )
    if not wrong:
        try:
            table_lines(content["rows"])
            for record in content["cells"]:
                heads(asdict(Cell(**record["cell"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong = "table"
    if wrong:
        raise ValueError(f"{file}: damaged (no {wrong} in it): make it again with the benchmark's --report")
