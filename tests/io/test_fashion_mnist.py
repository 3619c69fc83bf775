"""IDX files: read, or refused by their header in one line."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from qncd.io.datasets import load_conditioned
from qncd.io.fashion_mnist import load_fashion_mnist, read_idx


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def folder_of(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def test_plain_and_compressed_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    folder = folder_of(tmp_path / "raw", images, np.arange(5, dtype=np.uint8))
    padded, labels = load_fashion_mnist("train", folder)
    assert padded.shape == (5, 32, 32, 1) and np.array_equal(padded[:, 2:-2, 2:-2, 0], images)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert load_conditioned("FASHION_MNIST", "train", 2, folder)[1] == [0, 1]
    with pytest.raises(ValueError, match="count 0: allowed are whole numbers, 1 or more"):
        load_conditioned("FASHION_MNIST", "train", 0, folder)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes"),
        (b"\x00\x00\x0d\x01" + struct.pack(">I", 1) + bytes(4), "not an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\xff\x00", "not an IDX file, or damaged"),
        (b"\x00\x00\x08\x02" + struct.pack(">2I", 2, 3) + bytes(5), "5 bytes of data, its header says 6"),
        (b"\x00\x00\x08\x02" + struct.pack(">2I", 2, 3) + bytes(7), "more bytes of data, its header says 6"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "79228162458924105385300197375 bytes by its header, at most 268435456 are read"),
    ],
)
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=f"{path.name}: {message}"):
        read_idx(path)


def test_damaged_compression(tmp_path: Path) -> None:
    path, whole = tmp_path / "images.gz", gzip.compress(idx(np.arange(200, dtype=np.uint8)))
    for content in (whole[:-20], whole[:60] + b"\xff\xff\xff" + whole[63:], idx(np.arange(3, dtype=np.uint8))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"images.gz: not an IDX file, or damaged"):
            read_idx(path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((3, 28, 28), [1, 2], r"train-images-idx3-ubyte has the shape \(3, 28, 28\) and train-labels-idx1-ubyte \(2,\)"),
        ((3, 32, 32), [1, 2, 3], r"expected \(N, 28, 28\) and \(N,\)"),
        ((0, 28, 28), [], r"has the shape \(0, 28, 28\)"),
        ((2, 28, 28), [1, 10], "train-labels-idx1-ubyte holds the label 10, allowed are 0 to 9"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, images: tuple[int, ...], labels: list[int], message: str) -> None:
    folder = folder_of(tmp_path / "raw", np.zeros(images, np.uint8), np.array(labels, np.uint8))
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist("train", folder)
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte.gz: no such file"):
        load_fashion_mnist("train", folder)
