"""The kill trial in its short form, and that it would notice what it is there for."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from script_runs import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    return load_script(ROOT / "tools" / "kill.py")


@pytest.mark.slow
def test_the_short_form(kill: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = kill.parse_args(["--kills", "3", "--only", "quantize", "--out", str(tmp_path / "trial")])
    assert kill.main(arguments) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.endswith("3 endings, 0 faults\n")


LINE = "{place}/writer.py {{out}}/a.json"
CARELESS = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
if not path.exists():
    for n in range(40):
        path.open("a").write("[1]" if n == 0 else " ")
        time.sleep(0.01)
"""


def test_it_notices_what_is_written_carelessly(kill: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "writer.py").write_text(CARELESS)
    scenario = kill.Scenario("careless", (LINE.format(place=tmp_path),))
    trial = kill.Trial(scenario, tmp_path / "trial")
    assert trial.run_undisturbed(trial.out / "alone")
    moment = kill.Moment("second opening", "open", "a.json", 1)
    assert trial.end_once(signal.SIGKILL, moment, random.Random(0)) == "second opening, line 1"
    for content in ("[", "[2]"):  # as a writer that is ended in between may leave it
        (trial.out / "ended" / "a.json").write_text(content)
        trial.faults.clear()
        trial.compare()
        assert trial.faults == ["careless: a.json differs after the endings"]


def test_it_notices_an_unworthy_end(kill: ModuleType, tmp_path: Path) -> None:
    trial = kill.Trial(kill.Scenario("s", ("x",)), tmp_path)
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], text=True)
    process.wait()
    trial.check_ending(process, signal.SIGTERM, "Traceback (most recent call last)", "here")
    assert trial.faults == ["s: SIGTERM at here: status 3: Traceback (most recent call last)"]


def test_time_is_left_out(kill: ModuleType) -> None:
    record = {"settings": {"a": 1}, "started": "now", "figures": {"images_seconds": 3.0, "psnr": 2.0}, "resumed": [{}]}
    assert kill.timeless(record) == {"settings": {"a": 1}, "figures": {"psnr": 2.0}}
