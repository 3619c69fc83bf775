"""Where images and statistics come from: folders, ADM's .npz batches, files of statistics, data sets by name."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from qncd.io.datasets import DATASETS, load_conditioned
from qncd.metrics.networks.weights import file_digest
from qncd.metrics.report.image_files import SUFFIXES, match_channels, read_image, read_size
from qncd.metrics.statistics.saved_statistics import ARCHIVE_ERRORS, SavedStatistics

FASHION_MNIST = "fashion_mnist"
FASHION_MNIST_STATISTICS = Path(__file__).parents[2] / "assets" / "fashion_mnist_statistics.npz"
DATASET_NAMES = tuple(f"{name.lower()}{split}" for name in DATASETS for split in ("", "_train", "_test"))
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

Loader = Callable[[], np.ndarray]  # one image, uint8 (H, W, C), read when it is called


@dataclass(frozen=True)
class ImageFolder:
    """Image files below a folder, at any depth, sorted by their path; files and folders that start with a dot are left out.

    Attributes:
        path: the folder.
        names: paths relative to it, with forward slashes.
        height, width: pixels of the first image.
        other_size: in words, the first image of another size; None where all have the same.
    """

    path: Path
    names: tuple[str, ...]
    height: int
    width: int
    other_size: str | None = None

    @classmethod
    def open(cls, path: Path) -> ImageFolder:
        """List the files and compare the sizes in their headers.

        Raises:
            ValueError: no images, or a file whose header cannot be read.
        """
        names = []
        for folder, subfolders, files in os.walk(path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            here = Path(folder).relative_to(path)
            names += [(here / name).as_posix() for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if not names:
            raise ValueError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder or below it")
        names.sort()
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = list(pool.map(read_size, (path / name for name in names)))
        first = sizes[0]
        other = next((i for i, size in enumerate(sizes) if size != first), None)
        words = None
        if other is not None:
            words = f"{names[0]} is {first[1]}x{first[0]}, {names[other]} is {sizes[other][1]}x{sizes[other][0]}"
        return cls(path, tuple(names), *first, words)

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


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype of a .npy stream, which is left at the first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


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
            ValueError: arr_0 is not uint8 NHWC with 1 or 3 channels in C order, or is empty.
        """
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
                shape, fortran, dtype = _read_npy_header(stream)
        except (ValueError, *ARCHIVE_ERRORS) as error:
            raise ValueError(f"{path}: arr_0 is damaged: {error}") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or 0 in shape:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) or (N, H, W, 1)")
        return cls(path, shape[0], shape[1], shape[2])

    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.path)

    def loaders(self, batch_size: int, channels: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Loader]]:
        """Batches of functions that give one image each; see `ImageFolder.loaders`."""
        with zipfile.ZipFile(self.path) as archive:
            size = archive.getinfo("arr_0.npy").file_size
            with archive.open("arr_0.npy") as stream:
                shape, _, _ = _read_npy_header(stream)
                if size - stream.tell() != int(np.prod(shape)):
                    raise ValueError(f"{self.path}: arr_0 has another length than its header says")
                for number, start in enumerate(range(0, self.count, batch_size)):
                    wanted = (min(batch_size, self.count - start), *shape[1:])
                    try:
                        data = stream.read(int(np.prod(wanted)))
                    except ARCHIVE_ERRORS as error:
                        raise ValueError(f"{self.path}: arr_0 is damaged: {error}") from None
                    if number % shard[1] != shard[0]:
                        continue
                    images = np.frombuffer(bytearray(data), np.uint8).reshape(wanted)
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
    if not path.exists():
        names = ", ".join(DATASET_NAMES)
        raise FileNotFoundError(f"{path}: no such file or folder, and no data set of that name (known: {names})")
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        raise ValueError(f"{path}: neither a folder of images nor a .npz file") from None
    if "arr_0.npy" in members and (prefer_images or "mu.npy" not in members):
        return ImageArray.open(path)
    if "mu.npy" in members:
        return SavedStatistics.open(path)
    raise ValueError(
        f"{path}: no images (arr_0) and no statistics (mu, sigma) in it, but {', '.join(sorted(members)) or 'nothing'}"
    )
