"""Read checkpoints without running anything that is in them.

A checkpoint is a pickle, and a pickle may name any function and call it. Published LDM and Stable Diffusion files need
more than `torch.load(weights_only=True)` allows (Lightning callbacks, old numpy scalars), and `torch.load` with another
`pickle_module` still hands TorchScript archives to the TorchScript interpreter. So the two containers that `torch.save`
writes (zip, and the older sequence of pickles) are read here, and their pickles by `qncd.models.files.pickle_reader`.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from qncd.io.files import LONGEST_REASON, first_line, regular_file
from qncd.models.files.pickle_reader import PickleReader, ReadStorage
from qncd.models.files.pickled_values import Inert as Inert
from qncd.models.files.pickled_values import shown
from qncd.models.files.safetensors_files import elements, mapped, read_safetensors

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# What reading a damaged or hostile stream can end in, from pickle, zipfile, struct, numpy and torch.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, zipfile.BadZipFile, struct.error, LookupError, AttributeError, TypeError, ValueError,
    ArithmeticError, MemoryError, RecursionError, NotImplementedError, RuntimeError, OSError,
)  # fmt: skip


def load_checkpoint(path: str | Path) -> Any:
    """Read a .ckpt/.pth/.pt file of torch (zip or the old format), or a .safetensors file, without running its code.

    Tensors come on the CPU in the dtype of the file, without gradients; tensors of a zip or .safetensors file are read from disk
    when they are first touched, so what is not used costs nothing. Objects of unknown classes become `Inert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or none of these formats. One line that names the file.
    """
    path = regular_file(path)
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise ValueError(f"{path}: the file is empty")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path}: not a checkpoint but a web page (a download that went wrong)")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return _load_zip(path) if head.startswith(b"PK") else _load_legacy(path)
    except _DAMAGE as error:
        raise ValueError(f"{path}: truncated, or not a checkpoint ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The first line of an error's text, which may hold what the file does: short, and printable."""
    line = first_line(error)[:LONGEST_REASON]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _load_zip(path: Path) -> Any:
    records, size = _records(path), path.stat().st_size
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which holds a program, not weights alone")
    if "data.pkl" not in records:
        raise ValueError("a zip file without data.pkl")

    def record(name: str) -> np.ndarray:
        if name not in records:
            raise ValueError(f"record {name[:80]!r} is missing")
        start, length = records[name]
        return mapped(path, start, length)

    if "byteorder" in records and bytes(record("byteorder")[:16]) != b"little":
        raise ValueError("written on a big-endian machine")
    storages: dict[str, torch.Tensor] = {}

    def read_storage(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        if key not in storages:
            raw = record(f"data/{key}")
            if raw.size != numel * dtype.itemsize:
                raise ValueError(f"storage {key} has {raw.size} bytes, expected {numel * dtype.itemsize}")
            storages[key] = elements(raw, dtype)
        if storages[key].dtype != dtype or storages[key].numel() != numel:
            raise ValueError(f"storage {key} is of {storages[key].dtype} and of {dtype}")
        return storages[key]

    return PickleReader(io.BytesIO(bytes(record("data.pkl"))), size, read_storage).load()


def _records(path: Path) -> dict[str, tuple[int, int]]:
    """(start, bytes) of each record of a zip file by its name without the archive's folder.

    Raises:
        ValueError: one is compressed, encrypted, there twice, or not inside the file.
    """
    records: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        room = path.stat().st_size
        for entry in archive.infolist():
            name = entry.filename.split("/", 1)[-1]
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
                raise ValueError(f"record {entry.filename[:80]} is compressed")
            if entry.header_offset < 0:
                raise ValueError(f"record {entry.filename[:80]} starts before the file")
            stream.seek(entry.header_offset)
            signature, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
            start = entry.header_offset + 30 + name_length + extra_length
            if signature != b"PK\3\4" or start + entry.file_size > path.stat().st_size:
                raise ValueError(f"record {entry.filename[:80]} reaches past the end of the file")
            room -= entry.file_size
            if name in records or room < 0:
                raise ValueError(f"record {entry.filename[:80]} is there twice, or lies over another one")
            records[name] = start, entry.file_size
    return records


def _load_legacy(path: Path) -> Any:
    """torch.save before 1.6: pickles of a magic number, a version, the machine, the object and the storage keys, then bytes."""
    size = room = path.stat().st_size
    buffers: dict[str, np.ndarray] = {}
    storages: dict[str, torch.Tensor] = {}

    def read_storage(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        nonlocal room
        if key not in storages:
            room -= numel * dtype.itemsize
            if room < 0:  # before memory is taken for it
                raise ValueError(f"storage {key} of {numel} elements is larger than the file")
            buffers[key] = np.zeros(numel * dtype.itemsize, np.uint8)
            storages[key] = elements(buffers[key], dtype)
        if storages[key].dtype != dtype or storages[key].numel() != numel:
            raise ValueError(f"storage {key} is of {storages[key].dtype} and of {dtype}")
        return storages[key]

    # A map, as a file object makes room for as many bytes as a damaged length asks for.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:

        def following(read: ReadStorage | None = None) -> Any:
            return PickleReader(cast(BinaryIO, stream), size, read).load()

        if following() != _LEGACY_MAGIC:
            raise ValueError("no magic number of torch.save")
        protocol, machine = following(), following()
        if protocol != _LEGACY_PROTOCOL or not isinstance(machine, dict) or not machine.get("little_endian", True):
            raise ValueError("written by another version of torch.save, or on a big-endian machine")
        result, keys = following(read_storage), following()
        if not isinstance(keys, list):
            raise ValueError("no list of storage keys")
        file.seek(stream.tell())
        for key in keys:
            if not isinstance(key, str) or key not in buffers:
                raise ValueError(f"storage {shown(key)} belongs to no tensor")
            numel = struct.unpack("<q", file.read(8))[0]
            raw = buffers.pop(key)
            if numel != storages[key].numel() or file.readinto(raw.data) != raw.size:
                raise ValueError(f"storage {key} is cut off")
    if buffers:
        raise ValueError(f"{len(buffers)} storages are missing, first {next(iter(buffers))}")
    return result
