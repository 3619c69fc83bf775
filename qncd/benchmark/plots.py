"""The pictures of a quality benchmark: what each mode costs at each width, and where along the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qncd.benchmark.plan import FULL, title_of
from qncd.io.files import whole_file

FIGURES = {
    "psnr": "PSNR to full precision, dB (more is better)",
    "fid_difference": "FID − FID of full precision (near 0 is better; every panel has its own scale)",
}
LEGEND_COLUMNS = 4
BANDED_MODES = 4  # with more of them the bands cover one another


def draw_errors(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Noise-prediction error by step: a panel for each width, a line for each mode, a band over seeds if the modes are few."""
    rows = [row for row in rows if "noise_error_per_step" in row]
    widths, modes = _widths(rows), _modes(rows)
    if not rows:
        return
    legend_lines = -(-len(modes) // LEGEND_COLUMNS)
    figure = _figure(max(4.2 * len(widths), 7), 3.6 + 0.25 * legend_lines)
    panels = figure.subplots(1, len(widths), squeeze=False, sharey=True)[0]
    for panel, width in zip(panels, widths, strict=True):
        for row in (row for row in rows if row["width"] == width):
            values, (color, dashes) = row["noise_error_per_step"], _style(modes.index(row["mode"]))
            steps = range(1, len(values["mean"]) + 1)
            panel.plot(steps, values["mean"], label=title_of(row["mode"]), color=color, linestyle=dashes, linewidth=1.5)
            if len(modes) <= BANDED_MODES:
                panel.fill_between(steps, values["min"], values["max"], color=color, alpha=0.15, linewidth=0)
        panel.set(title=width, xlabel="step (1: the noisiest)", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("noise-prediction error (relative)")
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    names = [title_of(mode) for mode in modes]
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize="small")
    _save(figure, path)


def draw_bars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PSNR and excess FID: a panel for each width, a bar for each mode, its extremes over seeds as a whisker."""
    rows = [row for row in rows if row["mode"] != FULL and row["seeds"]]
    widths, modes = _widths(rows), _modes(rows)
    if not rows:
        return
    figure = _figure(2.2 + 2.9 * len(widths), 2 * (0.9 + 0.27 * len(modes)))
    for part, (key, title) in zip(figure.subfigures(len(FIGURES)), FIGURES.items(), strict=True):
        part.suptitle(title, fontsize="medium")
        panels = part.subplots(1, len(widths), squeeze=False, sharey=True)[0]
        for panel, width in zip(panels, widths, strict=True):
            for row in (row for row in rows if row["width"] == width and row[key]):
                place = modes.index(row["mode"])
                _bar(panel, place, row[key], _style(place)[0], ".1f" if key == "psnr" else "+.3f")
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(width, fontsize="medium")
            panel.grid(axis="x", alpha=0.3)
            panel.use_sticky_edges = False  # bars that all point to the left leave room for their numbers, too
            panel.margins(x=0.3)
        if key == "psnr":
            right = max(panel.get_xlim()[1] for panel in panels)
            for panel in panels:
                panel.set_xlim(0, right)
        panels[0].set_yticks(range(len(modes)), [title_of(mode) for mode in modes])
        panels[0].set_ylim(len(modes) - 0.5, -0.5)
    _save(figure, path)


def _bar(panel: Any, place: int, values: dict[str, float], color: Any, style: str) -> None:
    """One bar with its whisker and, to the right of both, its number."""
    mean, low, high = values["mean"], values["min"], values["max"]
    panel.barh(place, mean, color=color, height=0.7)
    if high > low:
        panel.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="black", capsize=2, linewidth=1)
    panel.annotate(
        format(mean, style), (max(high, 0), place), (3, 0), textcoords="offset points", va="center", fontsize="x-small"
    )


def _widths(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["width"] for row in rows))


def _modes(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["mode"] for row in rows))


def _style(place: int) -> tuple[Any, str]:
    """Colour and line style of the mode at a place of the table: 20 colours, then the same ones dashed."""
    from matplotlib import colormaps

    return colormaps["tab20"](place % 10 * 2 + place // 10 % 2), "-" if place < 10 else "--"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Write the picture whole or not at all."""
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="png")
