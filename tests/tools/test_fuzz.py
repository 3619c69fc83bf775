"""Damaged files of every format: each is read or refused in one line. And the tool finds what it looks for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
from script_runs import load_script

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load_script(TOOL)


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_damaged_files(seconds: int, fuzz: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    status = fuzz.main(["--seconds", str(seconds), "--seed", str(seconds)])
    assert status == 0, capfd.readouterr().out


def test_every_reader_has_files(fuzz: ModuleType) -> None:
    assert {folder.name for folder in fuzz.CORPUS.iterdir()} == set(fuzz.READERS)


def test_an_input_depends_on_its_seed_alone(fuzz: ModuleType) -> None:
    made = [fuzz.Input("torch", seed).make() for seed in (3, 4, 3)]
    assert made[0] == made[2] != made[1]


def slow(path: Path) -> None:
    time.sleep(60)


def dead(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def greedy(path: Path) -> None:
    bytearray(8 << 30)


def long_winded(path: Path) -> None:
    raise ValueError(f"{path}: one\ntwo")


def nameless(path: Path) -> None:
    raise ValueError("wrong")


def foreign(path: Path) -> None:
    raise RuntimeError("inner")


def good(path: Path) -> None:
    raise ValueError(f"{path}: wrong")


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (slow, "takes more than 0.5 s"),
        (dead, "ends the process, status -9"),
        (greedy, "MemoryError in test_fuzz.py:"),
        (long_winded, "a message of several lines: "),
        (nameless, "a message that does not name the file: 'wrong'"),
        (foreign, "RuntimeError in test_fuzz.py:"),
        (good, ""),
    ],
)
def test_faults_are_found(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, read: object, fault: str) -> None:
    monkeypatch.setitem(fuzz.READERS, "prompts", read)
    results = fuzz.run_forked([fuzz.Input("prompts", 0)], 0.5 if read is slow else 20, None)
    assert len(results) == 1
    assert results[0][1].startswith(fault) and bool(results[0][1]) == bool(fault)
