"""Flags of a recipe: made from its fields, and read back as one."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qncd.app import spellings
from qncd.app.spellings import SPELLINGS
from qncd.modes import MODES, TRACKING, changes_of, compose
from qncd.options import MAX_SEED, Option, OptionError, RecipeError, check_seed, paths_of, read_yaml, sections_of
from qncd.recipe import QUANTIZATION, Recipe

_UNDECIDED = {"calibration.batch_size": None}  # follows from the size of the model's inputs, which is not known yet


def seed(text: str, high: int = MAX_SEED) -> int:
    """The type of a flag for seeds."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    try:
        check_seed(value, high)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def add_recipe_arguments(
    parser: argparse.ArgumentParser, recipe_type: type[Recipe] = Recipe
) -> dict[str, argparse._ArgumentGroup]:
    """--ptq, --recipe, and the flags of all options, in groups by their titles, which are returned.

    Flags that are not on the command line are None (False where they only switch on): `--help` shows what that comes to.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}

    def group(title: str) -> argparse._ArgumentGroup:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        return groups[title]

    group(QUANTIZATION).add_argument("--ptq", action="store_true", help="quantize the network (without it: full precision)")
    group(QUANTIZATION).add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML with mode, width and options by name; flags override it"
    )
    sections = sections_of(recipe_type)
    switches = {name: part for name, part in sections.items() if part.switch}
    for path, option in paths_of(recipe_type).items():
        name = path.partition(".")[0]
        if part := switches.pop(name, None):
            text = part.help + _modes_with(name)
            group(part.title).add_argument(f"--{part.switch}", action=argparse.BooleanOptionalAction, help=text)
        if option.flag:
            title = option.group or (sections[name].title if name in sections else QUANTIZATION)
            _add_option(group(title), path, option)
    for spelling in SPELLINGS:
        text = spelling.help + (_modes_with(spelling.switch) if spelling.switch else "")
        destination = spellings.attribute(spelling.flag)
        group(spelling.group).add_argument(f"--{spelling.flag}", dest=destination, help=text, **spelling.arguments)
    return groups


def _add_option(group: argparse._ArgumentGroup, path: str, option: Option) -> None:
    names = [f"--{name}" for name in (option.flag,)]
    if option.kind is bool:
        text = option.help + _modes_with(path, option.default)
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        return
    default = f"{option.default:g}" if option.kind is float else str(option.default)
    text = option.help.replace("{default}", default)
    if "default" not in option.help:
        text += f" (default {default})"
    kind: Any = {int: int, float: float}.get(option.kind)
    if path.endswith(".seed"):
        kind = functools.partial(seed, high=int(option.limits.high or MAX_SEED))
    group.add_argument(*names, type=kind, choices=option.choices, help=text)


def _modes_with(path: str, default: bool = False) -> str:
    """In which modes a switch is on, for `--help`."""

    def on(act_bits: int) -> list[str]:
        return [name for name, mode in MODES.items() if _is_on(path, mode.at(act_bits), default)]

    always, below_8, up_to_4 = on(8), on(6), on(4)
    if 2 * len(always) > len(MODES):
        return f" (off in {', '.join(name for name in MODES if name not in always)})" if len(always) < len(MODES) else ""
    parts = [", ".join(always)] if always else []
    if more := [name for name in below_8 if name not in always]:
        parts.append(f"{', '.join(more)} below 8-bit activations")
    if more := [name for name in up_to_4 if name not in below_8]:
        parts.append(f"{', '.join(more)} up to 4-bit activations")
    return f" (on in {'; '.join(parts)})" if parts else ""


def _is_on(path: str, options: Mapping[str, Any], default: bool) -> bool:
    if path == "tracking":
        return options.get("offline") == TRACKING
    return bool(options.get(path.rpartition(".")[2], default))


def recipe_of(args: argparse.Namespace, recipe_type: type[Recipe] = Recipe) -> Recipe | None:
    """The recipe that the flags ask for, and the file of --recipe; None without --ptq.

    Where nothing says a calibration batch size it is None, for `Recipe.with_batch_size`.

    Raises:
        ValueError: naming the flag: flags contradict one another, are out of range, have no effect, or need --ptq.
        FileNotFoundError: there is no file at --recipe.
    """
    if not args.ptq:
        _refuse_all(args, recipe_type)
        return None
    given = _given_options(args, recipe_type)
    for path, value in given.items():
        option = paths_of(recipe_type).get(path)
        if (
            option
            and option.kind is int
            and None not in (option.limits.low, option.limits.high)
            and not option.limits.low <= value <= option.limits.high
        ):
            raise ValueError(f"--{option.flag} {value}: allowed are {option.limits.low} to {option.limits.high}")
    file = _read_file(args.recipe, recipe_type) if args.recipe else {}
    mode = given.pop("mode", None) or file.get("mode", recipe_type.mode)
    given.pop("quant.act_bits", None)
    flags = {**given, **spellings.changes_of_spellings(args), **spellings.act_bits(args, mode, file)}
    if getattr(args, "resume_w", False):  # takes weights as they are
        flags.setdefault("reconstruction", False)
    names = {path: f"--{option.flag}" for path, option in paths_of(recipe_type).items() if option.flag}
    names |= {name: f"--{part.switch}" for name, part in sections_of(recipe_type).items() if part.switch}
    names |= spellings.names(args)
    try:
        recipe: Recipe = compose(recipe_type, mode, {**_UNDECIDED, **_overridden(file, flags), **flags}, flags)
    except RecipeError as error:
        raise ValueError(error.told(names)) from None
    except OptionError as error:
        flag = next((names[path] for path in given if path.rpartition(".")[2] == error.name), None)
        raise ValueError(f"{flag}: {error}" if flag else str(error)) from None
    spellings.check_activation_steps(args, file)
    return recipe


def _given_options(args: argparse.Namespace, recipe_type: type[Recipe]) -> dict[str, Any]:
    """The flags of single options and of sections that are on the command line, by path."""
    flags = {path: option.flag for path, option in paths_of(recipe_type).items()}
    flags |= {name: part.switch for name, part in sections_of(recipe_type).items()}
    found = {path: getattr(args, spellings.attribute(flag)) for path, flag in flags.items() if flag}
    return {path: value for path, value in found.items() if value is not None}


def _read_file(path: Path, recipe_type: type[Recipe]) -> dict[str, Any]:
    content = read_yaml(path)
    try:
        return changes_of(recipe_type, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _overridden(file: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What of the file flags leave standing: not the details of parts that they turn off, nor another correction."""
    off = {path for path, value in flags.items() if value is False}
    if flags.get("tracking"):
        off.add("correction")
    if "tracking" in flags or (flags.get("correction") and file.get("offline") in (None, TRACKING)):
        off |= {"offline", "tracking"}
    return {path: value for path, value in file.items() if not off & {path, path.partition(".")[0]}}


def _refuse_all(args: argparse.Namespace, recipe_type: type[Recipe]) -> None:
    """Raise ValueError for the first flag that is about quantization. The size of the calibration set is let through."""
    sections = sections_of(recipe_type)
    given = _given_options(args, recipe_type)
    spellings.refuse_without_ptq(args)
    flags = {path: option.flag for path, option in paths_of(recipe_type).items()} | {n: p.switch for n, p in sections.items()}
    typed = [("no-" if value is False else "") + str(flags[path]) for path, value in given.items() if "calibration" not in path]
    typed += [s.flag for s in SPELLINGS if spellings.is_given(args, s.flag)] + (["recipe"] if args.recipe else [])
    details = [str(flags[path]) for path in given if path.startswith("reconstruction.")]
    if details or args.recon_act:
        raise ValueError(f"--{details[0] if details else 'recon_act'} needs --recon")
    if typed:
        raise ValueError(f"--{typed[0]} needs --ptq")
