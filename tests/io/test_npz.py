"""Arrays of .npz files: read as numpy reads them, and refused by their headers before memory is taken."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qncd.io.npz import array_header, array_names, read_array

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def header(descr: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def write(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array", [VALUES, np.asfortranarray(VALUES), VALUES.astype(">f8"), np.array(3), np.array("text"), VALUES[:0]]
)
def test_arrays_are_those_of_numpy(tmp_path: Path, save: object, array: np.ndarray) -> None:
    save(tmp_path / "a.npz", a=array, b=VALUES)  # type: ignore[operator]
    assert array_names(tmp_path / "a.npz") == ["a", "b"]
    assert array_header(tmp_path / "a.npz", "a").shape == array.shape
    found = read_array(tmp_path / "a.npz", "a")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype and found.flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("|u1", (10**6, 10**6)), "a has 0 bytes, its header says 1000000000000"),
        (header("<f8", (10**30,)), "a has 0 bytes, its header says 8" + "0" * 30),
        (header("|u1", (-4,)) + bytes(4), r"shape \(-4,\), expected lengths of 0 or more"),
        (header("|O", (2,)) + b"cos\nsystem\n", "Python objects, expected numbers or text"),
        (npy(VALUES)[:-1], "a has 95 bytes, its header says 96"),
        (npy(VALUES) + b"x", "a has 97 bytes, its header says 96"),
        (b"\x93NUMPY\x03\x00" + npy(VALUES)[8:], r"version \(3, 0\) of the format .npy, expected 1.0 or 2.0"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + bytes(10**6), "expected 4294967295 bytes got 65524"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000, ""),
        (b"", "EOF"),
    ],
)
def test_damaged_arrays_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "a.npz", content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=f"a.npz: not a file with an array a, or damaged .*{message}") as raised:
        read_array(path, "a")
    assert "\n" not in str(raised.value)


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """The archive's own directory says a terabyte too."""
    path = write(tmp_path / "a.npz", npy(VALUES), zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", len(npy(VALUES)))
    assert path.read_bytes().count(size) == 2
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 2**31)))
    with pytest.raises(ValueError, match=r"2147483648 bytes out of \d+ compressed ones cannot be"):
        array_header(path, "a")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("a.npy", npy(VALUES))
    with pytest.raises(ValueError, match=r"a.npz: the array a is in it 2 times"):
        array_names(path)
    write(path, npy(VALUES), zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="compressed by method 14, expected none or deflate"):
        array_header(path, "a")
    with pytest.raises(ValueError, match="not a file with an array b, or damaged"):
        array_header(path, "b")
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"not a .npz file, or damaged"):
        array_names(path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match=r"pipe.npz: a pipe, a device or a socket, expected a file"):
        array_names(tmp_path / "pipe.npz")
