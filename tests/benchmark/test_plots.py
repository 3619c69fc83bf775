"""The pictures of a quality benchmark: what is drawn where, read back from the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from qncd.benchmark import plots
from qncd.benchmark.plan import FULL, title_of
from qncd.modes import MODES


def row(width: str, mode: str, psnr: float, excess: float) -> dict[str, Any]:
    steps = {"mean": [0.1, 0.2], "min": [0.05, 0.1], "max": [0.2, 0.3]}
    values = {"psnr": psnr, "fid_difference": excess}
    spreads = {key: {"mean": v, "min": v - 1, "max": v + 1} for key, v in values.items()}
    return {"width": width, "mode": mode, "seeds": 2, "noise_error_per_step": steps, **spreads}


ROWS = [
    {"width": FULL, "mode": FULL, "seeds": 1, "psnr": None, "fid_difference": None},
    row("W8A8", "linear", 25, -0.5), row("W8A8", "nncf", 28, 0.25), row("W4A8", "linear", 12, 14),
]  # fmt: skip


def test_bars(tmp_path: Path) -> None:
    figure = plots.bars_figure(ROWS)
    assert isinstance(figure, Figure)
    plots.save_figure(figure, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    psnr, excess = (part.axes for part in figure.subfigs)
    assert [panel.get_title() for panel in psnr] == ["W8A8", "W4A8"]
    assert [label.get_text() for label in psnr[0].get_yticklabels()] == ["linear", title_of("nncf")]
    assert [patch.get_width() for patch in psnr[0].patches] == [25, 28]
    assert [patch.get_width() for patch in psnr[1].patches] == [12]  # no bar for the width that the peer cannot do
    assert [text.get_text() for text in excess[0].texts] == ["-0.500", "+0.250"]
    assert psnr[0].get_xlim() == psnr[1].get_xlim()


def test_errors() -> None:
    figure = plots.errors_figure(ROWS)
    assert isinstance(figure, Figure)
    panels = figure.axes
    assert [len(panel.get_lines()) for panel in panels] == [2, 1] and all(panel.collections for panel in panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["linear", title_of("nncf")]


def test_many_modes_have_styles_of_their_own() -> None:
    modes = [f"{mode}{change}" for mode in MODES for change in ("", ",bias_correction=true", ",split=false")]
    figure = plots.errors_figure([row("W8A8", mode, 20, 1) for mode in modes])
    assert isinstance(figure, Figure)
    (panel,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in panel.get_lines()}) == len(modes)
    assert not panel.collections  # bands would cover one another


def test_pareto(tmp_path: Path) -> None:
    """A point for each row at each value that it has, and a front through those that no other one beats."""
    spread = lambda value: {"mean": value, "min": value, "max": value}  # noqa: E731
    rows = [
        {"width": FULL, "mode": FULL, "seeds": 1, "psnr": None, "megabytes": spread(8)},
        {**row("W8A8", "linear", 25, 0), "megabytes": spread(2), "images_per_second": {"openvino": spread(10)}},
        {**row("W4A8", "linear", 12, 0), "megabytes": spread(1), "images_per_second": {"openvino": spread(11)}},
        {**row("W4A8", "qncd+", 11, 0), "megabytes": spread(1.5), "images_per_second": {}},
    ]
    figure = plots.pareto_figure(rows)
    assert isinstance(figure, Figure)
    size, speed = figure.axes
    assert size.get_xlabel() == "size of the checkpoint, MB" and speed.get_xlabel() == "images/s on openvino"
    assert len(size.containers) == 3 and len(speed.containers) == 2
    assert [container.lines[0].get_marker() for container in size.containers] == ["o", "s", "s"]  # a shape for each width
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["linear", "qncd+", "W8A8", "W4A8"]
    fronts = [[line for line in panel.get_lines() if line.get_color() == "gray"] for panel in (size, speed)]
    assert fronts[0][0].get_xydata().tolist() == [[1, 12], [2, 25]]  # type: ignore[union-attr]
    assert fronts[1][0].get_xydata().tolist() == [[11, 12], [10, 25]]  # type: ignore[union-attr]
    assert list(fronts[0][1].get_xdata()) == [8, 8] and len(fronts[1]) == 1  # full precision has a size and no speed
    plots.save_figure(figure, tmp_path / "pareto.svg")
    assert "<svg" in (tmp_path / "pareto.svg").read_text()
    assert plots.pareto_figure(ROWS) is None


@pytest.mark.parametrize("draw", [plots.bars_figure, plots.errors_figure, plots.pareto_figure])
def test_nothing_to_draw(draw: Any) -> None:
    assert draw(ROWS[:1]) is None
