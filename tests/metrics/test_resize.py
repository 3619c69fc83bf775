"""The three resizes, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from qncd.metrics.networks.resize import SIZE, resize_pil_bicubic, resize_tensorflow1, resize_torch_bilinear

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 8, 3), np.uint8)


def read_linearly(row: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """A row's values at places between its pixels; beyond the ends they go on as they are there."""
    at = at.clamp(0, len(row) - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=len(row) - 1)
    return row[low] + (row[high] - row[low]) * (at - low)


@pytest.mark.parametrize("width", [8, 400])
def test_where_the_bilinear_resizes_read(width):
    """TensorFlow 1 at i * W / 299; torch at (i + 1/2) * W / 299 - 1/2, of values from 0 to 1."""
    pytest.importorskip("torch_fidelity")
    row = torch.randint(0, 256, (width,), generator=torch.Generator().manual_seed(1)).double()
    images = row.float().expand(2, 3, 5, width)
    i = torch.arange(SIZE).double()
    for found, expected in (
        (resize_tensorflow1(images), read_linearly(row, i * width / 299)),
        (resize_torch_bilinear(images), read_linearly(row, (i + 0.5) * width / 299 - 0.5) / 255),
    ):
        assert found.shape == (2, 3, 299, 299)
        torch.testing.assert_close(
            found, expected.float().expand(2, 3, 299, 299), rtol=1e-4, atol=2e-2 if found.max() > 1 else 1e-4
        )


def test_clean_fids_resize_neither_rounds_nor_overshoots():
    found = resize_pil_bicubic(PIXELS)
    assert found.shape == (299, 299, 3) and found.dtype == np.float32
    for channel in range(3):
        plane = Image.fromarray(PIXELS[:, :, channel].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[:, :, channel], np.minimum(np.maximum(np.asarray(plane), 0), 255))
    assert np.any(found != found.round()) and found.min() == 0 and found.max() == 255
