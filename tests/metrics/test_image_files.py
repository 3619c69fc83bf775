"""Single image files: read as pytorch-fid reads them, or refused in one line before their pixels are decoded."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qncd.metrics.report.image_files import SUFFIXES, read_image, read_size

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
FRAME = Image.fromarray(GREY).convert("RGB")
OTHER = Image.fromarray(255 - GREY).convert("RGB")


def png(width: int, height: int, depth: int, colour: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_png(colour: int, channels: int) -> bytes:
    return png(8, 8, 16, colour, (b"\0" + bytes(8 * 2 * channels)) * 8)


def deep_tiff() -> bytes:
    """RGB of 16 bits a channel, which PIL does not write."""
    end = 8 + 2 + 10 * 12 + 4
    tags = [
        (256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 3, end), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, end + 6), (277, 3, 1, 3),
        (278, 4, 1, 8), (279, 4, 1, 384), (284, 3, 1, 1),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, 10) + entries + struct.pack("<I3H", 0, 16, 16, 16) + bytes(384)


def test_suffixes_are_those_of_pytorch_fid() -> None:
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    assert set(SUFFIXES) == {f".{name}" for name in fid_score.IMAGE_EXTENSIONS}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_read_as_pytorch_fid_reads_it(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(GREY) if suffix == ".pgm" else FRAME
    image.save(tmp_path / f"a{suffix.upper()}")
    found, expected = read_image(tmp_path / f"a{suffix.upper()}"), np.asarray(Image.open(tmp_path / f"a{suffix.upper()}"))
    np.testing.assert_array_equal(found, expected.reshape(found.shape))
    assert read_size(tmp_path / f"a{suffix.upper()}") == (8, 8)


def test_what_the_file_holds_counts(tmp_path: Path) -> None:
    """Not its suffix, not the orientation that a camera noted, not the preview behind a photo; inks become colours."""
    FRAME.save(tmp_path / "a.png", format="BMP")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(FRAME))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 8)).save(tmp_path / "a.jpg", exif=turned)
    assert read_image(tmp_path / "a.jpg").shape == (8, 4, 3) and read_size(tmp_path / "a.jpg") == (8, 4)
    FRAME.save(tmp_path / "b.jpg", format="MPO", save_all=True, append_images=[OTHER.copy()])
    with Image.open(tmp_path / "b.jpg") as photo:
        assert photo.format == "MPO"
        np.testing.assert_array_equal(read_image(tmp_path / "b.jpg"), np.asarray(photo))
    FRAME.convert("CMYK").save(tmp_path / "c.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif"), np.asarray(Image.open(tmp_path / "c.tif").convert("RGB")))


DEEP, BAD, FRAMES = "more than 8 bits a channel, only 8-bit", "not an image, or damaged", "several frames or pages, only single"
CONTENTS: list[tuple[str, bytes, str]] = [
    ("grey.png", deep_png(0, 1), "pixels of mode I;16, only 8-bit images are read"),
    ("colour.png", deep_png(2, 3), DEEP),
    ("grey_alpha.png", deep_png(4, 2), DEEP),
    ("colour_alpha.png", deep_png(6, 4), DEEP),
    ("colour.tiff", deep_tiff(), DEEP),
    ("colour.ppm", b"P6 8 8 65535\n" + bytes(384), DEEP),
    ("ten.ppm", b"P6 8 8 1023\n" + bytes(384), DEEP),
    ("plain.ppm", b"P3 8 8 1023\n" + b"0 " * 192, DEEP),
    ("grey.pgm", b"P5 8 8 65535\n" + bytes(128), "pixels of mode I, only 8-bit images are read"),
    ("huge.png", png(60000, 60000, 8, 0), r"exceeds limit of \d+ pixels"),
    ("large.png", png(10000, 10000, 8, 0), "10000x10000 pixels, at most 89478485 in all are read"),
    ("flat.png", png(0, 8, 8, 0), BAD),
    ("empty.png", b"", BAD),
    ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", BAD),
]


@pytest.mark.parametrize(("name", "content", "message"), CONTENTS, ids=[name for name, _, _ in CONTENTS])
@pytest.mark.parametrize("read", [read_image, read_size])
def test_what_is_refused_by_its_header(
    tmp_path: Path, name: str, content: bytes, message: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "name"), [("GIF", "a.png"), ("PNG", "a.png"), ("WEBP", "a.webp"), ("TIFF", "a.tif")])
def test_several_frames_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    FRAME.save(tmp_path / name, format=kind, save_all=True, append_images=[OTHER.copy()])
    with pytest.raises(ValueError, match=FRAMES):
        read_size(tmp_path / name)
    FRAME.save(tmp_path / name, format=kind)
    assert read_size(tmp_path / name) == (8, 8)


def test_few_levels_are_spread_as_pil_does(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 15\n" + bytes(range(16)) * 4)
    np.testing.assert_array_equal(read_image(tmp_path / "a.pgm").reshape(4, 16), np.tile(np.arange(16) * 17, (4, 1)))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))
        for name in ("pipe", "zero", "socket"):
            with pytest.raises(ValueError, match=f"{name}.png: a pipe, a device or a socket, expected a file"):
                read_size(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"loop\.png: cannot be read: Too many levels of symbolic links"):
        read_image(tmp_path / "loop.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file"):
        read_image(tmp_path / "nowhere.png")
