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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written from here on."""
    kept: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def test_bars(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.draw_bars(ROWS, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    psnr, excess = (part.axes for part in drawn[0].subfigs)
    assert [panel.get_title() for panel in psnr] == ["W8A8", "W4A8"]
    assert [label.get_text() for label in psnr[0].get_yticklabels()] == ["linear", title_of("nncf")]
    assert [patch.get_width() for patch in psnr[0].patches] == [25, 28]
    assert [patch.get_width() for patch in psnr[1].patches] == [12]  # no bar for the width that the peer cannot do
    assert [text.get_text() for text in excess[0].texts] == ["-0.500", "+0.250"]
    assert psnr[0].get_xlim() == psnr[1].get_xlim()


def test_errors(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.draw_errors(ROWS, tmp_path / "errors.png")
    panels = drawn[0].axes
    assert [len(panel.get_lines()) for panel in panels] == [2, 1] and all(panel.collections for panel in panels)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["linear", title_of("nncf")]


def test_many_modes_have_styles_of_their_own(tmp_path: Path, drawn: list[Figure]) -> None:
    modes = [f"{mode}{change}" for mode in MODES for change in ("", ",bias_correction=true", ",split=false")]
    plots.draw_errors([row("W8A8", mode, 20, 1) for mode in modes], tmp_path / "errors.png")
    (panel,) = drawn[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in panel.get_lines()}) == len(modes)
    assert not panel.collections  # bands would cover one another


@pytest.mark.parametrize("draw", [plots.draw_bars, plots.draw_errors])
def test_nothing_to_draw(draw: Any, tmp_path: Path) -> None:
    draw(ROWS[:1], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
