"""The small Fashion-MNIST classifier whose layers stand in for Inception on 32x32 grey images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qncd.metrics.networks.weights_file import load_weights

CLASSIFIER_PATH = Path(__file__).parents[2] / "assets" / "fashion_mnist_classifier.safetensors"
IMAGE_SIZE = 32
FEATURES = 128
SPATIAL_CHANNELS = 4


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class FashionMnistClassifier(nn.Module):
    """Five 3x3 convolutions, a global average and a linear layer: 132,000 parameters.

    It gives what Inception gives ADM's evaluator, at the same places: the pooled features before the last layer for
    FID, the first few channels of a layer in the middle for sFID, and the logits for the inception score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(_block(1, 32, 2), _block(32, 32, 1), _block(32, 64, 2), _block(64, 64, 1))
        self.late = _block(64, FEATURES, 2)
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features, spatial features and logits.

        Args:
            images: [-1, 1] float NCHW, (N, 1, 32, 32).

        Returns:
            features (N, 128), spatial (N, 256): the first 4 channels of the 8x8 map, flattened NHWC, and logits (N, 10).
        """
        middle = self.early(images)  # (N, 64, 8, 8)
        features = self.late(middle).mean(dim=(2, 3))  # (N, 128)
        spatial = middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 8 * 8 * 4)
        return features, spatial, self.head(features)


def load_classifier(path: Path | None = None) -> tuple[FashionMnistClassifier, dict[str, str]]:
    """The classifier in evaluation mode, in float32, and the metadata of its file (`test_accuracy` in per cent).

    Args:
        path: a safetensors file written by `tools/train_fashion_mnist_classifier.py`; by default the bundled one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, or not of this network.
    """
    return load_weights(FashionMnistClassifier(), path or CLASSIFIER_PATH, "Fashion-MNIST classifier")
