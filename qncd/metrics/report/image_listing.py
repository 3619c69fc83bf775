"""Which files of a folder are images, and words for everything else that lies there."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from qncd.metrics.report.image_files import SUFFIXES

_MOST_KINDS = 5  # that are told one by one


def list_images(folder: Path) -> tuple[list[str], str | None]:
    """Image files below a folder at any depth, and what was left out.

    A folder is read once: under its own path where it lies below `folder`, else under the first link to it. Links to folders
    above are circles and not followed.

    Returns:
        sorted paths relative to `folder`, with forward slashes, and one line of words, None where nothing was left out.

    Raises:
        ValueError: a folder that cannot be listed, or an image file that is a link to nothing.
    """
    names: list[str] = []
    kinds: Counter[str] = Counter()
    hidden = repeated = 0
    real = Path(os.path.realpath(folder))
    seen = set(real.parents)
    folders, links = [folder], list[Path]()  # links wait until there are no other folders, so that these keep their own paths
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        target = Path(os.path.realpath(here))
        if target in seen:
            repeated += 1
            continue
        seen.add(target)
        for entry in _entries(here):
            path = here / entry.name
            if entry.name.startswith("."):
                hidden += 1
            elif os.path.isdir(path):
                (links if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() in SUFFIXES:
                if entry.is_symlink() and not os.path.exists(path):
                    raise ValueError(f"{path}: a link to {os.readlink(path)}, which is not there")
                names.append(path.relative_to(folder).as_posix())
            else:
                kinds[path.suffix.lower() or "without a suffix"] += 1
    return sorted(names), _in_words(kinds, hidden, repeated)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed: {error.strerror}") from None


def _in_words(kinds: Counter[str], hidden: int, repeated: int) -> str | None:
    words = []
    if total := kinds.total():
        told = kinds.most_common(_MOST_KINDS)
        each = [f"{_printable(kind)} {count}" for kind, count in told]
        if rest := total - sum(count for _, count in told):
            each.append(f"others {rest}")
        are = "1 file of another kind is no image" if total == 1 else f"{total} files of other kinds are not images"
        words.append(f"{are}: {', '.join(each)}")
    if hidden:
        words.append(f"{hidden} {'name' if hidden == 1 else 'names'} with a dot in front left out")
    if repeated:
        words.append(f"{repeated} {'link' if repeated == 1 else 'links'} to folders that are read anyway or lie above left out")
    return "; ".join(words) or None


def _printable(text: str) -> str:
    """The text in one line that every terminal takes: a file name may hold line feeds and broken characters."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
