"""Fashion-MNIST as 32x32 images, read from the files on disk (IDX format, gzip or plain)."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

DEBIAN_PATH = Path("/usr/share/datasets/fashion-mnist")
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzip-compressed or plain.

    Raises:
        ValueError: the file is not an IDX file of unsigned bytes, or is shorter than its header says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            data = stream.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{path}: {body.size} bytes of data, its header says {int(np.prod(shape))}")
    return body.reshape(shape)


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
    """
    if split not in _FILES:
        raise ValueError(f"split {split!r}: allowed are {', '.join(_FILES)}")
    folder = find_fashion_mnist(root)
    arrays = []
    for name in _FILES[split]:
        plain = folder / name
        arrays.append(read_idx(plain if plain.is_file() else folder / f"{name}.gz"))
    images, labels = arrays
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise ValueError(f"{folder}: images of shape {images.shape} and {len(labels)} labels, expected (N, 28, 28) and N")
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels.astype(np.int64)
