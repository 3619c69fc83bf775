"""Pictures of what each layer got: where the error of a quantized network comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qncd.benchmark.plots import new_figure
from qncd.ptq.layer_record import LayerRecord, NetworkRecord, mean_of

NAMED = 70  # layers up to which each is named beside the map
ORDER = "layer, in the order in which the network runs them"
LABELLED = 3  # of the largest errors in the plot over the layers


def measured(record: NetworkRecord) -> list[LayerRecord]:
    """The layers whose errors are known."""
    return [layer for layer in record.layers if layer.own is not None]


def layers_figure(record: NetworkRecord) -> Any | None:
    """Layer after layer: the error that each adds, and the one that has gathered in its output."""
    layers = measured(record)
    if not layers:
        return None
    figure = new_figure(9, 3.6)
    panel = figure.subplots()
    places = np.arange(1, len(layers) + 1)
    own, gathered = (
        np.array([mean_of(values) or np.nan for values in found])
        for found in ([layer.own for layer in layers], [layer.gathered for layer in layers])
    )
    panel.plot(places, gathered, color="tab:orange", linewidth=1.5, label="gathered in the quantized network")
    panel.vlines(places, np.nanmin(own), own, color="tab:blue", alpha=0.35, linewidth=1)
    panel.plot(places, own, "o", color="tab:blue", markersize=3.5, label="the layer's own, for full-precision inputs")
    for place in _apart(np.argsort(-np.nan_to_num(own)).tolist(), len(layers) // 10):
        right = place > len(layers) / 2
        panel.annotate(
            layers[place].name, (places[place], own[place]), (-3 if right else 3, 5), textcoords="offset points",
            ha="right" if right else "left", fontsize="x-small", rotation=-15 if right else 15,
        )  # fmt: skip
    panel.set(yscale="log", xlabel=ORDER, ylabel="relative squared error")
    panel.margins(x=0.02, y=0.25)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _apart(places: Sequence[int], least: int) -> list[int]:
    """The first LABELLED of the places that are further apart than that: their names do not cover one another."""
    chosen: list[int] = []
    for place in places:
        if len(chosen) < LABELLED and all(abs(place - other) > least for other in chosen):
            chosen.append(place)
    return chosen


def map_figure(record: NetworkRecord) -> Any | None:
    """The error that each layer adds at each time step, as a map."""
    from matplotlib.colors import LogNorm

    layers = measured(record)
    if not layers:
        return None
    values = np.array([[np.nan if v is None or v <= 0 else v for v in layer.own or ()] for layer in layers])
    if not np.isfinite(values).any():
        return None
    figure = new_figure(9, 1.2 + (0.16 * len(layers) if len(layers) <= NAMED else 0.035 * len(layers)))
    panel = figure.subplots()
    low, high = np.nanpercentile(values, [2, 100])
    extent = (-0.5, len(record.times) - 0.5, len(layers) + 0.5, 0.5)
    image = panel.imshow(
        values, aspect="auto", norm=LogNorm(low, max(high, 1.01 * low)), cmap="viridis", interpolation="nearest", extent=extent
    )
    panel.set_xticks(range(len(record.times)), [f"{t:g}" for t in record.times])
    if len(layers) <= NAMED:
        panel.set_yticks(range(1, len(layers) + 1), [layer.name for layer in layers], fontsize=6)
    else:
        panel.set_ylabel(ORDER)
    panel.set_xlabel("time step (the noisiest on the left)")
    figure.colorbar(image, ax=panel, label="relative squared error", pad=0.01)
    return figure


def steps_figure(records: Sequence[tuple[str, NetworkRecord]]) -> Any | None:
    """Error of the whole network's prediction at each time step, a line for each record under its title."""
    shown = [(title, record) for title, record in records if record.times]
    if not shown:
        return None
    figure = new_figure(8, 3.4)
    panel = figure.subplots()
    for title, record in shown:
        errors = [np.nan if v is None else v for v in record.prediction]
        panel.plot(record.times, errors, "o-", markersize=4, label=title)
    panel.set(yscale="log", xlabel="time step (the noisiest on the left)", ylabel="relative squared error")
    panel.invert_xaxis()
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure
