"""Networks that turn images into features: Inception for comparable numbers, the bundled classifier for offline use."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qncd.metrics.networks.fashion_mnist_classifier import CLASSIFIER_PATH, FEATURES, IMAGE_SIZE, load_classifier
from qncd.metrics.networks.resize import resize_pil_bicubic, resize_tensorflow1, resize_torch_bilinear
from qncd.metrics.networks.weights import INCEPTION, file_digest, find_weights, load_tensors, to_stream
from qncd.metrics.report.conventions import CONVENTIONS, DEFAULT_CONVENTION, Convention

SPATIAL_CHANNELS = 7  # of mixed_6/conv, as in ADM's evaluator: 7 * 17 * 17 = 2023 dimensions
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2")
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")

Features = dict[str, torch.Tensor]  # layer -> (N, D) float32; `features`, `spatial` and `logits`, as far as there are any


class FeatureExtractor(Protocol):
    """Features of images.

    Attributes:
        name: what it is called in files of statistics.
        channels: channels that the images must have.
        dimension: D of `features`.
        convention: network, layer and resize in words; part of every printed number.
        identity: text that changes whenever the features would; part of the cache's key.
        any_size: whether images of different sizes become one shape in `prepare`.
    """

    name: str
    channels: int
    dimension: int
    convention: str
    identity: str
    any_size: bool

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the network does not take images of this size."""

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """One image uint8 (H, W, C) as the network takes it; called by the threads that decode."""

    def __call__(self, images: torch.Tensor) -> Features:
        """Features of a batch of prepared images."""


def _check_images(images: torch.Tensor, channels: int, dtype: torch.dtype = torch.uint8) -> None:
    if images.dtype != dtype or images.ndim != 4 or images.shape[3] != channels:
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: expected {expected} NHWC with {channels} channels")


def _fold_batch_norms(network: nn.Module) -> None:
    """Put every batch norm into the convolution before it: the same function, a fifth of the time less."""
    for module in network.modules():
        convolution, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.conv, module.bn = fuse_conv_bn_eval(convolution, norm), nn.Identity()


class InceptionFeatures:
    """torch-fidelity's port of the Inception v3 of 2015-12-05, the network of FID and of ADM's evaluator.

    features: the 2048 pooled ones. spatial: the first 7 channels of mixed_6/conv, flattened NHWC to 2023, for sFID.
    logits: 1008, without the bias of the last layer, as in the original graph, ADM and torch-fidelity.

    Args:
        weights: the file; see `find_weights`. pytorch-fid's serves as well, it holds the same bytes.
        device: where the network runs.
        convention: how images get to 299x299 and to the network's range.

    Raises:
        FileNotFoundError: the weights cannot be had.
        ValueError: the file holds something else.
    """

    name = "inception"
    channels = 3
    dimension = 2048

    def __init__(
        self,
        weights: Path | None = None,
        device: str | torch.device = "cpu",
        convention: Convention = CONVENTIONS[DEFAULT_CONVENTION],
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_weights(INCEPTION, weights)
        what = f"{INCEPTION.what} ({INCEPTION.names[0]})"
        state = load_tensors(path, what)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=to_stream(state)
            )
        except RuntimeError as error:
            raise ValueError(f"{path}: not the weights of {what}: {' '.join(str(error).split())[:160]}") from None
        _fold_batch_norms(network)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._spatial = torch.empty(0)
        self.device = device
        self.preset = convention
        self.convention = convention.description
        self.any_size = convention.resize == "pil_bicubic"
        self.identity = f"inception | {convention.preprocessing} | {file_digest(path)}"

    def _keep_spatial(self, _module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)

    def check_size(self, height: int, width: int) -> None:
        """Any size: images are resized."""

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The image, resized already where the convention resizes with PIL."""
        return resize_pil_bicubic(image) if self.any_size else image

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Features (N, 2048), spatial (N, 2023) and logits (N, 1008) of prepared RGB images (N, H, W, 3)."""
        _check_images(images, self.channels, torch.float32 if self.any_size else torch.uint8)
        x = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.preset.resize == "tensorflow1":
            x = resize_tensorflow1(x)
        elif self.preset.resize == "torch_bilinear":
            x = resize_torch_bilinear(x)
        x = 2 * x - 1 if self.preset.scaling == "255" else (x - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        for name in (*_STEM, *(f"Mixed_{block}" for block in _BLOCKS), "AvgPool"):
            x = getattr(self.network, name)(x)
        features = x.flatten(1)  # (N, 2048)
        logits = features @ self.network.fc.weight.T  # (N, 1008)
        return {"features": features.cpu(), "spatial": self._spatial.cpu(), "logits": logits.cpu()}


class FashionMnistFeatures:
    """The bundled Fashion-MNIST classifier: 128 features, 256 spatial ones, 10 logits.

    Its numbers compare models of this data set with each other; they are not on the scale of Inception's.

    Args:
        weights: a file of `tools/train_fashion_mnist_classifier.py`; by default the bundled one.
        device: where the network runs.

    Raises:
        FileNotFoundError, ValueError: see `load_classifier`.
    """

    name = "fashion_mnist"
    channels = 1
    dimension = FEATURES
    any_size = False

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        network, metadata = load_classifier(weights)
        self.network = network.to(device)
        self.device = device
        accuracy = metadata.get("test_accuracy", "unknown")
        self.convention = f"Fashion-MNIST classifier of this repository (test accuracy {accuracy} %), 32x32 grey, no resize"
        self.identity = f"fashion_mnist | {file_digest(weights or CLASSIFIER_PATH)}"

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the images are not 32x32."""
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images of {width}x{height}: the Fashion-MNIST features take {IMAGE_SIZE}x{IMAGE_SIZE}")

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The image as it is."""
        return image

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
