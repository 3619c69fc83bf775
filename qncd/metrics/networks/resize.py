"""The three resizes to Inception's 299x299 that published figures rest on; they differ by more than most models do."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

SIZE = 299


def resize_tensorflow1(images: torch.Tensor) -> torch.Tensor:
    """`tf.image.resize_bilinear` of TensorFlow 1: output pixel i reads the input at i * H / 299, corners not aligned.

    Args:
        images: float NCHW, 0 to 255.
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images, size=(SIZE, SIZE), align_corners=False)


def resize_torch_bilinear(images: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.interpolate` as pytorch-fid calls it: half-pixel centres, no antialiasing, of x / 255.

    Args:
        images: float NCHW, 0 to 255.

    Returns:
        NCHW, 0 to 1.
    """
    return F.interpolate(images / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def resize_pil_bicubic(image: np.ndarray) -> np.ndarray:
    """clean-fid's resize: each channel by PIL in float, bicubic with antialiasing, clipped and not rounded.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        float32 (299, 299, 3), 0 to 255.
    """
    channels = []
    for i in range(image.shape[2]):
        channel = Image.fromarray(image[:, :, i].astype(np.float32))  # mode F
        channels.append(np.asarray(channel.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(channels, axis=2).clip(0, 255)
