"""Where images and statistics come from: folders, ADM's .npz batches, files of statistics, data sets by name."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from qncd.io.datasets import DATASETS, load_conditioned
from qncd.io.npz import array_header, array_names, open_array, read_array
from qncd.metrics.networks.weights import file_digest
from qncd.metrics.report.image_files import LARGEST, SUFFIXES, match_channels, read_image, read_size
from qncd.metrics.report.image_listing import list_images
from qncd.metrics.statistics.saved_statistics import SavedStatistics

FASHION_MNIST = "fashion_mnist"
FASHION_MNIST_STATISTICS = Path(__file__).parents[2] / "assets" / "fashion_mnist_statistics.npz"
DATASET_NAMES = tuple(f"{name.lower()}{split}" for name in DATASETS for split in ("", "_train", "_test"))
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

Loader = Callable[[], np.ndarray]  # one image, uint8 (H, W, C), read when it is called


@dataclass(frozen=True)
class ImageFolder:
    """Image files below a folder, at any depth, sorted by their path; files and folders that start with a dot are left out.

    Links are followed, but every folder is read once, whatever leads to it.

    Attributes:
        path: the folder.
        names: paths relative to it, with forward slashes.
        height, width: pixels of the first image.
        other_size: in words, the first image of another size; None where all have the same.
        left_out: in words, which files there are beside the images; None where there are none.
    """

    path: Path
    names: tuple[str, ...]
    height: int
    width: int
    other_size: str | None = None
    left_out: str | None = None

    @classmethod
    def open(cls, path: Path) -> ImageFolder:
        """List the files and judge what their headers say.

        Raises:
            ValueError: no images, a folder that cannot be listed, or an image file that `read_size` refuses.
        """
        names, left_out = list_images(path)
        if not names:
            also = f"; {left_out}" if left_out else ""
            raise ValueError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder or below it{also}")
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = list(pool.map(read_size, (path / name for name in names)))
        first = sizes[0]
        other = next((i for i, size in enumerate(sizes) if size != first), None)
        words = None
        if other is not None:
            words = f"{names[0]} is {first[1]}x{first[0]}, {names[other]} is {sizes[other][1]}x{sizes[other][0]}"
        return cls(path, tuple(names), *first, words, left_out)

    @property
    def count(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 of what the files hold, in their order; names do not matter."""
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(file_digest, (self.path / name for name in self.names))
            return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def loaders(self, batch_size: int, channels: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Loader]]:
        """Batches of functions that read one image each, with `channels` channels.

        Args:
            batch_size: images in a batch; the last one may be shorter.
            channels: 1 or 3.
            shard: (r, n): the batches r, r + n, r + 2 n, ... only.
        """

        def load(name: str) -> np.ndarray:
            return match_channels(read_image(self.path / name), channels, str(self.path / name))

        for start in range(shard[0] * batch_size, self.count, shard[1] * batch_size):
            yield [partial(load, name) for name in self.names[start : start + batch_size]]


@dataclass(frozen=True)
class ImageArray:
    """The images `arr_0` of a .npz file, as ADM's samplers write them; read in batches, never as a whole.

    Attributes:
        path: the file.
        count, height, width: of arr_0, uint8 (count, height, width, 1 or 3).
    """

    path: Path
    count: int
    height: int
    width: int
    other_size: None = None

    @classmethod
    def open(cls, path: Path) -> ImageArray:
        """Read the header of arr_0.

        Raises:
            ValueError: arr_0 is not uint8 NHWC with 1 or 3 channels, is empty, or has another length than its header says.
        """
        header = array_header(path, "arr_0")
        shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"{path}: arr_0 is {header.dtype} {shape}, expected uint8 (N, H, W, 3) or (N, H, W, 1)")
        if shape[1] * shape[2] > LARGEST:
            raise ValueError(f"{path}: images of {shape[2]}x{shape[1]} pixels, at most {LARGEST} in all are read")
        return cls(path, shape[0], shape[1], shape[2])

    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.path)

    def loaders(self, batch_size: int, channels: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Loader]]:
        """Batches of functions that give one image each; see `ImageFolder.loaders`."""
        with open_array(self.path, "arr_0") as (header, stream):
            # Fortran's order scatters an image over the whole file, so that it has to be in memory.
            whole = read_array(self.path, "arr_0") if header.fortran else None
            for number, start in enumerate(range(0, self.count, batch_size)):
                wanted = (min(batch_size, self.count - start), *header.shape[1:])
                if whole is None:
                    data = stream.read(math.prod(wanted))
                if number % shard[1] != shard[0]:
                    continue
                if whole is None:
                    images = np.frombuffer(bytearray(data), np.uint8).reshape(wanted)
                else:
                    images = np.ascontiguousarray(whole[start : start + batch_size])
                label = f"{self.path} (images {start} to {start + wanted[0] - 1})"
                yield [partial(match_channels, image, channels, label) for image in images]


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """The images of a data set that is known by name, held in memory.

    Attributes:
        path: the name, where other sources have their file.
        images: uint8 (N, H, W, C).
    """

    path: Path
    images: np.ndarray = field(repr=False)
    other_size: None = None

    @classmethod
    def open(cls, name: str) -> DatasetImages:
        """`NAME`, `NAME_train` (the same) or `NAME_test`.

        Raises:
            ValueError, FileNotFoundError: see `load_conditioned`.
        """
        split = "test" if name.endswith("_test") else "train"
        images, _ = load_conditioned(name.removesuffix(f"_{split}").upper(), split)
        return cls(Path(name), np.ascontiguousarray(images))

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    def digest(self) -> str:
        """SHA-256 of the pixels and their shape."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(self.images.data)
        return digest.hexdigest()

    def loaders(self, batch_size: int, channels: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Loader]]:
        """Batches of functions that give one image each; see `ImageFolder.loaders`."""
        for start in range(shard[0] * batch_size, self.count, shard[1] * batch_size):
            batch = self.images[start : start + batch_size]
            yield [partial(match_channels, image, channels, str(self.path)) for image in batch]


ImageSource = ImageFolder | ImageArray | DatasetImages
Source = ImageSource | SavedStatistics


def open_source(path: str | Path, prefer_images: bool = False, network: str | None = FASHION_MNIST) -> Source:
    """The source that a command line argument names.

    Args:
        path: a folder of images, a .npz with images (arr_0) or statistics (mu, sigma), or a name of DATASET_NAMES (write
            ./fashion_mnist for a folder of that name).
        prefer_images: which to take from a .npz that has both, as ADM's reference batches do.
        network: the features in use; for those of Fashion-MNIST the name `fashion_mnist` means the bundled statistics.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds nothing usable.
    """
    if str(path) == FASHION_MNIST and network == FASHION_MNIST:
        return SavedStatistics.open(FASHION_MNIST_STATISTICS)
    if str(path) in DATASET_NAMES:
        return DatasetImages.open(str(path))
    path = Path(path)
    if path.is_dir():
        return ImageFolder.open(path)
    try:
        members = array_names(path, "a folder of images or a .npz file")
    except FileNotFoundError:
        names = ", ".join(DATASET_NAMES)
        raise FileNotFoundError(f"{path}: no such file or folder, and no data set of that name (known: {names})") from None
    if "arr_0" in members and (prefer_images or "mu" not in members):
        return ImageArray.open(path)
    if "mu" in members:
        return SavedStatistics.open(path)
    raise ValueError(
        f"{path}: no images (arr_0) and no statistics (mu, sigma) in it, but {', '.join(sorted(members)) or 'nothing'}"
    )
