"""tools/make_figures.py: what it draws is what was measured, and every figure is a small file of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_runs import ROOT, load_script, run_in_process

figures = load_script(ROOT / "tools" / "make_figures.py")


def opened(path: Path) -> tuple[str, tuple[int, int], int]:
    """Format, size and number of frames."""
    with Image.open(path) as picture:
        return str(picture.format), picture.size, getattr(picture, "n_frames", 1)


def test_drawings_of_what_is_there(tmp_path: Path) -> None:
    """The ones that run no model, by the command."""
    run_in_process("make_figures.py", "overview", "quality", "--out", tmp_path, folder="tools")
    for name in ("overview", "quality"):
        kind, (width, height), _ = opened(tmp_path / f"{name}.png")
        assert kind == "PNG" and width > 1000 and height > 400


def test_lines_are_the_rows_of_the_table() -> None:
    rows = json.loads((ROOT / "fig" / "fair_ddim.json").read_text(encoding="utf-8"))["rows"]
    lines = figures.psnr_lines(rows)
    assert [round(mean, 2) for mean, _, _ in lines["qncd+"]] == [41.01, 33.54, 32.81, 27.82]  # docs/does-the-method-work.md
    assert all(low <= mean <= high for values in lines.values() for mean, low, high in values)


def test_labels_keep_their_distance_and_their_order() -> None:
    assert figures.spread_apart({"b": 2.0, "a": 1.5, "c": 9.0}, 1.0) == {"a": 1.5, "b": 2.5, "c": 9.0}


@pytest.mark.slow
def test_figures_of_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few images and the quickest mode: the runs are those of the pipeline, and nearest rounding drifts away from them."""
    monkeypatch.setattr(figures, "CALIBRATION", 16)
    nearest = figures.FLIPPED[1]
    runs = []
    monkeypatch.setattr(figures, "sample", lambda *args, original=figures.sample: runs.append(original(*args)) or runs[-1])
    assert opened(figures.noise(tmp_path, (nearest,), 2))[0] == "PNG"
    exact, rough = runs
    assert exact.shape == (figures.STEPS + 1, 2, 32, 32) and np.array_equal(exact[0], rough[0])
    distances = np.square(rough - exact).mean((1, 2, 3))
    assert 0 < distances[1] < distances[4] < distances[-1]
    assert opened(figures.flip(tmp_path, (nearest,), 2))[::2] == ("WEBP", 2)
    assert opened(figures.smoothing(tmp_path, 2))[0] == "PNG"


def test_what_is_committed_is_small() -> None:
    pictures = [file for file in (ROOT / "fig").iterdir() if file.suffix in (".png", ".webp")]
    assert {f"{name}.png" for name in figures.FIGURES if name != "flip"} | {"flip.webp"} <= {file.name for file in pictures}
    assert sum(file.stat().st_size for file in pictures) < 2_000_000
