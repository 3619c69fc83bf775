"""`--help` of the sampling commands is short, and `--help-all` whole."""

from __future__ import annotations

import argparse
import importlib
import re

import pytest

from qncd.app.short_help import COMMON, first_clause
from qncd.modes import MODES

COMMANDS = ("sample_ddim", "sample_ldm", "txt2img")


def make(command: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(f"qncd.app.commands.{command}").make_parser()
    return parser


def flags_in(text: str) -> set[str]:
    """The flags that begin a line of their own."""
    return {flag for line in re.findall(r"^  (-\S.*)$", text, re.M) for flag in re.findall(r"--[\w-]+", line.split("   ")[0])}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_common_flags_in_a_line_each(command: str) -> None:
    parser = make(command)
    text = parser.format_help()
    common = [action for action in parser._actions if action.dest in COMMON]
    section = text.partition("common flags:\n")[2].partition("\n\n")[0].splitlines()
    assert len(section) == len(common) <= 22 and len(text.splitlines()) < 60
    assert {line.split()[0].rstrip(",") for line in section} == {action.option_strings[0] for action in common}
    assert "%(" not in text and "--recon_lr" not in text
    for name in MODES:
        assert len(re.findall(rf"^  {re.escape(name)} +\S", text, re.M)) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_shows_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make(command)
    with pytest.raises(SystemExit) as stop:  # the required flags are not asked for
        parser.parse_args(["--help-all"])
    text = capsys.readouterr().out
    assert not stop.value.code and "reconstruction (BRECQ):" in text
    assert flags_in(text) == {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def test_every_common_flag_is_one_of_some_command() -> None:
    assert set(COMMON) <= {action.dest for command in COMMANDS for action in make(command)._actions}


def test_a_help_text_is_cut_at_its_first_semicolon() -> None:
    assert first_clause("steps (default 100; of a pipeline, its own)") == "steps (default 100)"
    assert first_clause("weights: a file") == "weights: a file"
