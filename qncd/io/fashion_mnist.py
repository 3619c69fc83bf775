"""Fashion-MNIST as 32x32 images, read from the files on disk (IDX format, gzip or plain)."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from qncd.io.files import reading, regular_file

DEBIAN_PATH = Path("/usr/share/datasets/fashion-mnist")
_LARGEST = 1 << 28  # bytes of an IDX file; Fashion-MNIST's largest has 47 million
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzip-compressed or plain.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an IDX file of unsigned bytes, or has another length than its header says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with reading(path, "an IDX file"), opener(regular_file(path), "rb") as stream:
        start = stream.read(4)
        if len(start) < 4 or start[:3] != b"\x00\x00\x08":
            raise ValueError(f"{path}: not an IDX file of unsigned bytes")
        rank = start[3]
        shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
        size = math.prod(shape)
        if size > _LARGEST:
            raise ValueError(f"{path}: {size} bytes by its header, at most {_LARGEST} are read")
        data = stream.read(size + 1)  # one more, to see that there is none
        if len(data) != size:
            raise ValueError(f"{path}: {'more' if len(data) > size else len(data)} bytes of data, its header says {size}")
        return np.frombuffer(data, np.uint8).reshape(shape)


def find_fashion_mnist(root: str | Path | None = None, download: bool = True) -> Path:
    """The folder with the four IDX files: `root`, Debian's package, or torchvision's download.

    Raises:
        FileNotFoundError: the files are nowhere and could not be downloaded.
    """
    cache = Path.home() / ".cache" / "qncd" / "data"
    candidates = [Path(root), Path(root) / "FashionMNIST" / "raw"] if root else [DEBIAN_PATH]
    candidates.append(cache / "FashionMNIST" / "raw")
    for folder in candidates:
        if any((folder / (_FILES["train"][0] + suffix)).is_file() for suffix in ("", ".gz")):
            return folder
    if download and root is None:
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(cache), download=True)
            return cache / "FashionMNIST" / "raw"
        except (OSError, RuntimeError):
            pass
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {', '.join(map(str, candidates))}: on Debian `apt-get install dataset-fashion-mnist`, "
        "elsewhere put the four idx files of the data set into one of these folders"
    )


def load_fashion_mnist(split: str = "train", root: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST padded with black from 28x28 to 32x32.

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        root: a folder with the IDX files; by default Debian's `dataset-fashion-mnist`, then a download.

    Returns:
        images uint8 (N, 32, 32, 1) and labels int64 (N,).

    Raises:
        FileNotFoundError: the files are nowhere and could not be downloaded.
        ValueError: an unknown split, or files that `read_idx` refuses or that do not belong together.
    """
    if split not in _FILES:
        raise ValueError(f"split {split!r}: allowed are {', '.join(_FILES)}")
    folder = find_fashion_mnist(root)
    arrays = []
    for name in _FILES[split]:
        plain = folder / name
        arrays.append(read_idx(plain if plain.is_file() else folder / f"{name}.gz"))
    images, labels = arrays
    if images.shape[1:] != (28, 28) or not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: {_FILES[split][0]} has the shape {images.shape} and {_FILES[split][1]} {labels.shape}, "
            "expected (N, 28, 28) and (N,)"
        )
    if labels.max() >= len(CLASS_NAMES):
        allowed = f"0 to {len(CLASS_NAMES) - 1}"
        raise ValueError(f"{folder}: {_FILES[split][1]} holds the label {labels.max()}, allowed are {allowed}")
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels.astype(np.int64)
