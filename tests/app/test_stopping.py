"""Signals end a command at once, with one line and the signal's status, and leave nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a command does, in small: it writes a file, and says when it is in the middle of that.
WRITES = """
import argparse, sys, time
from pathlib import Path
from qncd.app import stopping
from qncd.app.parser import run_main
from qncd.io import files, locks

def main(args):
    folder = Path(sys.argv[1])
    lock = locks.FolderLock(folder)
    with files.whole_file(folder / "a.txt") as part:
        part.write_text("half")
        if sys.argv[2] == "undisturbed":
            with stopping.undisturbed():
                print("now", flush=True)
                time.sleep(0.5)
                (folder / "batch").write_text("written to its end")
        else:
            print("now", flush=True)
        time.sleep(60)

run_main(main, argparse.Namespace(debug=False))
"""


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """A process to which signals do what they do by default, whatever this one has inherited (a CI may run in the background)."""

    def by_default() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=by_default,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_discards_what_is_being_written(tmp_path: Path, number: signal.Signals) -> None:
    with start(sys.executable, "-c", WRITES, str(tmp_path), "disturbed") as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        assert "run.lock" in names(tmp_path) and len(names(tmp_path)) == 2
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == f"stopped by {number.name}: nothing is left half-done; the same command line starts again\n"
    assert names(tmp_path) == []


def test_a_batch_is_written_to_its_end(tmp_path: Path) -> None:
    with start(sys.executable, "-c", WRITES, str(tmp_path), "undisturbed") as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert names(tmp_path) == ["batch"]


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    command = ("bash", "-c", 'trap "" HUP; exec "$@"', "bash", sys.executable, "-c", WRITES)
    with start(*command, str(tmp_path), "disturbed") as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("delay", [0.7, 1.2])
def test_signals_during_the_imports(tmp_path: Path, delay: float) -> None:
    script = ROOT / "scripts" / "sample_diffusion_ddim.py"
    command = (sys.executable, str(script), "--config", "configs/fashion_mnist.yml", "-l", str(tmp_path / "run"))
    with start(*command) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if line] == [
        "stopped by SIGINT: nothing is left half-done; the same command line starts again"
    ]
    assert not (tmp_path / "run").exists()


def test_a_worker_says_nothing(tmp_path: Path) -> None:
    with start(sys.executable, "-c", WRITES, str(tmp_path), "disturbed", QNCD_WORKER="1") as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")
