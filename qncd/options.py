"""Options: fields of a dataclass that say their flag, their help, and which values they take.

A tree of such dataclasses (`qncd.recipe.Recipe`) is checked, written as JSON and turned into command-line flags by what
its fields say. Names of options in a tree are paths: `quant.gptq`, or `reconstruction` for the switch of a section.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qncd.io.yaml_files import read_yaml

MAX_SEED = 2**56 - 2**32  # qncd.rng shifts seeds by 8 bits, torch takes 64; images count up from a seed
_OPTION, _SECTION = "option", "section"
_SHORT = reprlib.Repr()  # of a value in a message, which may be anything that a file holds
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


class OptionError(ValueError):
    """The value of one option is not allowed; `name` is the option's."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class RecipeError(ValueError):
    """Options contradict one another.

    The text names options as `{quant.gptq}`; `str()` shows the last part of each, `told` whatever the user knows them by.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        super().__init__(self.told({}))

    def told(self, names: Mapping[str, str]) -> str:
        """The text with the options under other names, such as those of flags."""
        return re.sub(r"\{([\w.]+)\}", lambda match: names.get(match[1], match[1].rpartition(".")[2]), self.template)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError naming the value and what is allowed."""
    if value not in allowed:
        raise OptionError(name, f"{name} {_SHORT.repr(value)}: allowed are {', '.join(map(str, allowed))}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = f"{low} to {high}" if high is not None else f"{low} or more"
        raise OptionError(name, f"{name} {_SHORT.repr(value)}: allowed are whole numbers, {bound}")


def check_seed(seed: int, high: int = MAX_SEED) -> None:
    """Raise ValueError for a seed that is negative, or too large for torch's generators."""
    check_int("seed", seed, 0)
    if seed > high:
        check_int("seed", seed, 0, high)


@dataclass(frozen=True)
class Limits:
    """The range of a number.

    Attributes:
        low, high: both included; None for no limit.
        above: it must be larger than this.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None


@dataclass(frozen=True)
class Option:
    """What a field says of itself.

    Attributes:
        default: of the field.
        flag: name of the command-line flag, without dashes; None where there is none.
        help: what `--help` says; the default is added to it unless it speaks of one.
        choices: the values that are allowed.
        limits: the range of a number.
        optional: None is allowed as well.
        group: title of the flag's group in `--help`; None: that of the section.
        needs: another option of the same dataclass, without which this one has no effect.
    """

    default: Any
    flag: str | None = None
    help: str = ""
    choices: Sequence[Any] | None = None
    limits: Limits = Limits()
    optional: bool = False
    group: str | None = None
    needs: str | None = None

    @property
    def kind(self) -> type:
        """The type of its values: bool, int, float or str."""
        examples = (self.default, *(self.choices or ()), self.limits.low, self.limits.high, self.limits.above, "")
        return type(next(value for value in examples if value is not None))

    def check(self, name: str, value: Any) -> None:
        """Raise OptionError naming the value and what is allowed."""
        if value is None and self.optional:
            return
        if self.choices is not None:
            check_choice(name, value, tuple(self.choices))
        elif self.kind is int:
            assert isinstance(self.limits.low, int) and not isinstance(self.limits.high, float)
            check_int(name, value, self.limits.low, self.limits.high)
        elif self.kind is float:
            self._check_number(name, value)
        elif not isinstance(value, self.kind):
            allowed = "True and False" if self.kind is bool else "texts"
            raise OptionError(name, f"{name} {_SHORT.repr(value)}: allowed are {allowed}")

    def _check_number(self, name: str, value: Any) -> None:
        low, high, above = self.limits.low, self.limits.high, self.limits.above
        inside = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and math.isfinite(value)
        )
        if not inside:
            start = f" from {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
            end = f" to {high:g}" if high is not None else " on" if low is not None else ""
            comma = ", up" if above is not None and high is not None else ""
            raise OptionError(name, f"{name} {_SHORT.repr(value)}: allowed are numbers{start}{comma}{end}")


def option(
    default: Any, *, flag: str | None = None, help: str = "", choices: Sequence[Any] | None = None, limits: Limits | None = None,
    optional: bool = False, group: str | None = None, needs: str | None = None,
) -> Any:  # fmt: skip
    """A dataclass field with what `Option` says of it."""
    about = Option(default, flag, help, choices, limits or Limits(), optional, group, needs)
    return field(default=default, metadata={_OPTION: about})


@dataclass(frozen=True)
class Section:
    """A field that is a dataclass of options.

    Attributes:
        kind: the dataclass.
        title: of its flags' group.
        switch: flag that turns it on and off.
        help: of that flag.
        optional: it may be None: off.
    """

    kind: type
    title: str
    switch: str | None = None
    help: str = ""
    optional: bool = True


def section(kind: type, title: str, switch: str | None = None, help: str = "", optional: bool = True) -> Any:
    """A dataclass field that holds `kind`, by default None if optional, else `kind()`."""
    about = {_SECTION: Section(kind, title, switch, help, optional)}
    return field(default=None, metadata=about) if optional else field(default_factory=kind, metadata=about)


def options_of(kind: type) -> dict[str, Option]:
    """Name -> option of a dataclass."""
    return {f.name: f.metadata[_OPTION] for f in dataclasses.fields(kind) if _OPTION in f.metadata}


def sections_of(tree: type) -> dict[str, Section]:
    """Name -> section of a dataclass."""
    return {f.name: f.metadata[_SECTION] for f in dataclasses.fields(tree) if _SECTION in f.metadata}


def paths_of(tree: type) -> dict[str, Option]:
    """Path -> option of a tree: `mode`, `quant.gptq` and so on."""
    below = {f"{name}.{key}": o for name, part in sections_of(tree).items() for key, o in options_of(part.kind).items()}
    return options_of(tree) | below


def check_options(config: Any) -> None:
    """Raise OptionError for the first option of a dataclass whose value is not allowed. For `__post_init__`."""
    for name, about in options_of(type(config)).items():
        about.check(name, getattr(config, name))


def resolve(tree: type, changes: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """Changes as a user writes them, by path.

    Args:
        tree: dataclass of options and sections.
        changes: by the name of an option anywhere in the tree, by its path, or by the name of a section: True, False (or
            None), a mapping of its options, or an instance of its dataclass.
        also: further names that are let through.

    Raises:
        ValueError: a name is unknown, or that of options in two sections.
    """
    found: dict[str, Any] = {}
    sections, paths = sections_of(tree), paths_of(tree)
    for name, value in changes.items():
        if name in sections:
            found |= _resolve_section(name, sections[name], value)
            continue
        fitting = [name] if name in paths or name in also else [path for path in paths if path.endswith(f".{name}")]
        if not fitting:
            known = {*sections, *also, *paths, *(path.rpartition(".")[2] for path in paths)}
            raise ValueError(_unknown(name, known))
        if len(fitting) > 1:
            raise ValueError(f"option {name!r} is one of several: name {' or '.join(fitting)}")
        found[fitting[0]] = value
    return found


def _resolve_section(name: str, about: Section, value: Any) -> dict[str, Any]:
    if isinstance(value, about.kind):
        value = dataclasses.asdict(value)  # type: ignore[call-overload]
    if isinstance(value, Mapping):
        own = options_of(about.kind)
        for key in value:
            if key not in own:
                raise ValueError(f"{name}: {_unknown(key, own)}")
        return ({name: True} if about.optional else {}) | {f"{name}.{key}": v for key, v in value.items()}
    if not about.optional or not (value is None or isinstance(value, bool)):
        allowed = "options by name" if not about.optional else "true, false and options by name"
        raise ValueError(f"{name} {_SHORT.repr(value)}: allowed are {allowed}")
    return {name: bool(value)}


def _unknown(name: object, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), sorted(known), 3)
    return f"unknown option {_SHORT.repr(name)}" + (f": did you mean {' or '.join(near)}?" if near else "")


def read_tree(tree: type, data: Mapping[str, Any]) -> Any:
    """A tree from what `dataclasses.asdict` made of it.

    Options that are younger than `data` have their defaults.

    Raises:
        ValueError: a name is unknown, or a value is not allowed.
    """
    own, sections = options_of(tree), sections_of(tree)
    for name in data:
        if name not in own and name not in sections:
            raise ValueError(_unknown(name, {*own, *sections}))
    values = dict(data)
    for name, about in sections.items():
        found = _resolve_section(name, about, data[name]) if name in data else {}
        details = {path.partition(".")[2]: value for path, value in found.items() if "." in path}
        if name in data:
            values[name] = None if found.get(name) is False else about.kind(**details)
    return tree(**values)


def read_options(path: Path) -> dict[str, Any]:
    """Names with their values in a YAML file. Raises FileNotFoundError, and ValueError where it holds something else."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a recipe: expected names of options with their values")
    return content
