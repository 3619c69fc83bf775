"""Figures of image pairs beyond MSE and PSNR (which are in statistics.py): SSIM, and LPIPS where its weights are."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qncd.metrics.networks.weights import LPIPS_BACKBONES, cached_weights, find_weights, load_tensors

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
LPIPS_SIZE = 31  # pixels: of a smaller image AlexNet's layers leave nothing
CACHED = 1 << 18  # pixels at a time: what a core keeps near


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
    count, height, width, channels = a.shape
    planes = (torch.from_numpy(images).permute(0, 3, 1, 2).flatten(0, 1) for images in (a, b))
    together = max(1, CACHED // (height * width))
    parts = zip(*(side.split(together) for side in planes), strict=True)
    return (
        torch.cat([_plane_ssim(x.contiguous().double(), y.contiguous().double(), peak) for x, y in parts])
        .reshape(count, channels)
        .mean(1)
        .numpy()
    )


def _plane_ssim(x: torch.Tensor, y: torch.Tensor, peak: float) -> torch.Tensor:
    """(P,) of planes float64 (P, H, W)."""
    mean_x, mean_y = _blur(x), _blur(y)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    variances = _blur(x * x + y * y) - squares  # of x and y together
    covariance = _blur(x * y) - product
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    index = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return index.mean(dim=(1, 2))


def _blur(planes: torch.Tensor) -> torch.Tensor:
    """Gaussian window over (P, H, W), where it fits: torch's convolutions of float64 take 15 times as long."""
    half = SSIM_WINDOW // 2
    window = torch.exp(-(torch.arange(-half, half + 1, dtype=torch.float64) ** 2) / (2 * SSIM_SIGMA**2))
    weights = (window / window.sum()).tolist()
    for dim in (1, 2):
        size = planes.shape[dim] - 2 * half
        blurred = planes.narrow(dim, half, size) * weights[half]
        pair = torch.empty_like(blurred)
        for k in range(half):
            torch.add(planes.narrow(dim, k, size), planes.narrow(dim, 2 * half - k, size), out=pair)
            blurred.add_(pair, alpha=weights[k])
        planes = blurred
    return planes


def worst_and_median(mse: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Places of the `count` pairs of largest error (N,), the largest first, and of as many in the middle of their order."""
    order = np.argsort(-mse, kind="stable").tolist()
    start = max(0, min((len(order) - count + 1) // 2, len(order) - count))
    return order[:count], order[start : start + count]


def lpips_obstacle() -> str | None:
    """Why LPIPS cannot be had without a download, None where it can."""
    if importlib.util.find_spec("lpips") is None:
        return "pip install lpips"
    if cached_weights(LPIPS_BACKBONES["alex"]) is None:
        return f"--metrics lpips downloads {LPIPS_BACKBONES['alex'].names[0]}, --lpips_weights names it"
    return None


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
        """(N,) float64 distances of pairs of images uint8 NHWC with 3 channels, or with 1 that stands for all three."""
        a, b = (side.repeat(3, 3) if side.shape[3] == 1 else side for side in (a, b))
        x, y = (torch.from_numpy(i).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1 for i in (a, b))
        try:
            return self.network(x, y).flatten().double().cpu().numpy()
        except RuntimeError as error:
            raise ValueError(f"LPIPS of {a.shape[2]}x{a.shape[1]} images: {str(error).splitlines()[0]}") from None
