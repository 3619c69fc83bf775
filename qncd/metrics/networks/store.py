"""Features on disk: rows that are read in blocks, and a cache by the content of the images, the network and its weights."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch

from qncd.io.files import read_json, reading, regular_file, scratch_folder, write_json
from qncd.io.npz import read_header

logger = logging.getLogger(__name__)

FORMAT = 1  # part of every key; raised when features are computed or stored differently
LIMIT = 20 << 30  # bytes in the cache; beyond it the entries that were used longest ago go
_BLOCK = 4096  # rows
_ENTRY = "entry.json"
_LAYER = re.compile(r"[a-z_]+")  # a name that is no path


def default_cache() -> Path:
    """`$QNCD_CACHE/features`, or `~/.cache/qncd/features`."""
    return Path(os.environ.get("QNCD_CACHE") or Path.home() / ".cache" / "qncd").expanduser() / "features"


class Scratch:
    """A `scratch_folder` that goes with the last object that refers to it.

    Args:
        parent: where it is made; the system's place by default.

    Raises:
        ValueError: it cannot be made.
    """

    def __init__(self, parent: Path | None = None) -> None:
        stack = contextlib.ExitStack()
        self.path = stack.enter_context(scratch_folder(parent))
        self.remove = weakref.finalize(self, stack.close)


class Rows:
    """(N, D) float32 in a .npy file; nothing is kept in memory.

    Args:
        path: the file.
        scratch: the temporary folder around it, where it is in one.

    Raises:
        ValueError: the file is no such array, or shorter than its header says.
    """

    def __init__(self, path: Path, scratch: Scratch | None = None) -> None:
        self.path, self._scratch = path, scratch
        with reading(path, "an array of features"), regular_file(path).open("rb") as stream:
            header = read_header(stream)
        self._offset = header.offset
        if len(header.shape) != 2 or header.fortran or header.dtype != np.float32:
            raise ValueError(f"{path}: {header.dtype} {header.shape}, expected float32 (N, D)")
        if path.stat().st_size != header.offset + header.nbytes:
            raise ValueError(f"{path}: another length than its header says")
        self.count, self.dimension = header.shape

    def blocks(self, start: int = 0, stop: int | None = None, size: int = _BLOCK) -> Iterator[torch.Tensor]:
        """The rows start to stop, `size` at a time."""
        stop = self.count if stop is None else stop
        for first in range(start, stop, size):
            rows = min(size, stop - first)
            offset = self._offset + 4 * self.dimension * first
            data = np.fromfile(self.path, np.float32, rows * self.dimension, offset=offset)
            yield torch.from_numpy(data.reshape(rows, self.dimension))

    def read(self) -> torch.Tensor:
        """All rows."""
        return next(self.blocks(size=max(self.count, 1)))

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """The rows of these indices, in their order."""
        shape = (self.count, self.dimension)
        return torch.from_numpy(np.memmap(self.path, np.float32, "r", self._offset, shape)[indices])


class FeatureSet:
    """What a network says about a set of images.

    Attributes:
        count: number of images.
        layers: rows by layer, e.g. `features`, `spatial` and `logits`.
        folder: where they are.

    Raises:
        FileNotFoundError, ValueError: the folder is damaged, or holds something else.
    """

    def __init__(self, folder: Path, scratch: Scratch | None = None) -> None:
        self.folder = folder
        entry = read_json(folder / _ENTRY)
        count, layers = (entry.get(key) if isinstance(entry, dict) else None for key in ("count", "layers"))
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{folder / _ENTRY}: count {count!r}, expected a number of images")
        if not (isinstance(layers, list) and layers and all(isinstance(name, str) and _LAYER.fullmatch(name) for name in layers)):
            raise ValueError(f"{folder / _ENTRY}: layers {layers!r}, expected a list of names")
        self.count = count
        self.layers = {name: Rows(folder / f"{name}.npy", scratch) for name in layers}
        if any(rows.count != self.count for rows in self.layers.values()):
            raise ValueError(f"{folder}: rows of another number than {self.count}")

    def check_finite(self) -> None:
        """Read all rows once. Raises ValueError where one holds NaN or an infinite value."""
        for rows in self.layers.values():
            if not all(torch.isfinite(block).all() for block in rows.blocks()):
                raise ValueError(f"{rows.path}: NaN or infinite values")


class FeatureWriter:
    """Writes the layers of one set, batch by batch, and gives the entry its name when all rows are there."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.done = folder, count, 0
        self._streams: dict[str, IO[bytes]] = {}

    def append(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Add the rows (n, D) of each layer. Raises ValueError where they cannot be written."""
        for name, rows in batch.items():
            array = np.ascontiguousarray(rows.detach().cpu().numpy(), np.float32)
            with self._told():
                if name not in self._streams:
                    stream = self._streams[name] = (self.folder / f"{name}.npy").open("wb")
                    header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, array.shape[1])}
                    np.lib.format.write_array_header_1_0(stream, header)
                self._streams[name].write(array.data)
        self.done += len(next(iter(batch.values())))

    def close(self, description: Mapping[str, object] | None = None) -> None:
        """Finish the files; with a description the set is complete and can be opened."""
        for stream in self._streams.values():
            with self._told():
                stream.close()
        if description is not None:
            entry = {"count": self.count, "layers": sorted(self._streams), **description}
            write_json(self.folder / _ENTRY, entry)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"{self.folder}: the features cannot be written ({error.strerror})") from None


class FeatureCache:
    """Feature sets by key; without a folder, sets live as long as the object that stands for them.

    Args:
        folder: where the sets are kept, None for no cache.
        limit: bytes; beyond it the sets that were used longest ago are deleted.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    @staticmethod
    def key(identity: str, digest: str) -> str:
        """The name of a set: a hash of the network with its weights and of the images."""
        return hashlib.sha256(f"{FORMAT}\n{identity}\n{digest}".encode()).hexdigest()[:32]

    def find(self, key: str) -> FeatureSet | None:
        """The set of that key, None where there is none; a damaged one is deleted with a warning."""
        if self.folder is None or not (self.folder / key).exists():
            return None
        try:
            found = FeatureSet(self.folder / key)
            found.check_finite()
        except (OSError, ValueError) as error:
            logger.warning("damaged features in the cache, computed again: %s", error)
            shutil.rmtree(self.folder / key, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # a cache that is only read
            os.utime(found.folder / _ENTRY)
        return found

    def start(self, count: int) -> tuple[FeatureWriter, Scratch]:
        """A writer into a new temporary folder, beside the cache where there is one."""
        if self.folder is not None:
            try:
                scratch = Scratch(self.folder)
                return FeatureWriter(scratch.path, count), scratch
            except ValueError as error:  # a read-only home
                logger.warning("no cache of features: %s", error)
                self.folder = None
        scratch = Scratch()
        return FeatureWriter(scratch.path, count), scratch

    def keep(self, key: str, scratch: Scratch) -> FeatureSet:
        """The finished set, under its key where there is a cache."""
        if self.folder is None:
            return FeatureSet(scratch.path, scratch)
        target = self.folder / key
        try:
            os.rename(scratch.path, target)
        except OSError:  # another run was first
            return FeatureSet(scratch.path, scratch)
        self._evict(key)
        return FeatureSet(target)

    def _evict(self, newest: str) -> None:
        assert self.folder is not None
        entries = []
        for path in self.folder.iterdir():
            if not path.name.startswith(".") and (path / _ENTRY).is_file():
                entries.append(((path / _ENTRY).stat().st_mtime, path, sum(f.stat().st_size for f in path.iterdir())))
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= self.limit:
                break
            if path.name != newest:
                shutil.rmtree(path, ignore_errors=True)
                total -= size
