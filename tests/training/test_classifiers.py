"""The loop that trains the classifiers in the box, and the files that its scripts write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qncd.training.classifiers import save_classifier, train_classifier_


def bright_and_dark() -> tuple[Tensor, Tensor]:
    """64 uint8 images (64, 4, 4, 1), dark (0) or bright (1)."""
    labels = torch.arange(64) % 2
    return (torch.full((64, 4, 4, 1), 40) + 160 * labels.view(-1, 1, 1, 1)).byte(), labels


def test_learns_and_ends_in_half_precision() -> None:
    torch.manual_seed(0)
    network, (images, labels), seen = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), bright_and_dark(), list[Tensor]()

    def augment(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch

    train_classifier_(network, images, labels, nn.functional.cross_entropy, augment, epochs=5, batch_size=20, lr=0.1)
    assert len(seen) == 5 * 3  # whole batches: the last 4 images of an epoch wait for the next
    assert seen[0].shape == (20, 1, 4, 4) and -1 <= float(seen[0].min()) < 0 < float(seen[0].max()) <= 1
    assert not network.training
    assert torch.equal(network[1].weight, network[1].weight.half().float())
    assert torch.equal(network(seen[0]).argmax(1), (seen[0][:, 0, 0, 0] > 0).long())


def test_less_than_one_batch() -> None:
    images, labels = bright_and_dark()
    with pytest.raises(ValueError, match="64 images for batches of 65"):
        train_classifier_(nn.Linear(16, 2), images, labels, nn.functional.cross_entropy, lambda x: x, 1, 65, 0.1)


def test_file(tmp_path: Path) -> None:
    network = nn.BatchNorm1d(3)
    save_classifier(network, tmp_path / "a.safetensors", {"epochs": "1"})
    state = load_file(tmp_path / "a.safetensors")
    assert state.keys() == network.state_dict().keys()
    assert state["weight"].dtype == torch.float16 and state["num_batches_tracked"].dtype == torch.int64
