"""`--help` of a command with many flags: the common ones in a line each; `--help-all` lists every one in its group."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qncd.modes import MODES

# What most command lines are made of, by the names under which argparse keeps them. A command shows those that it has.
COMMON = (
    "config", "ckpt", "prompt", "from_file", "classes", "n_samples", "max_images", "timesteps", "custom_steps", "ddim_steps",
    "scale", "seed", "device", "ptq", "quant_mode", "weight_bit", "act_bit", "cali_n", "cali_ckpt", "compare_fp", "backend",
    "logdir", "outdir", "help", "help_all",
)  # fmt: skip


def table_of_modes() -> str:
    """The modes in a line each, and where to read on."""
    width = max(map(len, MODES))
    lines = [f"  {name:{width}}  {mode.summary}" for name, mode in MODES.items()]
    return "\n".join(["modes (--quant_mode), described in docs/methods.md:", *lines])


class PrintAll(argparse.Action):
    """Print every flag, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str, **arguments: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **arguments)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(argparse.ArgumentParser.format_help(parser))
        parser.exit()


def short_help(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> str:
    """The text of --help: description and epilog of the parser, between them the common ones of its flags.

    Args:
        actions: all of its flags.
    """
    found = {action.dest: action for action in actions}
    common = {_invocation(action): _one_line(action) for action in (found[name] for name in COMMON if name in found)}
    width = max(map(len, common))
    required = "".join(f"{_invocation(action, 1)} " for action in actions if action.required)
    usage = f"usage: {parser.prog} [-h] [--help-all] {required}[FLAGS]"
    flags = [f"  {flag:{width}}  {text}" for flag, text in common.items()]
    parts = [usage, (parser.description or "").strip(), "\n".join(["common flags:", *flags]), parser.epilog or ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def first_clause(text: str) -> str:
    """A help text up to its first semicolon."""
    clause = text.partition(";")[0]
    return clause + ")" * (clause.count("(") - clause.count(")"))


def _one_line(action: argparse.Action) -> str:
    return first_clause((action.help or "") % vars(action))


def _invocation(action: argparse.Action, names: int | None = None) -> str:
    """A flag as it is typed: its first `names` names, and what it takes."""
    shown = ", ".join(action.option_strings[:names])
    if action.nargs == 0:
        return shown
    number = "N" if action.type is int else "X" if action.type is float else action.dest.upper()
    taken = action.metavar or ("NAME" if action.choices else number)
    return f"{shown} {taken}"
