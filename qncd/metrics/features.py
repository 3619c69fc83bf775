"""Networks that turn images into features: Inception for comparable numbers, the classifier in the box for offline ones."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Protocol, TypedDict

import torch

from qncd.metrics.fashion_mnist_classifier import FEATURES, IMAGE_SIZE, load_classifier

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # its first digits, as torch hub checks them
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
SPATIAL_CHANNELS = 7  # of mixed_6/conv, as in ADM's evaluator: 7 * 17 * 17 = 2023 dimensions


class Features(TypedDict):
    """What one batch gives: `features` (N, D), `spatial` (N, D2) and `logits` (N, classes), float32."""

    features: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor


class FeatureExtractor(Protocol):
    """Features of uint8 NHWC images.

    Attributes:
        name: the key in `EXTRACTORS`, stored in files of statistics.
        channels: channels that the images must have.
        dimension: D of `features`.
        convention: network, layer and resize in words; part of every printed number.
    """

    name: str
    channels: int
    dimension: int
    convention: str

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the network does not take images of this size."""

    def __call__(self, images: torch.Tensor) -> Features:
        """Features of images (N, H, W, C), uint8."""


def _check_images(images: torch.Tensor, channels: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: expected uint8 NHWC with {channels} channels")


def find_inception_weights(weights: Path | None = None) -> Path:
    """The file with Inception's weights: `weights`, torch hub's cache, or a download into that cache.

    Raises:
        FileNotFoundError: `weights` does not exist, or nothing is in the cache and the download fails.
    """
    if weights is not None:
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: no such file (weights of Inception v3, {INCEPTION_URL})")
        return weights
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not cached.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none, and a silent firewall would hold it for ever
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(cached), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # no network or a refused request; another checksum
            raise FileNotFoundError(
                f"Inception's weights are missing and could not be downloaded ({error}): get {INCEPTION_FILE} from "
                f"{INCEPTION_URL} and put it at {cached}, or name it with --weights"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    return cached


class InceptionFeatures:
    """torch-fidelity's port of the Inception v3 of 2015-12-05, the network of FID and of ADM's evaluator.

    features: the 2048 pooled ones. spatial: the first 7 channels of mixed_6/conv, flattened NHWC to 2023, for sFID.
    logits: 1008, without the bias of the last layer, as in the original graph and in ADM.

    Args:
        weights: the file; see `find_inception_weights`.
        device: where the network runs.

    Raises:
        FileNotFoundError: the weights cannot be had.
        ValueError: the file holds something else.
    """

    name = "inception"
    channels = 3
    dimension = 2048
    convention = "Inception v3 2015-12-05 (torch-fidelity), bilinear resize of TensorFlow 1 to 299x299 from uint8"

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_inception_weights(weights)
        try:
            # torch-fidelity unpickles the file without restrictions; this first look refuses one that is not plain tensors.
            torch.load(path, map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            ).to(device)
        except Exception as error:  # what torch.load raises on a broken file depends on where it breaks
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{path}: not the weights of Inception v3 ({INCEPTION_FILE}): {reason}") from None
        self.device = device
        self._spatial = torch.empty(0)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)

    def check_size(self, height: int, width: int) -> None:
        """Any size: the network resizes."""

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Features (N, 2048), (N, 2023), (N, 1008) of uint8 RGB images (N, H, W, 3)."""
        _check_images(images, self.channels)
        features, logits = self.network(images.to(self.device).permute(0, 3, 1, 2))
        return {"features": features.cpu(), "spatial": self._spatial.cpu(), "logits": logits.cpu()}


class FashionMnistFeatures:
    """The Fashion-MNIST classifier in the box: 128 features, 256 spatial ones, 10 logits.

    Its numbers compare models of this data set with each other; they are not on the scale of Inception's.

    Args:
        weights: a file of `scripts/train_fashion_mnist_classifier.py`; by default the one in the box.
        device: where the network runs.

    Raises:
        FileNotFoundError, ValueError: see `load_classifier`.
    """

    name = "fashion_mnist"
    channels = 1
    dimension = FEATURES

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        network, metadata = load_classifier(weights)
        self.network = network.to(device)
        self.device = device
        accuracy = metadata.get("test_accuracy", "unknown")
        self.convention = f"Fashion-MNIST classifier of this repository (test accuracy {accuracy} %), 32x32 grey, no resize"

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the images are not 32x32."""
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images of {width}x{height}: the Fashion-MNIST features take {IMAGE_SIZE}x{IMAGE_SIZE}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Features (N, 128), (N, 256), (N, 10) of uint8 grey images (N, 32, 32, 1)."""
        _check_images(images, self.channels)
        self.check_size(*images.shape[1:3])
        scaled = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [-1, 1]
        features, spatial, logits = self.network(scaled)
        return {"features": features.cpu(), "spatial": spatial.cpu(), "logits": logits.cpu()}


EXTRACTORS: dict[str, type[InceptionFeatures] | type[FashionMnistFeatures]] = {
    InceptionFeatures.name: InceptionFeatures,
    FashionMnistFeatures.name: FashionMnistFeatures,
}
