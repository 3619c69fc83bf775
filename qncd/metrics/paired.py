"""Figures of image pairs beyond MSE and PSNR (which are in statistics.py): SSIM, and LPIPS where its weights are."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from qncd.metrics.weights import LPIPS_BACKBONES, find_weights, load_tensors

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def paired_ssim(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """Structural similarity of each pair (Wang et al. 2004): Gaussian window 11x11 of sigma 1.5, mean over channels.

    Only windows that lie in the image count, as in the authors' code; their downsampling of large images is left out.

    Args:
        a, b: uint8 NHWC of one shape, at least 11x11.

    Returns:
        (N,) float64; 1 for equal images.

    Raises:
        ValueError: other shapes.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"images of shape {a.shape} and {b.shape}: expected two batches NHWC of one shape, 11x11 or larger")
    count, _, _, channels = a.shape
    x, y = (torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2).flatten(0, 1)[:, None] for images in (a, b))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blur(images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(images, window[None, None, :, None]), window[None, None, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return index.mean(dim=(1, 2, 3)).reshape(count, channels).mean(1).numpy()


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), version 0.1 of the package lpips, linear weights from the package.

    Args:
        weights: torchvision's AlexNet or VGG16, told apart by what the file holds; by default AlexNet from torch hub's
            cache or a download.
        device: where the network runs.

    Raises:
        FileNotFoundError: the weights cannot be had.
        ValueError: the file holds something else, or the package is not installed.
    """

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        try:
            lpips: Any = importlib.import_module("lpips")
        except ImportError:
            raise ValueError("LPIPS needs the package lpips: pip install lpips") from None
        path = find_weights(LPIPS_BACKBONES["alex"], weights, "--lpips_weights")
        state = load_tensors(path, "AlexNet or VGG16 of torchvision")
        backbone = "vgg" if "features.28.weight" in state else "alex"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in an old way
            network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False).eval()
        wanted = network.net.state_dict()  # slice1.0.weight is torchvision's features.0.weight
        renamed = {name: f"features.{name.split('.', 1)[1]}" for name in wanted}
        missing = [theirs for theirs in renamed.values() if theirs not in state]
        if missing:
            raise ValueError(f"{path}: not the weights of AlexNet or VGG16 of torchvision: no {missing[0]}")
        try:
            network.net.load_state_dict({name: state[theirs] for name, theirs in renamed.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{path}: not the weights of AlexNet or VGG16 of torchvision: {reason}") from None
        self.network = network.to(device).requires_grad_(False)
        self.device = device
        self.description = f"LPIPS 0.1 with {LPIPS_BACKBONES[backbone].what.split()[0]}, images at their own size"

    @torch.no_grad()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(N,) float64 distances of pairs of images uint8 NHWC with 3 channels."""
        x, y = (torch.from_numpy(i).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1 for i in (a, b))
        try:
            return self.network(x, y).flatten().double().cpu().numpy()
        except RuntimeError as error:
            raise ValueError(f"LPIPS of {a.shape[2]}x{a.shape[1]} images: {str(error).splitlines()[0]}") from None
