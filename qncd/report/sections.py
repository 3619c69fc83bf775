"""The sections of the report, in their order. An author adds a class, its template and a line in SECTIONS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from qncd.benchmark.plots import bars_figure, errors_figure, pareto_figure
from qncd.benchmark.table import heads, seeds, shown_columns
from qncd.inspection.drawing import layer_figure, noise_figure, smoothing_figure
from qncd.inspection.layers import layers_figure, map_figure, steps_figure
from qncd.ptq.layer_record import NetworkRecord, mean_of
from qncd.report import figures
from qncd.report.folders import BenchmarkRun, InspectedModel, SampledRun
from qncd.report.sheets import Sheets, make_sheets
from qncd.report.tables import Cell, Table, flat, number, percent, text


@dataclass(frozen=True)
class Report:
    """What a report is about."""

    runs: Sequence[SampledRun] = ()
    benchmarks: Sequence[BenchmarkRun] = ()
    models: Sequence[InspectedModel] = ()

    @property
    def labels(self) -> list[str]:
        """What the report calls them."""
        return [*(one.label for one in self.layered), *(one.label for one in self.benchmarks)]

    @property
    def layered(self) -> list[SampledRun | InspectedModel]:
        """Those that may say what each layer got."""
        return [*self.runs, *self.models]

    @cached_property
    def sheets(self) -> Sheets:
        """The images of the runs, and those that benchmarks kept."""
        pictured = [run.pictured() for run in self.runs]
        return make_sheets([*pictured, *(one for benchmark in self.benchmarks for one in benchmark.pictured())])


class Section(Protocol):
    """One section of the page.

    Attributes:
        key: of its link, and of its template: templates/KEY.html.
        title: its heading.
    """

    key: str
    title: str

    def content(self, report: Report) -> dict[str, Any] | None:
        """What the template shows; None where there is nothing to show, which leaves the section out."""


class Overview:
    """The runs side by side: quality with intervals, time, and what was quantized."""

    key, title = "overview", "Runs side by side"

    def content(self, report: Report) -> dict[str, Any] | None:
        if not report.runs:
            return None
        columns = (
            "run", "quantization", "images", "PSNR to full precision, dB (95 %)", "of the mean error", "5th percentile",
            "images under 20 dB, %", "LPIPS", "weight bits in the mean", "calibration, s", "images/s, full precision",
            "images/s, quantized", "engine", "finished",
        )  # fmt: skip
        table = Table("Each run against full precision with the same seeds", columns, [self._row(run) for run in report.runs])
        missing = dict.fromkeys(run.pairs.lpips_missing for run in report.runs if run.pairs.paired and run.pairs.lpips_missing)
        notes = [f"No LPIPS: {reason} (flags of qncd evaluate)" for reason in missing]
        notes += [
            f"{run.label}: no full-precision images to compare with: sample it with --compare_fp"
            for run in report.runs
            if run.pairs.names and not run.pairs.paired and run.settings.get("quantization")
        ]
        notes += [
            f"{run.label}: {same} of {len(run.pairs.paired)} images equal full precision and are left out of PSNR"
            for run in report.runs
            if (same := int((run.pairs.mse == 0).sum()))
        ]
        plot = figures.svg(figures.psnr_figure, report.runs, "psnr", "PSNR of every image by run, with means and intervals")
        return {"table": table, "notes": notes, "drawing": plot}

    @staticmethod
    def _row(run: SampledRun) -> list[Cell]:
        pairs, quality = run.pairs, run.pairs.quality
        found: dict[str, Any] = run.record.get("figures", {})
        cells = [number(None)] * 4
        if quality is not None:
            others = (quality.psnr_of_mean, ".2f"), (quality.psnr_p5, ".2f"), (quality.poor, ".1f")
            cells = [number(quality.psnr, ".2f", "", pairs.interval), *(number(value, style) for value, style in others)]
        lpips = None if pairs.lpips is None else float(pairs.lpips.mean())
        return [
            text(run.label), text(run.how), number(len(pairs.names)),
            *cells, number(lpips, ".4f"),
            number(mean_weight_bits(run.layers) if run.layers else None, ".2f"), number(found.get("calibration_seconds"), ".0f"),
            number(found.get("fp_per_second"), ".2f"), number(found.get("images_per_second"), ".2f"),
            text(run.settings.get("backend", "torch")), text(run.record.get("finished") or "not finished"),
        ]  # fmt: skip


def mean_weight_bits(record: NetworkRecord) -> float | None:
    """Over all weights of quantized layers, with the scales of groups and the branches beside them; 32 in floating point."""
    weights = sum(layer.weights for layer in record.layers)
    return sum(layer.stored for layer in record.layers) / weights if weights else None


class Samples:
    """Sample sheets that flip between full precision and quantized with the same seed."""

    key, title = "samples", "Samples, same seeds"

    def content(self, report: Report) -> dict[str, Any] | None:
        return {"sheets": report.sheets} if report.sheets.sheets else None


class WorstAndMedian:
    """The images that changed most, and those in the middle."""

    key, title = "extremes", "Worst and median images"

    def content(self, report: Report) -> dict[str, Any] | None:
        return {"sheets": report.sheets} if report.sheets.extremes else None


class Steps:
    """Where along the trajectory the error comes from."""

    key, title = "steps", "Error by time step"

    def content(self, report: Report) -> dict[str, Any] | None:
        records = [(run.title, run.layers) for run in report.layered if run.layers]
        plot = figures.svg(steps_figure, records, "steps", "Error of the prediction by time step")
        return {"drawing": plot, "inputs": max(record.inputs for _, record in records)} if plot else None


class Layers:
    """What each layer got, and which layers the error comes from."""

    key, title = "layers", "What each layer got"

    def content(self, report: Report) -> dict[str, Any] | None:
        parts = []
        for place, run in enumerate(report.layered):
            if run.layers is None:
                continue
            record = run.layers
            parts.append({
                "run": run, "table": self._table(run.label, record), "measured": bool(record.times), "record": record,
                "depth": figures.svg(layers_figure, record, f"depth{place}", f"Error by layer of {run.label}"
                ),
                "map": figures.svg(map_figure, record, f"map{place}", f"Error by layer and time step of {run.label}"
                ),
            })  # fmt: skip
        missing = [run.label for run in report.runs if run.layers is None and run.settings.get("quantization")]
        return {"parts": parts, "missing": missing} if parts or missing else None

    @staticmethod
    def _table(label: str, record: NetworkRecord) -> Table:
        columns = (
            "layer", "place", "kind", "weights", "weight bits", "input bits", "input from", "to", "ranges", "own error",
            "own, weights alone", "gathered error", "worst time step",
        )  # fmt: skip
        rows = []
        for place, layer in enumerate(record.layers, 1):
            known = [(error, t) for error, t in zip(layer.own or (), record.times, strict=False) if error is not None]
            rows.append([
                text(layer.name), number(place), text(layer.kind), number(layer.weights or None, ","),
                number(layer.weight_bits) if layer.weight_bits or not layer.weights else Cell("float", 32.0),
                number(layer.act_bits) if layer.act_bits else Cell("float", 32.0),
                number(layer.low, ".3g"), number(layer.high, ".3g"), number(layer.ranges),
                percent(mean_of(layer.own)), percent(layer.own_weights), percent(mean_of(layer.gathered)),
                number(max(known)[1] if known else None),
            ])  # fmt: skip
        return Table(f"Layers of {label}", columns, rows)


class Inspected:
    """What `qncd inspect` measured of a model: smoothing, noise step by step, the rounding of a layer."""

    key, title = "inspected", "Smoothing, noise and rounding"

    def content(self, report: Report) -> dict[str, Any] | None:
        parts = []
        for place, model in enumerate(report.models):
            found, of = model.found, f"of {model.title}"
            part = {
                "smoothing": figures.svg(smoothing_figure, found.smoothed, f"smoothing{place}", f"Smoothed ranges {of}"),
                "noise": figures.svg(noise_figure, found.noise, f"noise{place}", f"Noise of the prediction by step {of}"),
                "layer": figures.svg(layer_figure, found.layer, f"layer{place}", f"Rounding of a layer {of}"),
            }
            if any(part.values()):
                parts.append({"model": model, **part})
        return {"parts": parts} if parts else None


class Benchmarks:
    """The tables and figures of quality benchmarks, and what quality costs in size and speed."""

    key, title = "benchmarks", "Quality benchmarks"

    def content(self, report: Report) -> dict[str, Any] | None:
        parts = []
        for place, benchmark in enumerate(report.benchmarks):
            rows, name = benchmark.rows, benchmark.label
            pictured = any(record.get("samples") for record in benchmark.content["cells"])
            parts.append({
                "benchmark": benchmark, "table": self._table(name, rows), "samples": pictured,
                "bars": figures.svg(bars_figure, rows, f"bars{place}", f"PSNR and FID by mode and width: {name}"),
                "errors": figures.svg(errors_figure, rows, f"errors{place}", f"Error by step: {name}"),
                "pareto": figures.svg(pareto_figure, rows, f"pareto{place}", f"Quality against size and speed: {name}"
                ),
            })  # fmt: skip
        return {"parts": parts} if parts else None

    @staticmethod
    def _table(label: str, rows: Sequence[dict[str, Any]]) -> Table:
        columns = shown_columns(rows)
        body = []
        for row in rows:
            cells = [text(head) for head in heads(row)]
            for column in columns:
                value = column.of(row)
                cells.append(Cell(column.show(row), value["mean"] if value else ""))
            body.append([*cells, Cell(seeds(row), row["seeds"])])
        titles = ("width", "mode", *(column.title for column in columns), "seeds")
        return Table(f"Quality by width and mode: {label}", titles, body)


class Settings:
    """All settings side by side; those that differ are marked."""

    key, title = "settings", "Settings"

    def content(self, report: Report) -> dict[str, Any] | None:
        columns: dict[str, dict[str, str]] = {}
        for run in report.runs:
            columns[run.label] = flat(run.settings) | flat(self._around(run.record))
        for benchmark in report.benchmarks:
            content = benchmark.content
            around = {
                "command": content["command"],
                "versions": content.get("versions"),
                "git_commits": content.get("git_commits"),
            }
            columns[benchmark.label] = flat(content["settings"]) | flat(around)
        for model in report.models:
            columns[model.label] = flat(dict(model.found.settings))
        if not columns:
            return None
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        rows = [(key, [column.get(key, "–") for column in columns.values()]) for key in keys]
        return {
            "labels": list(columns), "rows": [(key, values, len(set(values)) > 1) for key, values in rows],
        }  # fmt: skip

    @staticmethod
    def _around(record: dict[str, Any]) -> dict[str, Any]:
        """What of run.json changes no image, of its last session."""
        last = (record.get("resumed") or [record])[-1]
        environment = last.get("environment") or {}
        return {
            "started": last.get("started"), "device": environment.get("device"), "versions": last.get("versions"),
            "git_commit": last.get("git_commit"),
        }  # fmt: skip


SECTIONS: list[Section] = [Overview(), Samples(), WorstAndMedian(), Benchmarks(), Inspected(), Steps(), Layers(), Settings()]
