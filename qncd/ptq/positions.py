"""Convolutions and linear layers as matrices over rows of their inputs, looked at in a few positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qncd.quant.layers import QuantLayer

Layer = nn.Conv2d | nn.Linear | QuantLayer


def is_matrix(layer: Layer) -> bool:
    """Whether the layer is a matrix over patches of its input; no diffusion UNet has a layer that is not."""
    return not isinstance(layer, nn.Conv2d) or (
        layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    )


def some_positions(layer: Layer, x: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Which positions of each input x (N, ...) to look at, (P,): others in every call."""
    count = _patches(layer, x)[0, 0, :, :, 0, 0].numel() if isinstance(layer, nn.Conv2d) else x[0, ..., 0].numel()
    return torch.randperm(count, generator=generator)[:wanted].to(x.device)


def input_rows(layer: Layer, x: Tensor, positions: Tensor) -> Tensor:
    """The layer's input (N, ...) as rows (N * P, n) of what meets one row of its weight, float32."""
    if isinstance(layer, nn.Conv2d):
        patches = _patches(layer, x)
        width = patches.shape[3]
        chosen = patches[:, :, positions // width, positions % width].transpose(1, 2)  # (N, P, C, kh, kw)
    else:
        chosen = x.flatten(1, -2)[:, positions] if x.ndim > 2 else x[:, None]
    return chosen.reshape(-1, layer.weight[0].numel()).float()


def output_rows(layer: Layer, out: Tensor, positions: Tensor) -> Tensor:
    """The layer's output (N, ...) at the same positions, (N * P, O) float32."""
    if isinstance(layer, nn.Conv2d):
        chosen = out.flatten(2)[:, :, positions].transpose(1, 2)  # (N, P, O)
    else:
        chosen = out.flatten(1, -2)[:, positions] if out.ndim > 2 else out[:, None]
    return chosen.reshape(-1, len(layer.weight)).float()


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(N, C, H', W', kh, kw): what the kernel sees at each place of the output, a view."""
    assert not isinstance(layer.padding, str)
    high, wide = layer.padding
    padded = nn.functional.pad(x, (wide, wide, high, high))
    return padded.unfold(2, layer.kernel_size[0], layer.stride[0]).unfold(3, layer.kernel_size[1], layer.stride[1])
