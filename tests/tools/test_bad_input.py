"""tools/bad_input.py: a part of its table over all kinds of commands and files, and what it sees of a command that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bad_input  # noqa: E402
from bad_inputs.case import Case  # noqa: E402
from bad_inputs.table import all_cases  # noqa: E402

SHARE = 12  # one case in so many


def test_the_table() -> None:
    cases = all_cases()
    assert len(cases) >= 400 and len({case.name for case in cases}) == len(cases)
    assert all(case.says for case in cases)
    commands = {case.words[0] if case.words[0] != "qncd" else " ".join(case.words[:2]) for case in cases}
    words = ("sample", "quantize", "export", "convert", "evaluate", "benchmark", "prompts")
    assert {f"qncd {word}" for word in words} <= commands
    scripts = {path.relative_to(ROOT).as_posix() for path in (*(ROOT / "scripts").glob("*.py"), ROOT / "evaluator.py")}
    scripts |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("train_*.py")}
    assert scripts <= commands


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_a_part_of_the_table_and_commands_that_are_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    wrong = [
        Case("answers", ("qncd", "--version"), ("version",)),
        Case("says something else", ("qncd", "sampel"), ("sample:",)),
    ]
    found = {case.name: faults for case, faults in bad_input.run([*wrong, *all_cases()[::SHARE]], 2)}
    assert "exit status 0, not 2; 0 lines on stderr, not 1" in found.pop("answers")[0]
    assert "does not say 'sample:'" in found.pop("says something else")[0]
    assert len(found) >= 55
    assert not {name: faults for name, faults in found.items() if faults}
    capfd.readouterr()


def test_no_case_of_such_a_name() -> None:
    command = [sys.executable, str(ROOT / "tools" / "bad_input.py"), "--only", "no", "such", "name"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bad_input.py: error: --only no such name: no case has such a name\n"
