"""Images that flags name, for pipelines that begin with one or are guided by it."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from PIL import Image, ImageOps

from qncd.io.files import first_line
from qncd.metrics.report.image_files import SUFFIXES

DEEP = ("I", "I;16", "I;16L", "I;16B", "F")  # modes of 16 bits and more, which a conversion to RGB clips
FLAGS = ("image", "mask_image", "ip_adapter_image")


def pictures(path: Path | None, flag: str) -> list[Image.Image]:
    """The image of a file, or those of a folder by their names. Raises ValueError, FileNotFoundError where there is none."""
    if path is None:
        return []
    if not path.exists():
        raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--{flag} {path}: no image in this folder")
    return [picture(file, flag) for file in files]


def picture(file: Path, flag: str) -> Image.Image:
    """An image as diffusers' `load_image` has it: upright, by the orientation that a camera wrote beside it, and RGB; a mask L.

    Raises:
        ValueError: the file is no image, is too large, or has values that RGB would clip.
    """
    try:
        with Image.open(file) as image:
            if image.mode in DEEP:
                raise ValueError(f"--{flag} {file}: has {image.mode} pixels: allowed are images of 8 bits a channel")
            return ImageOps.exif_transpose(image).convert("L" if flag == "mask_image" else "RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"--{flag} {file}: not an image ({first_line(error)})") from None


def picture_hashes(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of the files of each flag that is given."""
    return {flag: _hash_of(path) for flag in FLAGS if (path := getattr(args, flag))}


def _hash_of(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
