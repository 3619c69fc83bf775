"""Predictions that are constant, equal, single or not finite: corrections of finite numbers, or the step is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qncd.recipe import CorrectionConfig, SamplerConfig
from qncd.sampling.corrector import Tentative
from qncd.sampling.correctors.offline_noise import KINDS, OfflineCorrector, OfflineRecorder
from qncd.sampling.correctors.runtime import NoiseRecorder, RuntimeNoiseCorrector
from qncd.sampling.correctors.tracking import TrackingFitter, fit_filter
from qncd.sampling.process import Process
from qncd.sampling.schedule import Step, make_steps


def steps() -> list[Step]:
    return make_steps(SamplerConfig(timesteps=4), Process.from_betas(np.linspace(1e-4, 2e-2, 1000)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PAIRS: dict[str, tuple[Tensor, Tensor]] = {
    "equal": (noise(2, 3, 4, 4), noise(2, 3, 4, 4)),
    "constant": (torch.full((2, 3, 4, 4), 0.3), torch.full((2, 3, 4, 4), 0.1)),
    "constant and large": (torch.full((2, 3, 7, 7), 1e6 / 3), torch.full((2, 3, 7, 7), 1e5 / 7)),
    "zeros": (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
    "a constant error": (noise(2, 3, 4, 4) + 0.1, noise(2, 3, 4, 4)),
    "one value": (torch.tensor([[[[0.3]]]]), torch.tensor([[[[0.2]]]])),
    "1e15": (noise(2, 3, 4, 4) * 1e15, noise(2, 3, 4, 4, seed=1) * 1e15),
    "1e-30": (noise(2, 3, 4, 4) * 1e-30, noise(2, 3, 4, 4, seed=1) * 1e-30),
}


@pytest.mark.parametrize("name", PAIRS)
def test_offline_statistics(name: str) -> None:
    rough, exact = PAIRS[name]
    step, recorder = steps()[0], OfflineRecorder()
    recorder(step, rough, rough, exact)
    statistics = recorder.statistics()
    for kind in KINDS:
        corrected = OfflineCorrector(kind, statistics).correct(step, rough, rough, lambda x, t: x, lambda e: Tentative(e, e))
        assert corrected.variance is not None and bool(torch.isfinite(corrected.variance).all())
        before, after = (float((eps - exact).double().square().sum()) for eps in (rough, corrected.eps))
        assert after <= before * 1.001 + 1e-9 * float(exact.double().square().sum())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_offline_statistics_name_the_step(value: float) -> None:
    recorder, exact = OfflineRecorder(), noise(1, 3, 4, 4)
    for step, rough in zip(steps(), (exact, exact * value), strict=False):
        recorder(step, exact, rough, exact)
    with pytest.raises(ValueError, match=r"^step 1: a noise prediction is NaN or infinite$"):
        recorder.statistics()


def advance(e: Tensor) -> Tentative:
    return Tentative(e, e)


@pytest.mark.parametrize("statistics", ["batch", "sample", "channel"])
@pytest.mark.parametrize("size", [1, 4])
def test_runtime_noise_of_one_small_image(size: int, statistics: Any) -> None:
    """The variance of a single pixel is 0, not NaN."""
    config = CorrectionConfig(interval=1, statistics=statistics, control=False, shrink=False, correct_variance=True)
    corrector, x = RuntimeNoiseCorrector(config), torch.zeros(1, 1, size, size)
    corrector.begin([0], "cpu")
    for step in steps():
        corrected = corrector.correct(step, x, x, lambda x, t: torch.zeros_like(x), advance)
        assert bool(torch.isfinite(corrected.eps).all()) and corrected.variance is not None
        assert bool((torch.isfinite(corrected.variance) & (corrected.variance >= 0)).all())


@pytest.mark.parametrize("predicted", [0.0, torch.nan])
def test_noise_table_of_a_constant_network(predicted: float) -> None:
    recorder, x = NoiseRecorder(CorrectionConfig(interval=1), 4), torch.zeros(4, 3, 4, 4)
    recorder.begin(range(4), "cpu")

    def watch() -> None:
        for step in steps():
            recorder.correct(step, x, x, lambda x, t: torch.full_like(x, predicted), advance)

    if predicted == 0:
        watch()
        assert all(bool(torch.isfinite(values).all()) for values in recorder.table().to_tensors()[0].values())
    else:
        with pytest.raises(ValueError, match=r"^step 0: an estimate of the noise is NaN or infinite$"):
            watch()


@pytest.mark.parametrize("eps", [torch.zeros(6, 2, 4, 4), torch.full((6, 2, 4, 4), 1e20), noise(6, 2, 4, 4) * 1e-25])
@pytest.mark.parametrize("lack", [torch.zeros(6, 2, 4, 4), torch.full((6, 2, 4, 4), 0.7), noise(6, 2, 4, 4) * 1e-25])
def test_tracking_filters(eps: Tensor, lack: Tensor) -> None:
    kernel, constant, left = fit_filter(eps, torch.zeros_like(eps), lack)
    assert bool(torch.isfinite(kernel).all() and torch.isfinite(constant).all()) and left <= 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tracking_names_the_step(value: float) -> None:
    fitter = TrackingFitter([noise(6, 2, 4, 4)])
    with pytest.raises(ValueError, match=r"^step 0: what the prediction lacks is NaN or infinite$"):
        fitter.correct(steps()[0], torch.zeros(6, 2, 4, 4), torch.full((6, 2, 4, 4), value), lambda x, t: x, advance)
