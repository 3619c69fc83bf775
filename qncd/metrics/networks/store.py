"""Features on disk: rows that are read in blocks, and a cache by the content of the images, the network and its weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch

FORMAT = 1  # part of every key; raised when features are computed or stored differently
LIMIT = 20 << 30  # bytes in the cache; beyond it the entries that were used longest ago go
_BLOCK = 4096  # rows
_ENTRY = "entry.json"


def default_cache() -> Path:
    """`$QNCD_CACHE/features`, or `~/.cache/qncd/features`."""
    return Path(os.environ.get("QNCD_CACHE") or Path.home() / ".cache" / "qncd").expanduser() / "features"


class Scratch:
    """A temporary folder that goes with the last object that refers to it.

    Args:
        parent: where it is made; the system's place by default.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=".new-" if parent else "qncd-features-", dir=parent))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


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
        with path.open("rb") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError(f"{path}: not an array of features")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            self._offset = stream.tell()
        if len(shape) != 2 or fortran or dtype != np.float32:
            raise ValueError(f"{path}: {dtype} {shape}, expected float32 (N, D)")
        if path.stat().st_size != self._offset + 4 * shape[0] * shape[1]:
            raise ValueError(f"{path}: another length than its header says")
        self.count, self.dimension = shape

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
    """

    def __init__(self, folder: Path, scratch: Scratch | None = None) -> None:
        self.folder = folder
        entry = json.loads((folder / _ENTRY).read_text())
        self.count = int(entry["count"])
        self.layers = {name: Rows(folder / f"{name}.npy", scratch) for name in entry["layers"]}
        if any(rows.count != self.count for rows in self.layers.values()):
            raise ValueError(f"{folder}: rows of another number than {self.count}")


class FeatureWriter:
    """Writes the layers of one set, batch by batch, and gives the entry its name when all rows are there."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.done = folder, count, 0
        self._streams: dict[str, IO[bytes]] = {}

    def append(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Add the rows (n, D) of each layer."""
        for name, rows in batch.items():
            array = np.ascontiguousarray(rows.detach().cpu().numpy(), np.float32)
            if name not in self._streams:
                stream = self._streams[name] = (self.folder / f"{name}.npy").open("wb")
                header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, array.shape[1])}
                np.lib.format.write_array_header_1_0(stream, header)
            self._streams[name].write(array.data)
        self.done += len(next(iter(batch.values())))

    def close(self, description: Mapping[str, object] | None = None) -> None:
        """Finish the files; with a description the set is complete and can be opened."""
        for stream in self._streams.values():
            stream.close()
        if description is not None:
            entry = {"count": self.count, "layers": sorted(self._streams), **description}
            (self.folder / _ENTRY).write_text(json.dumps(entry, indent=2) + "\n")


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
        """The set of that key, None where there is none; a damaged one is deleted."""
        if self.folder is None or not (self.folder / key / _ENTRY).is_file():
            return None
        try:
            found = FeatureSet(self.folder / key)
            os.utime(found.folder / _ENTRY)
        except (OSError, ValueError, KeyError, EOFError):
            shutil.rmtree(self.folder / key, ignore_errors=True)
            return None
        return found

    def start(self, count: int) -> tuple[FeatureWriter, Scratch]:
        """A writer into a new temporary folder, beside the cache where there is one."""
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                scratch = Scratch(self.folder)
                return FeatureWriter(scratch.path, count), scratch
            except OSError:  # a read-only home: go on without a cache
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
