"""The report's plots as SVG that stands in the page and follows its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from qncd.benchmark.plots import new_figure
from qncd.report.folders import SampledRun

SCALE, NARROWEST = 1.45, "36rem"  # of a plot on the page: pixels for a point at most, and the width from which it is scrolled
_INK = "#000000"  # what matplotlib draws in black takes the colour of the page's text


def svg(draw: Callable[[Any], Any | None], given: Any, key: str, title: str) -> Markup | None:
    """A figure as SVG: text stays text, the background is the page's, whatever matplotlib is set to otherwise.

    Args:
        draw: makes the matplotlib figure of what is given; None where there is nothing to draw, which gives None.
        key: of this figure on the page, for its names within it.
        title: what it shows, for readers that do not see it.
    """
    from matplotlib.style import context

    style = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": key,
    }
    stream = io.StringIO()
    with context(["default", style]):
        figure = draw(given)
        if figure is None:
            return None
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', text)
    assert box is not None
    widest = f"{SCALE * float(box[1]):.0f}px"
    size = f"max-width: {widest}; min-width: min({NARROWEST}, {widest})"
    head = f'<svg role="img" aria-label="{escape(title)}" style="{size}" {box[0]}>'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{key}-", text)
    text = text.replace("xlink:href", "href").replace(_INK, "currentColor")
    return Markup(text)  # matplotlib's own, which has escaped what stands in it


def psnr_figure(runs: Sequence[SampledRun]) -> Any | None:
    """A row for each run: every image's PSNR as a dot, and the mean with its 95 % interval over images."""
    shown = [run for run in runs if run.pairs.quality is not None]
    if not shown:
        return None
    figure = new_figure(8, 1.1 + 0.55 * len(shown))
    panel = figure.subplots()
    for place, run in enumerate(shown):
        psnr = run.pairs.psnr[np.isfinite(run.pairs.psnr)]
        panel.plot(psnr, np.full(len(psnr), place), "|", color="tab:gray", markersize=12, alpha=0.6)
        mean, bounds = float(psnr.mean()), run.pairs.interval
        if bounds is not None:
            panel.plot([bounds.low, bounds.high], [place, place], color="tab:blue", linewidth=4, solid_capstyle="butt")
        panel.plot(mean, place, "o", color="tab:blue", markersize=8)
        panel.annotate(f"{mean:.2f}", (mean, place), (0, 9), textcoords="offset points", ha="center", fontsize="small")
    panel.set_yticks(range(len(shown)), [f"{run.label}\n{run.how}" for run in shown])
    panel.set_ylim(len(shown) - 0.4, -0.6)
    panel.set_xlabel("PSNR to full precision, dB (more is better)")
    panel.grid(axis="x", alpha=0.3)
    return figure
