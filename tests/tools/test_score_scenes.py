"""tools/score_scenes.py: draws held-out captions, and scores a folder as txt2img.py leaves it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from qncd.io.images import save_png
from qncd.io.scenes import is_held_out, parse_caption, render_scene

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "score_scenes.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_draw_render_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--write_captions", tmp_path / "captions.txt", "-n", 40)
    captions = (tmp_path / "captions.txt").read_text().splitlines()
    assert len(set(captions)) == 40 and all(is_held_out(parse_caption(caption)) for caption in captions)

    (tmp_path / "images").mkdir()
    with (tmp_path / "prompts.jsonl").open("w") as stream:
        for i, caption in enumerate(captions):
            # The last ten pictures show the scene before: the classifier must see that.
            shown = caption if i < 30 else captions[i - 1]
            save_png(render_scene(parse_caption(shown), np.random.default_rng(i)), tmp_path / "images" / f"{i}.png")
            stream.write(json.dumps({"file": f"images/{i}.png", "prompt": caption}) + "\n")
    run(monkeypatch, tmp_path, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["count"] == 40 and scores["all_correct"] == pytest.approx(0.75, abs=0.03)
    assert "all_correct   75.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either a folder"),
        (["nowhere"], "prompts.jsonl: no such file"),
        (["--write_captions", "x.txt", "-n", "5000"], "-n 5000: allowed are 1 to 872"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *arguments)
    assert error.value.code == 2 and reason in capsys.readouterr().err


def test_missing_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"file": "images/0.png", "prompt": "a small red circle"}) + "\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert "1 of 1 pictures are missing" in capsys.readouterr().err
