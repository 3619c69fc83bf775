"""Distillation into few steps: the teacher's path, and the velocity that leads along it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from qncd.training.few_steps import StrideDistillation, Strides, teacher_path


def student_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip


def test_strides_are_the_schedulers_steps() -> None:
    scheduler = student_schedule()
    strides = Strides.of(scheduler, 4)
    assert strides.times == (999, 749, 499, 249)
    assert strides.alpha[0] == 0 and strides.sigma[-1] == 0  # from pure noise to the clean image
    np.testing.assert_allclose(np.square(strides.alpha) + np.square(strides.sigma), 1)
    x, v = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    student = StrideDistillation(nn.Identity(), nn.Identity(), (0.0,), strides, 0.0)
    student._predict = lambda *_: v  # type: ignore[method-assign]
    for index, t in enumerate(strides.times):
        expected = scheduler.step(v, t, x).prev_sample
        step = torch.tensor([index])
        torch.testing.assert_close(student._stride(x, step, x, x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(student._velocity(x, expected, step), v, atol=1e-4, rtol=1e-4)


def test_a_path_of_the_exact_noise_ends_in_the_image() -> None:
    """With data of one image the noise in x_t is known: the teacher is at alpha x_0 + sigma eps wherever the student stops."""
    strides = Strides.of(student_schedule(), 4)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    image = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    asked: list[int] = []

    def exact(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return (x - abar[t] ** 0.5 * image) / (1 - abar[t]) ** 0.5

    path = teacher_path(start, exact, abar, strides, 200)
    assert path.shape == (1, 5, 4, 4, 4) and len(asked) == 800 and asked == sorted(asked, reverse=True)
    torch.testing.assert_close(path[:, -1], image, atol=0.02, rtol=0)
    noise = (start - abar[-1] ** 0.5 * image) / (1 - abar[-1]) ** 0.5
    for index in (1, 2, 3):
        expected = strides.alpha[index] * image + strides.sigma[index] * noise
        torch.testing.assert_close(path[:, index], expected, atol=0.05, rtol=0)


class Known(nn.Module):
    """A network that knows the velocity at each time step."""

    def __init__(self, velocities: dict[int, Tensor]) -> None:
        super().__init__()
        self.velocities, self.seen = velocities, []

    def forward(self, x: Tensor, t: Tensor, context: Tensor, added_cond_kwargs: dict[str, Tensor]) -> SimpleNamespace:
        self.seen.append((x, t, added_cond_kwargs))
        return SimpleNamespace(sample=torch.cat([self.velocities[int(time)] for time in t]))


def test_a_student_on_the_path_has_no_loss_and_another_one_has() -> None:
    strides = Strides.of(student_schedule(), 4)
    path = torch.randn(1, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0)).expand(16, -1, -1, -1, -1)
    blank = StrideDistillation(nn.Identity(), nn.Identity(), (0.0,), strides, 0.0)
    exact = {t: blank._velocity(path[:1, i], path[:1, i + 1], torch.tensor([i])) for i, t in enumerate(strides.times)}

    class Text(nn.Module):
        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return tokens[:, :, None].float(), tokens.float()

    tokens = torch.arange(16 * 3).view(16, 3)
    for own_share in (0.0, 1.0):
        network = Known(exact)
        objective = StrideDistillation(network, Text(), (64.0, 64.0, 0.0, 0.0, 64.0, 64.0), strides, own_share)
        torch.manual_seed(0)
        assert float(objective(path, tokens)) < 1e-8
        x, t, added = network.seen[-1]
        assert len(x) == 16 and set(t.tolist()) == set(strides.times)
        assert added["time_ids"].tolist() == 16 * [[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]
        assert len(network.seen) == 1 + (own_share > 0)
    wrong = Known({t: v + 1 for t, v in exact.items()})
    torch.manual_seed(0)
    assert float(StrideDistillation(wrong, Text(), (0.0,), strides, 0.0)(path, tokens)) > 0.99
