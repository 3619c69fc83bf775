"""PTQD and D2-DPM: known errors are taken out, and where there is none nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qncd.recipe import SamplerConfig
from qncd.rng import ImageNoise
from qncd.sampling.corrector import Denoiser
from qncd.sampling.correctors.offline_noise import KINDS, OfflineCorrector, OfflineRecorder, OfflineStatistics, _gaussian_row
from qncd.sampling.process import Process
from qncd.sampling.samplers import StepState, reduced_sigma, sample_ddim
from qncd.sampling.schedule import linear_betas, make_steps

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
STEPS = make_steps(SamplerConfig(timesteps=5), PROCESS)


def exact(x: Tensor, t: int) -> Tensor:
    return (t / 1000) * x + 0.1 * (1 - t / 1000) * torch.sin(3 * x)


def record(rough: Denoiser, images: int = 16) -> OfflineStatistics:
    recorder = OfflineRecorder()

    def compare(state: StepState) -> None:
        recorder(state.step, state.x, rough(state.x, state.step.t), state.eps)

    for start in range(0, images, 8):
        x = ImageNoise(range(start, start + 8)).normal((3, 16, 16))
        sample_ddim(exact, x, STEPS, ImageNoise(range(8)), callback=compare)
    return recorder.statistics()


def sampled(denoise: object, corrector: OfflineCorrector | None = None) -> Tensor:
    x = ImageNoise(range(100, 108)).normal((3, 16, 16))
    return sample_ddim(denoise, x, STEPS, ImageNoise(range(8)), corrector)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_precision_model_is_left_alone(kind: str) -> None:
    corrector = OfflineCorrector(kind, record(exact))
    torch.testing.assert_close(sampled(exact, corrector), sampled(exact), rtol=0, atol=1e-5)
    out = corrector.correct(STEPS[2], torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), exact, None)  # type: ignore[arg-type]
    assert out.variance is not None and float(out.variance) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gain", "bias"), [(1.0, 0.3), (1.2, 0.0), (1.2, -0.4)])
def test_known_gain_and_bias_are_taken_out(kind: str, gain: float, bias: float) -> None:
    def rough(x: Tensor, t: int) -> Tensor:
        return gain * exact(x, t) + bias

    corrector = OfflineCorrector(kind, record(rough))
    reference = sampled(exact)
    assert (sampled(rough) - reference).abs().max() > 0.05
    torch.testing.assert_close(sampled(rough, corrector), reference, rtol=0, atol=2e-3)


def test_ptqd_has_a_bias_for_each_channel_and_no_negative_slope() -> None:
    shift = torch.tensor([0.2, -0.1, 0.0]).view(1, 3, 1, 1)
    statistics = record(lambda x, t: exact(x, t) + shift)
    torch.testing.assert_close(statistics.bias, shift.flatten().expand(5, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        sampled(lambda x, t: exact(x, t) + shift, OfflineCorrector("ptqd", statistics)), sampled(exact), rtol=0, atol=1e-4
    )
    shrunk = record(lambda x, t: 0.8 * exact(x, t))
    assert bool((shrunk.slope < -0.15).all())
    eps = torch.ones(1, 3, 2, 2)
    out = OfflineCorrector("ptqd", shrunk).correct(STEPS[0], eps, eps, exact, None)  # type: ignore[arg-type]
    torch.testing.assert_close(out.eps, eps - shrunk.bias[0].view(1, 3, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_variance_of_random_error_is_known(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def rough(x: Tensor, t: int) -> Tensor:
        return exact(x, t) + 0.05 * torch.randn(x.shape, generator=generator)

    corrector = OfflineCorrector(kind, record(rough, 32))
    for step in STEPS[1:]:
        out = corrector.correct(step, torch.zeros(1), torch.zeros(1, 3, 4, 4), exact, None)  # type: ignore[arg-type]
        # D2-DPM's regression on e~ explains a part of it, the more the smaller e itself is.
        assert out.variance is not None
        found = float(out.variance) ** 0.5
        assert found == pytest.approx(0.05, rel=0.05) if kind == "ptqd" else 0 < found < 0.0525
    noisy = make_steps(SamplerConfig(timesteps=5, eta=1.0), PROCESS)[2]
    reduced = reduced_sigma(noisy, corrector.correct(noisy, torch.zeros(1), torch.zeros(1, 3, 4, 4), exact, None).variance)  # type: ignore[arg-type]
    assert 0 < float(reduced) < noisy.sigma


def test_d2dpm_leaves_out_pairs_beyond_four_standard_deviations() -> None:
    """A prediction 6 deviations off, and an error 6 deviations off, do not count; 3 deviations do."""
    generator = torch.Generator().manual_seed(0)
    e, d = torch.randn(2, 4000, generator=generator, dtype=torch.float64).clamp(-3, 3)
    e, d = 2 * e + 0.5, 0.1 * d - 0.2
    far_e, far_d = e.clone(), d.clone()
    far_e[7], far_d[11] = 12.5, -0.8
    keep = torch.ones(4000, dtype=torch.bool)
    keep[[7, 11]] = False
    row = _gaussian_row(far_e, far_d)
    assert float(row["mean_e"]) == pytest.approx(float(e[keep].mean()), rel=1e-12)
    assert float(row["mean_d"]) == pytest.approx(float(d[keep].mean()), rel=1e-12)
    assert float(row["std_e"]) == pytest.approx(float(e[keep].std()), rel=1e-12)
    assert float(row["std_d"]) == pytest.approx(float(d[keep].std()), rel=1e-12)
    assert float(row["correlation"]) == pytest.approx(np.corrcoef(e[keep], d[keep])[0, 1], rel=1e-3)


def test_it_goes_to_a_file_and_back() -> None:
    statistics = record(lambda x, t: 1.1 * exact(x, t))
    back = OfflineStatistics.from_tensors(*statistics.to_tensors())
    assert back.images == 16 and all(torch.equal(getattr(back, n), t) for n, t in statistics.to_tensors()[0].items())


def test_another_sampler_is_refused() -> None:
    corrector = OfflineCorrector("ptqd", record(exact))
    later = make_steps(SamplerConfig(timesteps=10), PROCESS)[8]
    with pytest.raises(ValueError, match=r"^the offline statistics have 5 steps, none for step 8: made for another sampler$"):
        corrector.correct(later, torch.zeros(1), torch.zeros(1, 3, 4, 4), exact, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^kind 'other': allowed are ptqd, d2dpm$"):
        OfflineCorrector("other", corrector.statistics)
    with pytest.raises(ValueError, match=r"^the recorder has not seen every step$"):
        OfflineRecorder().statistics()
