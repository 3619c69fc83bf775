"""Write images: uint8 conversion, PNG files named after their seed, contact sheets, ADM's npz."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from qncd.io.files import whole_file

_SMALL = 64  # images up to this side are shown twice as large in a contact sheet
_GAP = 2  # pixels between the images of a block
_MARGIN = 12  # pixels around and between blocks
_FONT_SIZE = 16


class NotFiniteError(ValueError):
    """Images hold NaN."""


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images as bytes: floor(127.5 * (x + 1) + 0.5), clamped to 0..255.

    This rounds to the nearest of 256 levels, halves upwards, as torchvision's `save_image` does, so -1 is 0, 0 is 128 and
    1 is 255; truncating (as `astype` alone does) would darken the images by half a level.

    Args:
        x: float (N, C, H, W) in [-1, 1]; values outside are clamped.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        NotFiniteError: x holds NaN.
        ValueError: x is not such a batch.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images of shape {tuple(x.shape)} and dtype {x.dtype}, expected float (N, C, H, W)")
    if torch.isnan(x).any():
        raise NotFiniteError("images hold NaN")
    levels = (127.5 * (x.detach().float() + 1) + 0.5).floor().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def image_name(index: int, seed: int) -> str:
    """The file name of an image, e.g. 000012_seed1246.png: names sort by index and tell how to make the image again."""
    return f"{index:06d}_seed{seed}.png"


def save_png(array: np.ndarray, path: str | Path) -> None:
    """Write uint8 (H, W, C), C = 1 (kept grayscale) or 3, so that the file is there whole or not at all.

    Raises:
        ValueError: the array is not such an image, or the file cannot be written.
    """
    save_image(_as_pil(array), path)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image as PNG, whole or not at all. Raises ValueError where it cannot be written."""
    with whole_file(path) as part:
        image.save(part, format="PNG")


def save_npz(images: Iterable[np.ndarray], path: str | Path, count: int | None = None) -> None:
    """Write images as ADM's sample batch: `arr_0` uint8 (N, H, W, 3), grey repeated; whole or not at all.

    The file is the one that `np.savez` writes of the whole array, but one image at a time is held.

    Args:
        images: uint8 (H, W, 1 or 3) each, all of one size, such as an array (N, H, W, C).
        count: how many there are; by default `len(images)`.

    Raises:
        ValueError: an image is none of that kind, there are none or not as many as said, or the file cannot be written.
    """
    count = len(images) if count is None and isinstance(images, Sized) else count
    if not count:
        raise ValueError(f"{path}: {count} images, expected 1 or more")
    written, shape = 0, (0, 0, 0)
    with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for image in images:
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                    raise ValueError(f"an image of shape {image.shape} and dtype {image.dtype}, expected uint8 (H, W, 1 or 3)")
                image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
                if not written:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                if image.shape != shape:
                    raise ValueError(f"{path}: image {written} is {_sides(image.shape)} pixels, those before it {_sides(shape)}")
                stream.write(np.ascontiguousarray(image).data)
                written += 1
        if written != count:
            raise ValueError(f"{path}: {written} images, {count} were announced")


def _sides(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def contact_sheet(rows_of_images: Sequence[np.ndarray], labels: Sequence[str], columns: int) -> Image.Image:
    """Labelled blocks side by side, the same place in each block for the same index, to be compared by eye.

    Args:
        rows_of_images: one array uint8 (N, H, W, 1 or 3) a block, e.g. full precision and quantized, same seeds.
        labels: one text a block, written above it.
        columns: images in a row of a block.

    Returns:
        An RGB image; images up to 64 pixels are enlarged twice, without smoothing.

    Raises:
        ValueError: numbers of blocks and labels differ, a block is empty, or columns < 1.
    """
    if not rows_of_images or len(rows_of_images) != len(labels):
        raise ValueError(f"{len(rows_of_images)} blocks of images and {len(labels)} labels, expected one label for each block")
    if columns < 1:
        raise ValueError(f"columns {columns}: expected 1 or more")
    grids = [_grid(block, columns) for block in rows_of_images]
    font = ImageFont.load_default(_FONT_SIZE)
    line = 2 * _FONT_SIZE
    widths = [max(grid.width, int(font.getlength(label)) + 1) for grid, label in zip(grids, labels, strict=True)]
    size = sum(widths) + _MARGIN * (len(grids) + 1), max(grid.height for grid in grids) + line + 2 * _MARGIN
    sheet = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(sheet), _MARGIN
    for grid, label, width in zip(grids, labels, widths, strict=True):
        draw.text((left, _MARGIN), label, fill="black", font=font)
        sheet.paste(grid, (left, _MARGIN + line))
        left += width + _MARGIN
    return sheet


def _grid(images: np.ndarray, columns: int) -> Image.Image:
    if images.ndim != 4 or not len(images):
        raise ValueError(f"a block of images of shape {images.shape}, expected (N, H, W, C) with N > 0")
    height, width = images.shape[1:3]
    scale = 2 if max(height, width) <= _SMALL else 1
    cell_width, cell_height = scale * width + _GAP, scale * height + _GAP
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell_width - _GAP, rows * cell_height - _GAP), "white")
    for index, array in enumerate(images):
        tile = _as_pil(array).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        grid.paste(tile, (index % columns * cell_width, index // columns * cell_height))
    return grid


def _as_pil(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"an image of shape {array.shape} and dtype {array.dtype}, expected uint8 (H, W, 1 or 3)")
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
