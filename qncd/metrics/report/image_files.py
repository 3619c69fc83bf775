"""One image file as bytes: strict reading, so that no damaged, transparent, animated or 16-bit file slips into a figure.

As in pytorch-fid, clean-fid and torch-fidelity, what counts is what the file holds, whatever its suffix, and the orientation
that a camera noted in EXIF is not applied.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from qncd.io.files import reading, regular_file

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # those of pytorch-fid
LARGEST = Image.MAX_IMAGE_PIXELS or 1 << 26  # pixels; beyond them PIL suspects a decompression bomb
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL knows more, of which some start other programs
_DEEP = re.compile(r";(16[BLNS]|32)")  # of PIL's raw modes: 16 and more bits a channel, which it cuts to 8 in colour
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and judged, its pixels not decoded.

    Raises:
        FileNotFoundError, ValueError: see `read_image`.
    """
    with reading(path, "an image"), Image.open(regular_file(path), formats=_FORMATS) as image:
        if image.width * image.height > LARGEST:
            raise ValueError(f"{path}: {image.width}x{image.height} pixels, at most {LARGEST} in all are read")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo, and a preview or a map behind it
            raise ValueError(f"{path}: several frames or pages, only single images are read")
        if image.mode not in _MODES:
            raise ValueError(f"{path}: pixels of mode {image.mode}, only 8-bit images are read")
        if _is_deep(image):
            raise ValueError(f"{path}: more than 8 bits a channel, only 8-bit images are read")
        yield image


def _is_deep(image: Image.Image) -> bool:
    """Whether PIL will drop bits of the file to make 8-bit colours."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    for tile in image.tile if isinstance(image, ImageFile.ImageFile) else ():
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if image.format == "PPM" and tile[0].startswith("ppm"):
            return args[-1] > 255  # the largest value
        if isinstance(args[0], str) and _DEEP.search(args[0]):
            return True
    return False


def read_image(path: Path) -> np.ndarray:
    """One image file as uint8 (H, W, C), C = 1 for grey and 3 for RGB; an alpha channel has to be opaque.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no regular one, damaged, too large, animated, not 8-bit, or transparent somewhere.
    """
    with _opened(path) as image:
        image.load()
        if not image.has_transparency_data:
            grey = image.mode in ("1", "L")
            return np.array(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, 1 if grey else 3)
        rgba = np.asarray(image.convert("RGBA"))
    if rgba[..., 3].min() < 255:
        raise ValueError(f"{path}: transparent pixels, put the image on a background first")
    return np.ascontiguousarray(rgba[..., :3])


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        FileNotFoundError, ValueError: see `read_image`; pixels that are damaged or transparent are not found here.
    """
    with _opened(path) as image:
        return image.height, image.width
