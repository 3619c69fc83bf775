"""Where images and statistics come from: folders, ADM's .npz batches, files of statistics, the name fashion_mnist."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from qncd.metrics.statistics import FeatureStatistics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FASHION_MNIST = "fashion_mnist"
FASHION_MNIST_STATISTICS = Path(__file__).parents[1] / "assets" / "fashion_mnist_statistics.npz"
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError)
_THREADS = min(8, os.cpu_count() or 1)


def match_channels(images: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Grey images repeated to RGB, or RGB images whose channels are equal reduced to grey.

    Args:
        images: uint8 (..., C) with C of 1 or 3.
        channels: 1 or 3.
        name: what the images are called in the error.

    Raises:
        ValueError: colour images where grey ones are needed.
    """
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    if not (images == images[..., :1]).all():
        raise ValueError(f"{name}: a colour image, these features take grey ones")
    return images[..., :1]


def read_image(path: Path) -> np.ndarray:
    """One image file as uint8 (H, W, C), C = 1 for grey and 3 for RGB; an alpha channel has to be opaque.

    Raises:
        ValueError: the file is damaged, is not 8-bit, or is transparent somewhere.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode, transparent = image.mode, image.has_transparency_data
            if mode not in _MODES:
                raise ValueError(f"{path}: pixels of mode {mode}, only 8-bit images are read")
            if transparent:
                rgba = np.asarray(image.convert("RGBA"))
            else:
                grey = mode in ("1", "L")
                return np.array(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, 1 if grey else 3)
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else _unreadable(path, error) from None
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, EOFError ... depending on the damage
        raise _unreadable(path, error) from None
    if rgba[..., 3].min() < 255:
        raise ValueError(f"{path}: transparent pixels, put the image on a background first")
    return np.ascontiguousarray(rgba[..., :3])


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: cannot be read as an image: {' '.join(str(error).split()) or type(error).__name__}")


def _read_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:  # the header only
            return image.height, image.width
    except Exception as error:  # see read_image
        raise _unreadable(path, error) from None


@dataclass(frozen=True)
class ImageFolder:
    """Image files below a folder, at any depth, sorted by their path; files and folders that start with a dot are left out.

    Attributes:
        path: the folder.
        names: paths relative to it, with forward slashes.
        height, width: pixels, the same for all files.
    """

    path: Path
    names: tuple[str, ...]
    height: int
    width: int

    @classmethod
    def open(cls, path: Path) -> ImageFolder:
        """List the files and compare the sizes in their headers.

        Raises:
            ValueError: no images, a file whose header cannot be read, or images of more than one size.
        """
        names = []
        for folder, subfolders, files in os.walk(path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            here = Path(folder).relative_to(path)
            names += [(here / name).as_posix() for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if not names:
            raise ValueError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder or below it")
        names.sort()
        with ThreadPoolExecutor(_THREADS) as pool:
            sizes = list(pool.map(_read_size, (path / name for name in names)))
        for name, size in zip(names, sizes, strict=True):
            if size != sizes[0]:
                raise ValueError(
                    f"{path}: images of more than one size: {names[0]} is {sizes[0][1]}x{sizes[0][0]}, "
                    f"{name} is {size[1]}x{size[0]}"
                )
        return cls(path, tuple(names), *sizes[0])

    @property
    def count(self) -> int:
        return len(self.names)

    def batches(self, batch_size: int, channels: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 (batch_size, H, W, channels); the last batch may be shorter."""

        def read(name: str) -> np.ndarray:
            return match_channels(read_image(self.path / name), channels, str(self.path / name))

        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(self.names), batch_size):
                yield np.stack(list(pool.map(read, self.names[start : start + batch_size])))


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

    @classmethod
    def open(cls, path: Path) -> ImageArray:
        """Read the header of arr_0.

        Raises:
            ValueError: arr_0 is not uint8 NHWC with 1 or 3 channels in C order, or is empty.
        """
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
                shape, fortran, dtype = _read_npy_header(stream)
        except (ValueError, *_ARCHIVE_ERRORS) as error:
            raise ValueError(f"{path}: arr_0 is damaged: {error}") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or 0 in shape:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) or (N, H, W, 1)")
        return cls(path, shape[0], shape[1], shape[2])

    def batches(self, batch_size: int, channels: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 (batch_size, H, W, channels); the last batch may be shorter."""
        with zipfile.ZipFile(self.path) as archive:
            size = archive.getinfo("arr_0.npy").file_size
            with archive.open("arr_0.npy") as stream:
                shape, _, _ = _read_npy_header(stream)
                if size - stream.tell() != int(np.prod(shape)):
                    raise ValueError(f"{self.path}: arr_0 has another length than its header says")
                for start in range(0, self.count, batch_size):
                    wanted = (min(batch_size, self.count - start), *shape[1:])
                    try:
                        data = stream.read(int(np.prod(wanted)))
                    except _ARCHIVE_ERRORS as error:
                        raise ValueError(f"{self.path}: arr_0 is damaged: {error}") from None
                    images = np.frombuffer(bytearray(data), np.uint8).reshape(wanted)
                    yield match_channels(images, channels, f"{self.path} (images {start} to {start + wanted[0] - 1})")


@dataclass(frozen=True, eq=False)
class SavedStatistics:
    """Statistics in a .npz file: mu and sigma under ADM's and pytorch-fid's names, mu_s and sigma_s for sFID.

    Attributes:
        path: the file.
        features: statistics for FID.
        spatial: statistics for sFID, None where the file has none.
        network: name of the feature extractor, None where the file does not say it.
    """

    path: Path
    features: FeatureStatistics
    spatial: FeatureStatistics | None = None
    network: str | None = None

    @property
    def count(self) -> int | None:
        return self.features.count

    @classmethod
    def open(cls, path: Path) -> SavedStatistics:
        """Read the file.

        Raises:
            ValueError: arrays are missing, do not belong together, or hold NaN.
        """
        try:
            with np.load(path) as file:
                wanted = ("mu", "sigma", "mu_s", "sigma_s", "count", "network")
                arrays = {name: file[name] for name in wanted if name in file.files}
            count = int(arrays["count"]) if "count" in arrays else None
            features = FeatureStatistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64), count)
            spatial = None
            if "mu_s" in arrays:
                spatial = FeatureStatistics(arrays["mu_s"].astype(np.float64), arrays["sigma_s"].astype(np.float64), count)
        except KeyError as error:
            raise ValueError(f"{path}: statistics without the array {error}") from None
        except (ValueError, TypeError, *_ARCHIVE_ERRORS) as error:
            raise ValueError(f"{path}: no usable statistics: {error}") from None
        return cls(path, features, spatial, str(arrays["network"]) if "network" in arrays else None)

    def save(self, path: Path) -> None:
        """Write the statistics under the names that `open` reads."""
        arrays: dict[str, np.ndarray] = {"mu": self.features.mu, "sigma": self.features.sigma}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu, "sigma_s": self.spatial.sigma}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        if self.network is not None:
            arrays["network"] = np.array(self.network)
        savez: Callable[..., None] = np.savez_compressed  # as typed by numpy, its own options would forbid ** of arrays
        with path.open("wb") as stream:  # a stream, because savez appends .npz to other names
            savez(stream, **arrays)


ImageSource = ImageFolder | ImageArray
Source = ImageSource | SavedStatistics


def open_source(path: str | Path, prefer_images: bool = False) -> Source:
    """The source that a command line argument names.

    Args:
        path: a folder of images, a .npz with images (arr_0) or statistics (mu, sigma), or the name `fashion_mnist`: the
            statistics in the box (write ./fashion_mnist for a folder of that name).
        prefer_images: which to take from a .npz that has both, as ADM's reference batches do.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds nothing usable.
    """
    if str(path) == FASHION_MNIST:
        return SavedStatistics.open(FASHION_MNIST_STATISTICS)
    path = Path(path)
    if path.is_dir():
        return ImageFolder.open(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
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
