"""Batches of a source: every image once, in order, in parts for several processes."""

from pathlib import Path

import numpy as np
import pytest

from qncd.metrics.report.sources import DatasetImages, ImageArray, ImageSource, open_source

IMAGES = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 3), np.uint8)


def sources(folder: Path) -> list[ImageSource]:
    np.savez(folder / "images.npz", arr_0=IMAGES)
    return [DatasetImages(Path("drawn"), IMAGES), ImageArray.open(folder / "images.npz")]


@pytest.mark.parametrize(
    ("batch_size", "shard", "expected"),
    [
        (3, (0, 1), [[0, 1, 2], [3, 4, 5], [6]]),
        (3, (0, 2), [[0, 1, 2], [6]]),
        (3, (1, 2), [[3, 4, 5]]),
        (2, (2, 3), [[4, 5]]),
        (9, (0, 1), [[0, 1, 2, 3, 4, 5, 6]]),
    ],
)
def test_batches_hold_every_image_once(batch_size, shard, expected, tmp_path):
    for source in sources(tmp_path):
        assert (source.count, source.height, source.width) == (7, 4, 5)
        batches = [[loader() for loader in batch] for batch in source.loaders(batch_size, 3, shard)]
        assert [[int(image[0, 0, 0]) for image in batch] for batch in batches] == expected
        assert all(image.shape == (4, 5, 3) and image.dtype == np.uint8 for batch in batches for image in batch)


def test_an_array_in_fortrans_order_is_read_as_adm_does(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(images))
    batches = [[loader() for loader in batch] for batch in ImageArray.open(tmp_path / "a.npz").loaders(2, 3)]
    np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES.astype(np.float32) / 255, r"arr_0 is float32 \(7, 4, 5, 3\), expected uint8 \(N, H, W, 3\) or \(N, H, W, 1\)"),
        (IMAGES[:0], r"arr_0 is uint8 \(0, 4, 5, 3\), expected"),
        (np.broadcast_to(np.uint8(0), (1, 10000, 9000, 1)), "images of 9000x10000 pixels, at most 89478485 in all are read"),
    ],
)
def test_other_arrays_are_refused(array, message, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(ValueError, match=f"a.npz: {message}"):
        open_source(tmp_path / "a.npz")


def test_a_data_sets_digest_is_that_of_its_pixels():
    first = DatasetImages(Path("drawn"), IMAGES).digest()
    other = IMAGES.copy()
    other[6, 3, 4, 2] += 1
    assert len(first) == 64 and first == DatasetImages(Path("elsewhere"), IMAGES.copy()).digest()
    assert first != DatasetImages(Path("drawn"), other).digest()
    assert first != DatasetImages(Path("drawn"), IMAGES.reshape(7, 5, 4, 3)).digest()
