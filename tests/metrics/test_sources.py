"""Batches of a source: every image once, in order, in parts for several processes."""

from pathlib import Path

import numpy as np
import pytest

from qncd.metrics.report.sources import DatasetImages, ImageArray, ImageSource

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


def test_a_data_sets_digest_is_that_of_its_pixels():
    first = DatasetImages(Path("drawn"), IMAGES).digest()
    other = IMAGES.copy()
    other[6, 3, 4, 2] += 1
    assert len(first) == 64 and first == DatasetImages(Path("elsewhere"), IMAGES.copy()).digest()
    assert first != DatasetImages(Path("drawn"), other).digest()
    assert first != DatasetImages(Path("drawn"), IMAGES.reshape(7, 5, 4, 3)).digest()
