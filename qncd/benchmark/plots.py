"""The pictures of a quality benchmark: what each mode costs at each width, where along the trajectory, and what it saves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qncd.benchmark.plan import FULL, title_of
from qncd.io.files import whole_file

FIGURES = {
    "psnr": "PSNR to full precision, dB (more is better)",
    "fid_difference": "FID − FID of full precision (near 0 is better; every panel has its own scale)",
}
MARKERS = "osD^vP*X"  # of widths
LEGEND_COLUMNS = 4
BANDED_MODES = 4  # with more of them the bands cover one another


def errors_figure(rows: Sequence[dict[str, Any]]) -> Any | None:
    """Noise-prediction error by step: a panel for each width, a line for each mode, a band over seeds if the modes are few.

    A matplotlib figure; None where there is nothing to draw.
    """
    rows = [row for row in rows if "noise_error_per_step" in row]
    widths, modes = _widths(rows), _modes(rows)
    if not rows:
        return None
    legend_lines = -(-len(modes) // LEGEND_COLUMNS)
    figure = new_figure(max(4.2 * len(widths), 7), 3.6 + 0.25 * legend_lines)
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
    return figure


def bars_figure(rows: Sequence[dict[str, Any]]) -> Any | None:
    """PSNR and excess FID: a panel for each width, a bar for each mode, its extremes over seeds as a whisker.

    A matplotlib figure; None where there is nothing to draw.
    """
    rows = [row for row in rows if row["mode"] != FULL and row["seeds"]]
    widths, modes = _widths(rows), _modes(rows)
    if not rows:
        return None
    figure = new_figure(2.2 + 2.9 * len(widths), 2 * (0.9 + 0.27 * len(modes)))
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
    return figure


def pareto_figure(rows: Sequence[dict[str, Any]]) -> Any | None:
    """PSNR against the file's size, and against images per second on each engine that was measured.

    A point for each mode (its colour) and width (its shape), means over the seeds with their extremes as whiskers; a line
    through those that no other point beats in both. A dotted line shows full precision. A matplotlib figure; None where no row
    has a size or a speed.
    """
    full = next((row for row in rows if row["mode"] == FULL), {})
    rows = [row for row in rows if row["mode"] != FULL and row["psnr"]]
    engines = list(dict.fromkeys(name for row in rows for name in row.get("images_per_second", {})))
    panels: list[tuple[str, bool, Callable[[dict[str, Any]], dict[str, float] | None]]] = []
    if any(row.get("megabytes") for row in rows):
        panels.append(("size of the checkpoint, MB", False, lambda row: row.get("megabytes")))
    panels += [(f"images/s on {name}", True, functools.partial(_speed_on, name)) for name in engines]
    if not panels:
        return None
    modes, widths = _modes(rows), _widths(rows)
    figure = new_figure(max(5.2 * len(panels), 7), 4.2 + 0.25 * -(-(len(modes) + len(widths)) // LEGEND_COLUMNS))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, (title, more_is_better, value_of) in zip(axes, panels, strict=True):
        points = [(row, value) for row in rows if (value := value_of(row))]
        for row, value in points:
            _point(panel, value, row, _style(modes.index(row["mode"]))[0], MARKERS[widths.index(row["width"]) % len(MARKERS)])
        front = _front([(value["mean"], row["psnr"]["mean"]) for row, value in points], more_is_better)
        panel.plot(*zip(*front, strict=True), color="gray", linewidth=1, zorder=1)
        if reference := value_of(full):
            panel.axvline(reference["mean"], color="gray", linestyle=":", linewidth=1)
        panel.set(xlabel=title)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(FIGURES["psnr"])
    handles = {title_of(mode): _style(place)[0] for place, mode in enumerate(modes)}
    for name, color in handles.items():
        axes[0].plot([], [], "s", color=color, label=name)
    for place, width in enumerate(widths):
        axes[0].plot([], [], MARKERS[place % len(MARKERS)], color="gray", label=width)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize="small")
    return figure


def _speed_on(name: str, row: dict[str, Any]) -> dict[str, float] | None:
    return row.get("images_per_second", {}).get(name)


def _point(panel: Any, value: dict[str, float], row: dict[str, Any], color: Any, marker: str) -> None:
    """A row at a value and its PSNR."""
    psnr = row["psnr"]
    reach = [[[of["mean"] - of["min"]], [of["max"] - of["mean"]]] for of in (value, psnr)]
    panel.errorbar(value["mean"], psnr["mean"], xerr=reach[0], yerr=reach[1], fmt=marker, color=color, elinewidth=1, capsize=2)


def _front(points: Sequence[tuple[float, float]], more_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other one beats in both, from the worst in the second to the best in it."""
    sign = -1 if more_is_better else 1
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (sign * p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


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


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write the picture, whole or not at all: an SVG where the path ends in .svg, else a PNG."""
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="svg" if path.suffix.lower() == ".svg" else "png")
