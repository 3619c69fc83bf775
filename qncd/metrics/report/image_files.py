"""One image file as bytes: strict reading, so that no damaged, transparent or 16-bit file slips into a figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
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


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        ValueError: the header cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # see read_image
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: cannot be read as an image: {' '.join(str(error).split()) or type(error).__name__}")
