"""Images on disk: rounding, names, whole files, contact sheets."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qncd.io.images import contact_sheet, image_name, save_npz, save_png, to_uint8


def test_bytes_round_to_the_nearest_level() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, torch.inf, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5]).reshape(1, 1, 2, 4)
    assert to_uint8(x).reshape(-1).tolist() == [0, 0, 128, 255, 255, 255, 0, 1]
    every = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(every / 127.5 - 1).reshape(-1), np.arange(256))


def test_bytes_agree_with_torchvision(tmp_path: Path) -> None:
    from torchvision.utils import save_image

    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    save_image(((x + 1) / 2).clamp(0, 1), tmp_path / "a.png")
    assert np.abs(np.asarray(Image.open(tmp_path / "a.png")).astype(int) - to_uint8(x)[0]).max() == 0


def test_layout_and_half_precision() -> None:
    x = torch.zeros(2, 3, 4, 5, dtype=torch.float16)
    x[0, 1, 2, 3] = 1
    images = to_uint8(x)
    assert images.shape == (2, 4, 5, 3)
    assert images.dtype == np.uint8
    assert images[0, 2, 3].tolist() == [128, 255, 128]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, 4), r"images of shape \(3, 4, 4\) and dtype torch.float32, expected float \(N, C, H, W\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "dtype torch.uint8"),
        (torch.full((1, 1, 2, 2), torch.nan), "images hold NaN"),
    ],
)
def test_other_tensors_are_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_uint8(x)


def test_names() -> None:
    assert image_name(12, 1246) == "000012_seed1246.png"


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_keeps_the_image(tmp_path: Path, channels: int, mode: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    save_png(array, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(np.zeros((2, 2, 1), np.uint8), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(_self: Image.Image, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ValueError, match=r"a\.png: cannot be written \(disk full\)"):
        save_png(np.ones((2, 2, 1), np.uint8), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an image of shape \(2, 2\) and dtype uint8, expected uint8 \(H, W, 1 or 3\)"):
        save_png(np.zeros((2, 2), np.uint8), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^an image of shape \(2, 2, 3\) and dtype float64, expected uint8 \(H, W, 1 or 3\)$"):
        save_npz(np.zeros((1, 2, 2, 3)), tmp_path / "a.npz")


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_adm_reads(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, channels), np.uint8)
    save_npz(images, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as data:
        assert data.files == ["arr_0"]
        assert data["arr_0"].dtype == np.uint8
        assert np.array_equal(data["arr_0"], np.broadcast_to(images, (4, 5, 5, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_npz_is_written_image_by_image_as_numpy_writes_the_whole(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), np.uint8)
    save_npz((image for image in images), tmp_path / "ours.npz", 5)
    np.savez(tmp_path / "numpy.npz", arr_0=images)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


def test_the_memory_of_an_npz_does_not_grow_with_its_images(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        save_npz((np.full((64, 64, 3), i % 256, np.uint8) for i in range(1000)), tmp_path / "samples.npz", 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "samples.npz").stat().st_size > 12_288_000 > 10 * peak


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ([(4, 6, 3), (6, 4, 3)], 2, "image 1 is 4x6 pixels, those before it 6x4"),
        ([(4, 6, 3)], 2, "1 images, 2 were announced"),
        ([(4, 6, 3)] * 3, 2, "3 images, 2 were announced"),
        ([], 0, "0 images, expected 1 or more"),
    ],
)
def test_other_images_than_announced_are_no_npz(
    tmp_path: Path, sizes: list[tuple[int, int, int]], count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'samples.npz'))}: {message}$"):
        save_npz((np.zeros(size, np.uint8) for size in sizes), tmp_path / "samples.npz", count)
    assert not list(tmp_path.iterdir())


def test_contact_sheet_puts_blocks_side_by_side(tmp_path: Path) -> None:
    red, blue = np.zeros((5, 32, 32, 3), np.uint8), np.zeros((5, 32, 32, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([red, blue], ["FP32", "W4A8 qncd"], columns=3)
    pixels = np.asarray(sheet).astype(int)
    is_red, is_blue = (pixels == [255, 0, 0]).all(-1), (pixels == [0, 0, 255]).all(-1)
    assert is_red.sum() == is_blue.sum() == 5 * 64 * 64  # enlarged twice, nothing blended
    shift = np.argwhere(is_blue)[0] - np.argwhere(is_red)[0]
    assert shift[0] == 0
    assert np.array_equal(np.roll(is_red, tuple(shift), (0, 1)), is_blue)  # the same places
    top = np.argwhere(is_red)[0][0]
    assert (pixels[:top].min(-1) < 100).any()  # labels above
    sheet.save(tmp_path / "sheet.png")


def test_contact_sheet_of_large_grey_images() -> None:
    sheet = contact_sheet([np.full((2, 100, 80, 1), 7, np.uint8)], ["a label that is wider than its images " * 3], columns=5)
    assert (np.asarray(sheet)[-112:-12] == 7).all(-1).sum() == 2 * 100 * 80  # not enlarged
    assert sheet.width > 300


@pytest.mark.parametrize(
    ("blocks", "labels", "columns", "message"),
    [
        ([], [], 1, "0 blocks of images and 0 labels"),
        ([np.zeros((1, 2, 2, 1), np.uint8)], ["a", "b"], 1, "1 blocks of images and 2 labels"),
        ([np.zeros((1, 2, 2, 1), np.uint8)], ["a"], 0, "columns 0: expected 1 or more"),
        ([np.zeros((0, 2, 2, 1), np.uint8)], ["a"], 1, r"a block of images of shape \(0, 2, 2, 1\)"),
    ],
)
def test_contact_sheet_faults(blocks: list[np.ndarray], labels: list[str], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(blocks, labels, columns)
