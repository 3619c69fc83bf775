"""Read YAML files of strangers: plain data only, bounded in size, depth and expansion, every fault in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from qncd.io.files import read_text, regular_file

_LARGEST = 256 << 10  # bytes
_DEEPEST = 50
_MOST_NODES = 20_000  # with what aliases and references stand for
_LONGEST = 10_000  # characters of a text with references in it
_LARGEST_INTEGER = 1 << 63
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
# YAML 1.1 has no float without a dot. CompVis' code reads its yamls with OmegaConf, for which 1e-4 is one.
_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+][0-9]+)?"
    r"|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """The safe loader with OmegaConf's numbers: a date is a text, a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.tag != "tag:yaml.org,2002:str":
                    raise _fault(f"the key {_shown(key)} is no text", key)
                if key.value in seen:
                    raise _fault(f"the key {key.value!r} is there twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+0123456789."))


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds: dicts with texts as keys, lists, texts, numbers, booleans, None. Nothing in it is run.

    Numbers are read as OmegaConf reads them. `${a.b}` stands for what is at that key; OmegaConf's functions, such as
    `${oc.env:HOME}`, are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or larger than 256 kB, deeper than 50 levels, or than 20,000 values when its aliases and
            references are written out.
    """
    path = regular_file(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path}: {size} bytes, a yaml file here has at most {_LARGEST}")
    text = read_text(path)
    try:
        _check_size(text)
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}: not a yaml file{where}: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (ValueError, OverflowError, LookupError) as error:  # of numbers that are none
        raise ValueError(f"{path}: not a yaml file: {error}") from None
    try:
        return _References(content).resolved()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shown(key: yaml.Node) -> str:
    return str(key.value)[:60] if isinstance(key, yaml.ScalarNode) else "that is a list or a mapping"


def _fault(problem: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast(yaml.Mark, at.start_mark))


def _check_size(text: str) -> None:
    """Raise a YAMLError where the document is too deep, or too large when its aliases are written out: nothing is built yet."""
    depth, total = 0, 0
    starts: list[tuple[str | None, int]] = []  # (anchor, values before it) of the collections that are open
    sizes: dict[str | None, int | None] = {}  # by anchor; None of those that are open
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if (size := sizes.get(event.anchor, 0)) is None:
                raise _fault(f"*{event.anchor} stands inside what it stands for", event)
            total += size
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag not in (None, "!") and event.tag not in _PLAIN_TAGS:
                raise _fault(f"the tag {event.tag} is not read", event)
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                starts.append((event.anchor, total - 1))
            if event.anchor:
                sizes[event.anchor] = 1 if isinstance(event, yaml.ScalarEvent) else None
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = starts.pop()
            if anchor:
                sizes[anchor] = total - before
        if depth > _DEEPEST:
            raise _fault(f"nested deeper than {_DEEPEST} levels", event)
        if total > _MOST_NODES:
            raise _fault(f"more than {_MOST_NODES} values", event)


class _References:
    """A document whose references are replaced by what they stand for, each by a copy."""

    def __init__(self, content: Any) -> None:
        self.content, self.count = content, 0
        self.open: list[str] = []  # the references that are being followed

    def resolved(self) -> Any:
        return self._value(self.content, "", 0)

    def _value(self, value: Any, key: str, depth: int) -> Any:
        self.count += 1
        if self.count > _MOST_NODES:
            raise ValueError(f"{key}: more than {_MOST_NODES} values with what references stand for")
        if depth > _DEEPEST:
            raise ValueError(f"{key}: nested deeper than {_DEEPEST} levels with what references stand for")
        if isinstance(value, dict):
            if other := [name for name in value if not isinstance(name, str)]:  # what `<<` brought along
                raise ValueError(f"{key}: the key {str(other[0])[:60]} is no text")
            return {name: self._value(item, f"{key}.{name}".lstrip("."), depth + 1) for name, item in value.items()}
        if isinstance(value, list):
            return [self._value(item, f"{key}.{i}".lstrip("."), depth + 1) for i, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            return self._text(value, key, depth)
        if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
            raise ValueError(f"{key}: a whole number of more than 64 bits")
        return value

    def _text(self, text: str, key: str, depth: int) -> Any:
        if (whole := _REFERENCE.fullmatch(text)) is not None:
            return self._follow(whole[1], key, depth)
        result = "".join(self._parts(text, key, depth))
        if len(result) > _LONGEST:
            raise ValueError(f"{key}: longer than {_LONGEST} characters with what references stand for")
        return result

    def _parts(self, text: str, key: str, depth: int) -> Iterator[str]:
        end = 0
        if "${" in _REFERENCE.sub("", text):
            raise ValueError(f"{key}: {text[:60]!r} has a reference that does not end, or one inside another")
        for match in _REFERENCE.finditer(text):
            yield text[end : match.start()]
            found = self._follow(match[1], key, depth)
            if isinstance(found, dict | list):
                raise ValueError(f"{key}: the reference {match[0]} is to a section, inside a text")
            yield str(found)
            end = match.end()
        yield text[end:]

    def _follow(self, name: str, key: str, depth: int) -> Any:
        if not _PATH.fullmatch(name):
            raise ValueError(
                f"{key}: the reference {'${' + name[:60] + '}'} is not read: allowed are keys, as in ${{model.params}}"
            )
        if name in self.open:
            raise ValueError(f"{key}: the reference ${{{name}}} leads back to itself")
        found = self.content
        for part in name.split("."):
            if isinstance(found, str) and "${" in found:
                found = self._text(found, key, depth + 1)
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                raise ValueError(f"{key}: Interpolation key {name!r} not found")
        self.open.append(name)
        try:
            return self._value(found, key, depth + 1)
        finally:
            self.open.pop()
