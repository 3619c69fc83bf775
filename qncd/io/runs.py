"""An output folder as a run: its settings beside its images, so that it is resumed with equal settings or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from qncd import __version__
from qncd.io.files import is_temporary, read_json, remove_leftovers_below, write_json
from qncd.io.locks import LOCK_FILE, FolderLock

RUN_FILE = "run.json"
_IMAGE = re.compile(r"(\d{6,})_seed-?\d+\.png")
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Run:
    """A folder opened by `open_run`.

    Attributes:
        lock: what keeps other runs out, held as long as this object lives; None for a folder that is only read.
    """

    folder: Path
    lock: FolderLock | None = None

    def release(self) -> None:
        """Let other runs into the folder."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the folder; the lock stays with this one."""
        return Run, (self.folder,)

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says now."""
        return _read(self.folder / RUN_FILE)

    def existing_indices(self, subfolder: str = "images") -> set[int]:
        """Indices of the images of a subfolder that are there and whole; one that is cut off counts as missing."""
        if not (self.folder / subfolder).is_dir():
            return set()
        with os.scandir(self.folder / subfolder) as entries:
            return {int(match[1]) for entry in entries if (match := _IMAGE.fullmatch(entry.name)) and _is_whole_png(entry.path)}

    def finish(self, **figures: Any) -> None:
        """Add the time and figures of the finished run (seconds, images per second, ...) to run.json.

        Raises:
            ValueError: a figure cannot be written as JSON.
        """
        record = self.record
        record["finished"] = _now()
        record["figures"] = record.get("figures", {}) | _as_json(figures, "figures")
        write_json(self.folder / RUN_FILE, record)


def open_run(
    folder: str | Path,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any] | None = None,
    min_free_bytes: int = 0,
) -> Run:
    """Start a run in a new or empty folder, or resume the run that is in it. The folder is locked as long as the Run lives.

    What a run that was killed left half-written is removed.

    Args:
        folder: made where it is not there.
        settings: everything that decides what an image looks like; a run is resumed with equal settings only.
        environment: everything else (device, batch_size, max_images, verbose): recorded, free to change.
        min_free_bytes: room that the run will need on the disk.

    Raises:
        ValueError: the folder holds a run with other settings, one that is at work, or files of something else; the disk has
            too little room, or cannot be written; or a setting cannot be written as JSON.
    """
    folder = Path(folder)
    wanted, around = _as_json(settings, "settings"), _as_json(environment or {}, "environment")
    _check_folder(folder)
    _check_room(folder, min_free_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror})") from None
    run, run_file = Run(folder, FolderLock(folder)), folder / RUN_FILE
    try:
        old = _read(run_file) if run_file.is_file() else None
        if old is not None:
            _refuse_other_settings(folder, old["settings"], wanted)
    except ValueError:
        run.release()
        raise
    remove_leftovers_below(folder)
    session = {"started": _now(), "environment": around, "versions": _versions(), "git_commit": _git_commit()}
    if old is None:
        write_json(run_file, {"settings": wanted, **session, "resumed": [], "finished": None, "figures": {}})
    else:
        write_json(run_file, old | {"resumed": [*old.get("resumed", []), session], "finished": None})
    return run


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a file, and for a folder with something else in it than a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, expected a folder for the images")
    if not folder.is_dir() or (folder / RUN_FILE).is_file():
        return
    # A run that was killed as it began may have left its lock and a file that it was writing.
    if any(entry.name != LOCK_FILE and not is_temporary(entry.name) for entry in folder.iterdir()):
        raise ValueError(f"{folder}: not empty, and no run of qncd (it has no {RUN_FILE}): name another folder")


def _refuse_other_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differing = []
    for key in sorted(old.keys() | new.keys()):
        there, here = (json.dumps(side[key]) if key in side else "absent" for side in (old, new))
        if there != here:
            differing.append(f"{key} ({there} there, {here} now)")
    if differing:
        raise ValueError(f"{folder}: holds a run with other settings: {', '.join(differing)}: name another folder or delete it")


def _check_room(folder: Path, min_free_bytes: int) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < min_free_bytes:
        raise ValueError(f"{folder}: {free / 1e9:.3f} GB free on its disk, the run needs {min_free_bytes / 1e9:.3f} GB")


def _as_json(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values as they come back from a JSON file: a tuple equals the list it was written as, NaN and infinity are null."""
    try:
        text = json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in values.items()}, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return plain


def _read(path: Path) -> dict[str, Any]:
    """What run.json holds, of the types that this module writes. Raises ValueError for another file."""
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: name another folder or delete it") from None
    kinds = {"settings": dict, "environment": dict, "resumed": list, "figures": dict}
    for key, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(key, None if key == "settings" else kind()), kind):
            raise ValueError(f"{path}: damaged (no {key} in it): name another folder or delete it")
    return record


def _is_whole_png(path: str) -> bool:
    with open(path, "rb") as stream:
        if stream.read(len(_PNG_START)) != _PNG_START or stream.seek(0, os.SEEK_END) < len(_PNG_START) + len(_PNG_END):
            return False
        stream.seek(-len(_PNG_END), os.SEEK_END)
        return stream.read() == _PNG_END


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "qncd": __version__}
    for package in ("torch", "diffusers"):
        try:
            # The module knows its build (2.6.0+cu124) where the metadata may not; it is not imported for this.
            versions[package] = getattr(sys.modules.get(package), "__version__", None) or metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _git_commit() -> str | None:
    """The commit of the code, with `-dirty` where it was changed since; None outside a git checkout of qncd."""
    here = Path(__file__)
    try:
        # An installed copy may lie inside a checkout of something else: only a tracked file speaks for its commit.
        tracked = ["ls-files", "--error-unmatch", here.name]
        for command in (tracked, ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]):
            done = subprocess.run(["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10)
            if done.returncode:
                return None
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
