"""Flags of a recipe: made from its fields, and read back as one."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qncd.app import spellings
from qncd.app.spellings import SPELLINGS
from qncd.io.files import regular_file
from qncd.modes import MODES, TRACKING, changes_of, compose
from qncd.options import MAX_SEED, Option, OptionError, RecipeError, check_seed, paths_of, read_options, sections_of
from qncd.recipe import QUANTIZATION, Recipe

_UNDECIDED = {"calibration.batch_size": None, "calibration.steps": None}  # follow from the model and the sampler, not known yet


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
    default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
    text = option.help.replace("{default}", default)
    if "default" not in option.help:
        text += f" (default {default})"
    kind: Any = {int: int, float: float}.get(option.kind)
    if path.endswith(".seed"):
        kind = functools.partial(seed, high=int(option.limits.high or MAX_SEED))
    group.add_argument(*names, type=kind, choices=option.choices, help=text)


def _modes_with(path: str, default: bool = False) -> str:
    """In which modes a switch is on, for `--help`."""

    def on(weight_bits: int, act_bits: int) -> list[str]:
        return [name for name, mode in MODES.items() if _is_on(path, mode.at(weight_bits, act_bits), default)]

    always, weights, below_8, up_to_4 = on(8, 8), on(4, 8), on(8, 6), on(8, 4)
    if 2 * len(always) > len(MODES):
        return f" (off in {', '.join(name for name in MODES if name not in always)})" if len(always) < len(MODES) else ""
    parts = [", ".join(always)] if always else []
    if more := [name for name in weights if name not in always]:
        parts.append(f"{', '.join(more)} below 8-bit weights")
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

    Calibration batch size and time steps are None where nothing says them, for `Recipe.decided`.

    Raises:
        ValueError: naming the flag: flags contradict one another, are out of range, have no effect, or need --ptq.
        FileNotFoundError: there is no file at --recipe.
    """
    if not args.ptq:
        _refuse_all(args, recipe_type)
        return None
    given = _given_options(args, recipe_type)
    for path, option in paths_of(recipe_type).items():
        if path in given:
            option.check(f"--{option.flag}", given[path])
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
    except OptionError as error:  # of the file: flags have been looked at
        raise ValueError(f"{args.recipe}: {error}") from None
    spellings.check_activation_steps(args, file)
    return recipe


def _given_options(args: argparse.Namespace, recipe_type: type[Recipe]) -> dict[str, Any]:
    """The flags of single options and of sections that are on the command line, by path."""
    flags = {path: option.flag for path, option in paths_of(recipe_type).items()}
    flags |= {name: part.switch for name, part in sections_of(recipe_type).items()}
    found = {path: getattr(args, spellings.attribute(flag)) for path, flag in flags.items() if flag}
    return {path: value for path, value in found.items() if value is not None}


def _read_file(path: Path, recipe_type: type[Recipe]) -> dict[str, Any]:
    content = read_options(path)
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


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError for flags about files that need --ptq, or contradict one another; OSError for a file that is not there."""
    for name in ("cali_ckpt", "cali_data_path", "resume", "resume_w", "compare_fp"):
        if getattr(args, name) and not args.ptq:
            raise ValueError(f"--{name} needs --ptq")
    if args.resume_w and args.recon:
        raise ValueError("--resume_w takes weights as they are: it excludes --recon")
    if args.resume_w and args.gptq:
        raise ValueError("--resume_w takes weights as they are: it excludes --gptq")
    if args.resume and args.resume_w:
        raise ValueError("--resume and --resume_w exclude one another: all of the checkpoint, or its weights alone")
    for name in ("cali_ckpt", "cali_data_path"):  # read where they are there, else written at the end
        if (path := getattr(args, name)) is not None:
            check_file(f"--{name}", path)
    for name in ("resume", "resume_w"):
        if getattr(args, name) and (args.cali_ckpt is None or not args.cali_ckpt.is_file()):
            raise FileNotFoundError(f"--{name} needs a quantized checkpoint: --cali_ckpt {args.cali_ckpt} is none")
    if args.onnx is not None and not args.onnx.is_dir():
        raise FileNotFoundError(f"--onnx {args.onnx}: no such folder, expected one that `qncd export` wrote")
    for name in ("logdir", "outdir"):
        if (path := getattr(args, name, None)) is not None:
            check_output_folder(f"--{name}", path)


def check_file(flag: str, path: Path, replace: bool = False) -> None:
    """Raise ValueError where what stands at the path is no file, or where nothing does and no file can be written there.

    Args:
        replace: the file is written even where there is one.
    """
    if there := _exists(flag, path):
        try:
            regular_file(path)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None
    if replace or not there:
        _check_place(flag, path, path.absolute().parent)


def check_output_folder(flag: str, path: Path) -> None:
    """Raise ValueError where a folder that is to be written cannot be, or what stands there is no folder."""
    if _exists(flag, path) and not path.is_dir():
        raise ValueError(f"{flag} {path}: is a file, expected a folder")
    _check_place(flag, path, path.absolute())


def _exists(flag: str, path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except NotADirectoryError:  # `_check_place` says which
        return False
    except (OSError, ValueError) as error:  # too long a name, a null byte, a link to itself, a folder that may not be entered
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{flag} {str(path)[:200]!r}: cannot be looked at: {reason}") from None
    return True


def _check_place(flag: str, path: Path, folder: Path) -> None:
    """Raise ValueError where nothing can be written into a folder, or into the nearest one above it that is there."""
    while not _exists(flag, folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: {folder} is no folder")
    try:  # permissions do not tell of a read-only disk, nor of what an administrator may
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {folder} cannot be written: {error.strerror}") from None
