"""The pieces that the training scripts share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import nn

from qncd.models.original.conditioning import ClassConditioner
from qncd.training.diffusion import BatchedTensors, NoisePrediction, Reconstruction, TrainingSettings, condition_tensor, fit

SECTION = {"n_iters": 100, "batch_size": 4, "lr": 0.01, "grad_clip": 1.0, "ema_rate": 0.9, "snapshot_freq": 10}


def test_settings_come_from_a_section() -> None:
    settings = TrainingSettings.from_section(SECTION)
    assert (settings.steps, settings.batch_size, settings.snapshot_every) == (100, 4, 10)
    assert TrainingSettings.from_section(SECTION, steps=7).steps == 7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lr": 0}, "lr 0.0: must be positive"),
        ({"n_iters": -1}, "steps -1: must be positive"),
        ({"ema_rate": 1.0}, "ema_rate 1.0: must be at least 0 and below 1"),
        ({"decay": 0}, "decay 0.0: must be above 0"),
    ],
)
def test_settings_that_allow_no_training(change: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainingSettings.from_section(SECTION | change)


def test_a_section_that_lacks_a_key() -> None:
    with pytest.raises(ValueError, match="training section lacks 'lr'"):
        TrainingSettings.from_section({key: value for key, value in SECTION.items() if key != "lr"})


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    settings = TrainingSettings(steps=1000, batch_size=1, lr=1.0, warmup=100, decay=0.3)
    factors = [settings.lr_factor(step) for step in range(1001)]
    assert factors[0] == 0.01 and factors[99] == factors[700] == 1.0 and factors[1000] == 0
    assert factors[850] == pytest.approx(0.5)


class Recorder(nn.Module):
    """A UNet that notes what it is given and predicts zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> SimpleNamespace:
        self.calls.append((x, *rest))
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_noise_prediction_mixes_by_the_schedule() -> None:
    """With abar = 0 the network sees noise alone, so that predicting zeros costs its mean square; with abar = 1 the image."""
    unet, images = Recorder(), torch.full((5, 1, 8, 8), 0.25)
    torch.manual_seed(0)
    loss = NoisePrediction(unet, np.zeros(10))(images)
    x, t = unet.calls[0]
    assert loss == pytest.approx(float(x.square().mean()))
    assert len(t) == 5 and (t[:2] + t[3:] == 9).all()  # antithetic pairs
    NoisePrediction(unet, np.ones(10))(images)
    assert torch.equal(unet.calls[1][0], images)


def test_conditions_are_dropped_in_their_share() -> None:
    conditioner = ClassConditioner(4, 3)
    objective = NoisePrediction(Recorder(), np.ones(10), conditioner, condition_dropout=0.5)
    labels = condition_tensor(conditioner, [1] * 400)
    objective(torch.zeros(400, 1, 2, 2), labels)
    context = objective.unet.calls[0][2]
    none, one = conditioner(torch.tensor([3]))[0], conditioner(torch.tensor([1]))[0]
    dropped = (context == none).all(dim=(1, 2))
    assert ((context == one).all(dim=(1, 2)) | dropped).all()
    assert 140 < int(dropped.sum()) < 260
    assert context.requires_grad


def test_codes_are_placed_among_the_latents() -> None:
    """Until then the decoder gets latents as they are; from then on codes, most of which are in use."""
    torch.manual_seed(0)
    autoencoder = VQModel(
        in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=16, vq_embed_dim=3
    )
    objective, images = Reconstruction(autoencoder, codebook_from=2), torch.randn(4, 1, 8, 8)
    before = autoencoder.quantize.embedding.weight.clone()
    for _ in range(2):
        objective(images)
    assert torch.equal(autoencoder.quantize.embedding.weight, before)
    objective(images)
    assert not torch.equal(autoencoder.quantize.embedding.weight, before)
    used = autoencoder.quantize(autoencoder.encode(images).latents)[2][2]
    assert len(used.unique()) > 8


def test_batches_are_whole_and_every_item_comes_once() -> None:
    numbers = torch.arange(10)
    batches = list(BatchedTensors((numbers, numbers * 2), 3))
    seen = torch.cat([batch[0] for batch in batches])
    assert [len(batch[0]) for batch in batches] == [3, 3, 3] and len(seen.unique()) == 9
    assert all(torch.equal(2 * a, b) for a, b in batches)
    with pytest.raises(ValueError, match=r"\[2\] items for batches of 3"):
        BatchedTensors((numbers[:2],), 3)
    with pytest.raises(ValueError, match=r"\[10, 9\] items"):
        BatchedTensors((numbers, numbers[1:]), 3)


class Distance(nn.Module):
    """An objective with its minimum where `point` is the data."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(1, 2, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.point - images).square().mean()


def test_fit_averages_weights_and_goes_on_from_a_snapshot(tmp_path: Path) -> None:
    images = torch.full((8, 2, 2, 1), 255, dtype=torch.uint8)  # 1 as the objective sees it
    settings = TrainingSettings.from_section(SECTION | {"n_iters": 20, "lr": 0.05, "warmup": 1})
    first = fit(Distance(), (images,), settings, tmp_path, "32-true")
    assert 0 < float(first.point.detach().mean()) < 1 and not first.training
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 20
    longer = TrainingSettings.from_section(SECTION | {"n_iters": 200, "lr": 0.05})
    second = fit(Distance(), (images,), longer, tmp_path, "32-true")
    assert (second.point - 1).abs().max() < (first.point - 1).abs().min()
