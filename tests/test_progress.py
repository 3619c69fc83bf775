"""Progress: lines where nobody watches a terminal, a bar where somebody does, nothing where it has to be quiet."""

from __future__ import annotations

import sys
import types

import pytest

from qncd import progress
from qncd.progress import progress_bar


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("sampling", "image") as update:
        for done in (0, 1, 2, 3, 4):
            update(done, 4)
            now += 20
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err
    assert said.err.splitlines() == ["sampling: 2 of 4 images, 0:40 left", "sampling: 4 images in 1:40"]


def test_what_the_caller_knows_of_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress_bar("reconstructing", "block") as update:
        update(0, 3, 3725.0)
    assert capsys.readouterr().err == "reconstructing: 0 of 3 blocks, 1:02:05 left\n"


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sampling", "image", quiet=True) as update:
        update(1, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("notebook", [False, True])
def test_bars_where_somebody_watches(notebook: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if notebook:
        shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
        monkeypatch.setitem(sys.modules, "IPython", shell)
    else:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("sampling", "image") as update:
        update(1, 4)
        update(4, 4, 0.0)
    assert "4/4" in capsys.readouterr().err
