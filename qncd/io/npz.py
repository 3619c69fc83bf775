"""Arrays of .npy and .npz files, judged by their headers before a value is read or memory is taken."""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from qncd.io.files import reading, regular_file

_LARGEST_HEADER = 1 << 16  # bytes
_DEFLATED_TO_ONE = 1032  # bytes that deflate can make of one, at most


@dataclass(frozen=True)
class Header:
    """What a .npy file says about its array.

    Attributes:
        shape: of the array.
        fortran: whether the first index runs fastest.
        dtype: of the values; never Python objects.
        offset: bytes before the first value.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """The header at the start of a stream in .npy format.

    Raises:
        ValueError: there is none, or it tells of Python objects or a negative length.
    """
    head = io.BytesIO(stream.read(_LARGEST_HEADER))  # numpy would read as much as the header asks for
    version = np.lib.format.read_magic(head)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
    else:
        raise ValueError(f"version {version} of the format .npy, expected 1.0 or 2.0")
    if dtype.hasobject:
        raise ValueError("Python objects, expected numbers or text")
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}, expected lengths of 0 or more")
    return Header(shape, fortran, dtype, head.tell())


def array_names(path: Path, what: str = "a .npz file") -> list[str]:
    """Names of the arrays of a .npz file.

    Args:
        what: that the file should be, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz file, or has two arrays of one name.
    """
    with _opened(path, what) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        name, times = next(iter(Counter(names).most_common(1)), ("", 0))
        if times > 1:
            raise ValueError(f"{path}: the array {name} is in it {times} times")
    return names


def array_header(path: Path, name: str) -> Header:
    """The header of an array of a .npz file, which agrees with how many bytes there are.

    Raises:
        ValueError: the array is damaged, holds Python objects, or is compressed by another method than np.savez_compressed's.
    """
    with open_array(path, name) as (header, _):
        return header


@contextlib.contextmanager
def open_array(path: Path, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
    """The header of an array of a .npz file, and a stream of its values in the order of the file.

    Raises:
        ValueError: see `array_header`; what goes wrong in the body names the array too.
    """
    with _opened(path) as archive, reading(path, f"a file with an array {name}"):
        entry = archive.getinfo(f"{name}.npy")
        _check_size(entry)
        with archive.open(entry) as stream:
            header = read_header(stream)
        if header.nbytes != entry.file_size - header.offset:
            raise ValueError(f"{name} has {entry.file_size - header.offset} bytes, its header says {header.nbytes}")
        with archive.open(entry) as stream:
            stream.read(header.offset)
            yield header, stream


def read_array(path: Path, name: str) -> np.ndarray:
    """An array of a .npz file, in memory; the caller has looked at `array_header` first. Raises ValueError as that does."""
    with open_array(path, name) as (header, stream):
        values = np.frombuffer(bytearray(stream.read(header.nbytes)), header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran else "C")


@contextlib.contextmanager
def _opened(path: Path, what: str = "a .npz file") -> Iterator[zipfile.ZipFile]:
    with reading(path, what), zipfile.ZipFile(regular_file(path)) as archive:
        yield archive


def _check_size(entry: zipfile.ZipInfo) -> None:
    """Refuse a size that the bytes in the archive cannot have, before memory is taken for it."""
    if entry.compress_type == zipfile.ZIP_STORED:
        most = entry.compress_size
    elif entry.compress_type == zipfile.ZIP_DEFLATED:
        most = _DEFLATED_TO_ONE * entry.compress_size
    else:
        raise ValueError(f"compressed by method {entry.compress_type}, expected none or deflate")
    if entry.file_size > most:
        raise ValueError(f"{entry.file_size} bytes out of {entry.compress_size} compressed ones cannot be")
