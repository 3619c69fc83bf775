"""Safetensors files: a header that does not fit is refused, and the same content is written as the same bytes."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qncd.models.files.safetensors_files import read_safetensors, read_safetensors_part, write_safetensors

TENSORS = {
    "half": torch.arange(3).half(), "odd": torch.arange(5, dtype=torch.uint8), "full": torch.arange(6.0).reshape(2, 3),
    "empty": torch.zeros(0, 2), "number": torch.tensor(3), "flags": torch.tensor([True]), "b": torch.ones(1).bfloat16(),
    "strided": torch.arange(6.0).reshape(2, 3).T, "large": torch.arange(40_000.0),
    "complex": torch.ones(2, dtype=torch.complex64),
}  # fmt: skip
METADATA = {"format": "pt", "ä": 'a "quoted"\ttext\n', "a": "1", "z": "2"}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    write_safetensors(TENSORS, path, METADATA)
    for found in (load_file(path), read_safetensors(path)):
        assert found.keys() == TENSORS.keys()
        for name, value in TENSORS.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            assert found[name].data_ptr() % value.element_size() == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    write_safetensors(TENSORS, tmp_path / "a", METADATA)
    write_safetensors(dict(reversed(TENSORS.items())), tmp_path / "b", dict(reversed(METADATA.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_mode_is_that_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_safetensors({"a": torch.zeros(1)}, tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a: x of torch\.complex128: allowed are torch\.float64, "):
        write_safetensors({"x": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"b: cannot be written \("):
        write_safetensors({"x": torch.zeros(1)}, tmp_path / "file" / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_part_is_read_with_the_metadata(tmp_path: Path) -> None:
    write_safetensors(TENSORS, tmp_path / "a", METADATA)
    tensors, names, metadata = read_safetensors_part(tmp_path / "a", ("f", "o"))
    assert tensors.keys() == {"full", "flags", "odd"} and set(names) == TENSORS.keys() and metadata == METADATA


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    write_safetensors(TENSORS, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    for value in read_safetensors(tmp_path / "a").values():
        value.zero_()
    assert (tmp_path / "a").read_bytes() == before


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "header: tensors overlap or leave a gap at byte "),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "tensors of 4 bytes, the file has 8 for them"),
        ({"a": entry(shape=(3,))}, "tensor 'a': 8 bytes for shape (3,) of F32"),
        ({"a": entry(shape=(-2,))}, "tensor 'a': a shape that is no list of sizes"),
        ({"a": entry(shape=(2.0,))}, "tensor 'a': a shape that is no list of sizes"),
        ({"a": entry(shape=(True, 2))}, "tensor 'a': a shape that is no list of sizes"),
        ({"a": entry(shape=[1] * 65)}, "tensor 'a': a shape that is no list of sizes"),
        ({"a": entry(shape=(2**62, 4))}, f"tensor 'a': 8 bytes for shape ({2**62}, 4) of F32"),
        ({"a": entry(offsets=(8, 0))}, "tensor 'a': data_offsets that are no start and end"),
        ({"a": entry(offsets=(0,))}, "tensor 'a': data_offsets that are no start and end"),
        ({"a": entry(dtype="F4")}, "tensor 'a': dtype 'F4' is not read"),
        ({"a": entry(dtype=["F32"])}, "tensor 'a': dtype <class 'list'> is not read"),
        ({"a": entry(more=1)}, "tensor 'a': expected dtype, shape and data_offsets"),
        ({"a": None}, "tensor 'a': expected dtype, shape and data_offsets"),
        ({"a\n" * 99: None}, "tensor '" + 40 * "a\\n" + "': expected dtype, shape and data_offsets"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "header: __metadata__ that are no texts by name"),
        ([], "header: no names of tensors"),
        (b'{"a":{},"a":{}}', "header: 'a' is there twice"),
        (b"[" * 100_000, "header: "),
        (b"\xff", "header: "),
        (b"{", "header: "),
    ],
)  # fmt: skip
def test_headers_that_do_not_do(tmp_path: Path, header: Any, message: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}") as caught:
        read_safetensors(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("length", [100, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=rf"^header of {length} bytes in a file of 10$"):
        read_safetensors(path)
