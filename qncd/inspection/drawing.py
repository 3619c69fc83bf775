"""Pictures of what was measured, and all pictures of a source as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qncd.benchmark.plots import new_figure, save_figure
from qncd.inspection.layers import layers_figure, map_figure, steps_figure
from qncd.inspection.record import CONTROL, Histogram, Inspected, LayerRounding, NoiseAt, Search, Smoothed
from qncd.quant.affine import SEARCH_RATIOS

SUFFIXES = (".png", ".svg")
BEFORE, AFTER, FACTOR = "tab:gray", "tab:pink", "tab:blue"
PANELS = {  # of the picture of the noise: what of a NoiseAt, its title, and its scale
    "snr": ("signal to noise, dB", "linear"),
    "mean": ("mean of the error", "symlog"),
    "std": ("standard deviation of the error", "log"),
    "correlation": ("correlation with the exact prediction", "linear"),
}


def draw_all(found: Inspected) -> dict[str, Any]:
    """Figures by name, of what is known."""
    figures = {
        "layers": layers_figure(found.record),
        "map": map_figure(found.record),
        "steps": steps_figure([(found.label, found.record)]),
        "smoothing": smoothing_figure(found.smoothed),
        "noise": noise_figure(found.noise),
        "layer": layer_figure(found.layer),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def write_all(figures: Mapping[str, Any], folder: Path) -> None:
    """Each figure as PNG and as SVG into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for suffix in SUFFIXES:
            save_figure(figure, folder / f"{name}{suffix}")


def smoothing_figure(smoothed: Smoothed | None) -> Any | None:
    """Range of each channel in front of the layer whose range shrinks most, beside the factor; and the range in front of all."""
    if smoothed is None:
        return None
    name, ranges = smoothed.most, smoothed.ranges
    largest = smoothed.largest[name]
    order = largest.argsort(descending=True)
    before, after = largest[order].numpy(), smoothed.after(name)[order].numpy()
    figure = new_figure(11, max(4.4, 1.6 + 0.16 * len(ranges)))
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1), height_ratios=(3, 1))
    top, below, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[:, 1])
    how = "divided by S, which goes into the weights" if smoothed.used else "divided by S, which this mode does not do"
    top.bar(range(len(before)), before, color=BEFORE, width=0.85, label="before")
    top.bar(range(len(after)), after, color=AFTER, width=0.85, label=how)
    for value, color in ((before.max(), BEFORE), (after.max(), AFTER)):
        top.axhline(value, color=color, linestyle=":", linewidth=1)
    top.set(title=f"input of {name}", ylabel="largest |activation|", xlim=(-1, len(before)))
    top.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.8), fontsize="small")
    below.step(range(len(before)), smoothed.factors[name].cpu()[order].numpy(), where="mid", color=FACTOR)
    below.set(xlabel="channel, by its range", ylabel="factor S", xlim=(-1, len(before)))
    for place, (wide, narrow) in enumerate(ranges.values()):
        right.plot([wide, narrow], [place, place], color="lightgray", linewidth=3, zorder=1, solid_capstyle="round")
    for side, color in ((0, BEFORE), (1, AFTER)):
        right.scatter([both[side] for both in ranges.values()], range(len(ranges)), color=color, s=22, zorder=2)
    short = [part.replace("_blocks", "").replace(".resnets", "").replace(".conv2", "") for part in ranges]
    right.set_yticks(range(len(ranges)), short, fontsize=7)
    right.set(title="range of the whole tensor", xlabel="largest |activation|", ylim=(len(ranges) - 0.5, -0.5))
    for panel in (top, below, right):
        panel.grid(axis="y", alpha=0.3)
        panel.title.set_fontsize(10)
    return figure


def noise_figure(noise: Mapping[str, Mapping[int, NoiseAt]]) -> Any | None:
    """Four panels over the steps, a line for each of what was measured."""
    if not noise:
        return None
    figure = new_figure(10, 6)
    for panel, (key, (title, scale)) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items(), strict=True):
        smallest = np.inf
        for name, steps in noise.items():
            values = [getattr(at, key) for at in steps.values()]
            panel.plot([index + 1 for index in steps], values, "--" if name == CONTROL else "o-", markersize=3.5, label=name)
            smallest = min([smallest, *(abs(value) for value in values if value)])
        options = {"linthresh": smallest} if scale == "symlog" and np.isfinite(smallest) else {}
        if scale != "symlog" or options:
            panel.set_yscale(scale, **options)
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3)
        if key in ("mean", "correlation"):
            panel.axhline(0, color="black", linewidth=0.8)
    for panel in figure.axes[2:]:
        panel.set_xlabel("step (1: the noisiest)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(noise), fontsize="small")
    return figure


def layer_figure(layer: LayerRounding | None) -> Any | None:
    """Histograms of a layer's weights and of the error of their rounding, and the curves of its range searches."""
    if layer is None:
        return None
    figure = new_figure(10, 6.4)
    figure.suptitle(
        f"{layer.name}, {f'{layer.bits}-bit weights' if layer.bits else 'weights in floating point'}", fontsize="medium"
    )
    panels = figure.subplots(2, 2)
    _weights(panels[0, 0], layer)
    _errors(panels[0, 1], layer)
    for panel, search in zip(panels[1], layer.searches, strict=False):
        _search(panel, search)
    for panel in panels[1, len(layer.searches) :]:
        panel.set_axis_off()
    return figure


def _bars(panel: Any, found: Histogram, **options: Any) -> None:
    panel.stairs(found.counts.numpy(), found.edges.numpy(), fill=True, **options)


def _weights(panel: Any, layer: LayerRounding) -> None:
    _bars(panel, layer.exact, color="tab:gray", alpha=0.6, label="in full precision")
    if layer.codes is not None:
        values, counts = layer.codes.numpy()
        panel.vlines(values, 0.5, counts, color="tab:blue", linewidth=1.2, label="on the grid")
    unit = "" if layer.codes is None else ", in steps of its channel's grid"
    panel.set(yscale="log", ylabel="weights", xlabel=f"weight{unit}")
    panel.legend(fontsize="small")


def _errors(panel: Any, layer: LayerRounding) -> None:
    _bars(panel, layer.errors, color="tab:blue")
    panel.axvline(-0.5, color="gray", linestyle=":")
    panel.axvline(0.5, color="gray", linestyle=":")
    panel.set(title=f"squared error {100 * layer.share:.3g} % of the squared weights", ylabel="weights", yscale="log")
    panel.set_xlabel("error of rounding, in steps (dotted: half a step)")
    panel.title.set_fontsize(9)


def _search(panel: Any, search: Search) -> None:
    """The median of all curves and their middle 80 %, and the ratios that were chosen."""
    errors, chosen = search.errors.numpy(), search.chosen.numpy()
    middle = np.median(errors, 1)
    panel.plot(SEARCH_RATIOS, middle, color="tab:blue", label="error" if errors.shape[1] == 1 else "error, median")
    if errors.shape[1] > 1:
        low, high = np.quantile(errors, (0.1, 0.9), axis=1)
        panel.fill_between(SEARCH_RATIOS, low, high, color="tab:blue", alpha=0.15, linewidth=0, label="80 % of the ranges")
    typical = float(np.median(chosen))
    panel.axvline(typical, color="tab:orange", label=f"chosen: {typical:.2f}" + (" (median)" if len(chosen) > 1 else ""))
    if len(chosen) > 1:
        panel.plot(chosen, np.full(len(chosen), 0.02), "|", color="tab:orange", transform=panel.get_xaxis_transform())
    panel.set(title=search.title, xlabel="clipping factor", ylabel="error / that without clipping", yscale="log")
    panel.title.set_fontsize(9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
