"""Every command in the README and in the configs' headers parses, or is one of the install and test lines."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from qncd.app import console

ROOT = Path(__file__).resolve().parents[1]
COMMAND = rf"(?:python (?:scripts/\w+|tools/\w+|evaluator)\.py|qncd (?:{'|'.join(console.COMMANDS)}) )[^\n`|]*"


def commands() -> list[str]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "configs").iterdir())]:
        text = re.sub(r"\\\n[# ]*", " ", path.read_text())
        for match in re.finditer(COMMAND, text):
            found += [part.strip() for part in match[0].split("&&") if re.match(COMMAND, part.strip())]
    return sorted(set(found))


def test_the_readme_has_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install -c constraints.txt -e '.[test]'" in text and "python -m pytest -q" in text
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)[1:]
    if command.startswith("qncd "):
        console.parse(words)
        return
    script = ROOT / words[0]
    assert script.is_file(), words[0]
    monkeypatch.setattr(sys, "argv", words)
    namespace = runpy.run_path(str(script), run_name="parsed")
    namespace["parse_args"]()
    for word in words[1:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word
