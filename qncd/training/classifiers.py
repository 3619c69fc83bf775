"""How the two small bundled classifiers are trained and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.files.safetensors_files import write_safetensors
from qncd.training.diffusion import images_to_float


def train_classifier_(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    augment: Callable[[Tensor], Tensor],
    epochs: int,
    batch_size: int,
    lr: float,
) -> None:
    """Train with AdamW on a one-cycle schedule, in place; weights end up rounded to half precision, as they are written.

    Args:
        images: uint8 (N, H, W, C).
        targets: (N, ...).
        loss: of the network's output and a batch of targets.
        augment: changes a batch in [-1, 1], float (B, C, H, W), before the network sees it.
        lr: peak of the schedule.

    Raises:
        ValueError: less than one batch of images.
    """
    steps = len(images) // batch_size
    if not steps:
        raise ValueError(f"{len(images)} images for batches of {batch_size}")
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    start = time.monotonic()
    for epoch in range(epochs):
        network.train()
        total = 0.0
        order = torch.randperm(len(images))
        for index in order[: steps * batch_size].split(batch_size):
            value = loss(network(augment(images_to_float(images[index]))), targets[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += value.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    network.half().float()  # what is measured is what is shipped
    network.eval()


def save_classifier(network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network's state in half precision, whole or not at all. Raises ValueError where it cannot be written."""
    state = {name: v.half() if v.is_floating_point() else v for name, v in network.state_dict().items()}
    write_safetensors(state, path, metadata)
