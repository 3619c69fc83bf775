"""Files that appear whole or not at all, and one line for whatever is wrong with a file that is read.

A file is written under a temporary name beside its place and renamed when it is finished. The name tells which process
writes it, so that what a killed process left behind is found and removed by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qncd.workers import before_exit

_NODE = re.sub(r"[^A-Za-z0-9-]", "-", platform.node()) or "host"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<node>[A-Za-z0-9-]+)\.(?P<pid>\d+)\.\d+\.(?P<kind>tmp|old)", re.DOTALL)
_SCRATCH = "qncd-scratch"
_LARGEST_JSON = 256 << 20  # bytes
_DEEPEST_JSON = 100
LONGEST_REASON = 300  # characters: a library may quote what a damaged file holds
_open: set[Path] = set()  # what this process is writing
_swept: set[Path] = set()  # folders that this process has written to
_counter = itertools.count()


def register_unfinished(path: Path) -> None:
    """Have `discard_unfinished` remove this too."""
    _open.add(path)


def forget_unfinished(path: Path) -> None:
    """It is finished, or gone."""
    _open.discard(path)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that is being written, or was when its process was killed."""
    return _TEMPORARY.fullmatch(name) is not None


def discard_unfinished() -> None:
    """Remove what this process is writing: it is about to end."""
    for path in list(_open):
        _remove(path)


def remove_leftovers_below(folder: Path) -> None:
    """`remove_leftovers` in a folder and all folders below it."""
    for below, _, _ in os.walk(folder):
        remove_leftovers(Path(below))


before_exit.append(discard_unfinished)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` whose process on this machine lives no more.

    A folder that was set aside for its successor, which never came, is put back.
    """
    try:
        found = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return
    for entry in found:
        match = _TEMPORARY.fullmatch(entry)
        if match is None or match["node"] != _NODE or _is_alive(int(match["pid"])):
            continue
        path, target = folder / entry, folder / match["name"]
        if match["kind"] == "old" and not target.exists():
            with contextlib.suppress(OSError):
                path.rename(target)
        else:
            _remove(path)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` for the body to fill, which becomes `path` when the body has ended without an error.

    Where `path` is a link to a file, that file is replaced. It has the permissions of a new file of this process (its umask),
    whatever the library that fills it makes of them. Missing folders above it are made.

    Raises:
        ValueError: what the body raises of its own; whatever went wrong with writing, in one line that names `path`.
    """
    path = Path(path)
    with _told(path, "cannot be written", ValueError):
        if path.exists():
            path = regular_file(path).resolve()  # a device would be replaced, and a link lose what it leads to
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary = _temporary(path)
        _open.add(temporary)
        try:
            temporary.touch(exist_ok=False)
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
        finally:
            _remove(temporary)
            _open.discard(temporary)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` for the body to fill, which takes the place of `path` when the body has ended.

    A folder that is there already is exchanged for the new one in a single step where the system has one; elsewhere it is
    set aside first, and `remove_leftovers` puts it back if the process ends in between.

    Raises:
        ValueError: what the body raises of its own; whatever went wrong with writing, in one line that names `path`.
    """
    path = Path(path)
    with _told(path, "cannot be written", ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary = _temporary(path)
        _open.add(temporary)
        try:
            temporary.mkdir()
            yield temporary
            _put_folder(temporary, path)
        finally:
            _remove(temporary)
            _open.discard(temporary)


@contextlib.contextmanager
def scratch_folder(parent: str | Path | None = None) -> Iterator[Path]:
    """An empty folder for the body's own use, removed afterwards; what killed processes left of theirs is removed first.

    Args:
        parent: where; by default the system's folder for temporary files.
    """
    parent = Path(parent or tempfile.gettempdir())
    with _told(parent, "cannot be written"):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder = _temporary(parent / _SCRATCH)
        folder.mkdir(mode=0o700)
    _open.add(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        _open.discard(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises ValueError where it cannot be written."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all. Raises ValueError where it cannot be written, or the value is not JSON's."""
    with _told(Path(path), "cannot be written as JSON"):
        text = json.dumps(value, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def regular_file(path: str | Path) -> Path:
    """The path, if it is a file with content to be read: a pipe or a device would wait for ever, or never end.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is a folder, a pipe, a device or a socket.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:  # a name that is too long, a link to itself, a folder without permission
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise ValueError(f"{str(path)!r}: {error}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise ValueError(f"{path}: {kind}, expected a file")
    return path


@contextlib.contextmanager
def reading(path: str | Path, what: str = "") -> Iterator[None]:
    """Whatever a library raises in the body, which reads `path`, becomes a ValueError of one line that names the file.

    FileNotFoundError stays what it is, and so does a ValueError that names the file already.

    Args:
        what: that the file should be, e.g. "a checkpoint".
    """
    with _told(Path(path), f"not {what}, or damaged" if what else "damaged"):
        yield


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, without the byte-order mark that some editors put in front.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text in UTF-8, or no regular file.
    """
    path = regular_file(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8: what line feeds end, with or without a carriage return before them.

    No other character ends a line: a prompt may hold a form feed or U+2028. A file that ends in a line feed has no empty line
    behind it. Raises as `read_text` does.
    """
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(path: str | Path, infinities: bool = False) -> Any:
    """What a JSON file holds; NaN and Infinity, which are no JSON, are refused.

    Args:
        infinities: they are not: some schedulers of diffusers write -Infinity into their configurations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, larger than 256 MB, or nested deeper than 100 levels.
    """
    path = regular_file(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size / 1e6:.0f} MB, a JSON file here has at most {_LARGEST_JSON / 1e6:.0f} MB")
    with reading(path, "JSON"):
        value = json.loads(read_text(path), parse_constant=None if infinities else _no_number)
        if _depth(value) > _DEEPEST_JSON:
            raise ValueError(f"nested deeper than {_DEEPEST_JSON} levels")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _depth(value: Any) -> int:
    """How deep lists and dicts are nested, without recursion."""
    depth, level = 0, [value]
    while level:
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children.extend(item.values())
            elif isinstance(item, list):
                children.extend(item)
        if not any(isinstance(item, dict | list) for item in level):
            return depth
        depth, level = depth + 1, children
    return depth


@contextlib.contextmanager
def _told(path: Path, what: str, *speak_for_themselves: type[Exception]) -> Iterator[None]:
    """Errors of the body in one line with the path, but those of kinds that say themselves what they are about."""
    passed: tuple[type[Exception], ...] = (FileNotFoundError, *speak_for_themselves)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ValueError(f"{path}: {what} ({reason[:LONGEST_REASON]})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line: torch's go on with where they come from. Its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sweep(folder: Path) -> None:
    """`remove_leftovers`, once a process: listing the folder for each of 50,000 images would take half an hour."""
    place = folder.absolute()
    if place not in _swept:
        _swept.add(place)
        remove_leftovers(folder)


def _temporary(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{_NODE}.{os.getpid()}.{next(_counter)}.{kind}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _put_folder(new: Path, path: Path) -> None:
    """Move `new` to `path`; afterwards `new` is what was there before, if anything was."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        old = _temporary(path, "old")
        path.rename(old)
        new.rename(path)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    function: Callable[..., int] | None = None
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
