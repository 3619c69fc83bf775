"""Calibration runs of a sampler."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qncd.distributed import OneProcess
from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import sample_calibration
from qncd.ptq.runs import DiffusionRuns
from qncd.recipe import CalibrationConfig, CorrectionConfig, Recipe, SamplerConfig
from qncd.sampling.correctors.offline_noise import OfflineRecorder
from qncd.sampling.correctors.runtime import NoiseRecorder
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))


def test_a_set_is_sampled_along_the_models_own_trajectories(make_unet: Any) -> None:
    diffusion = Diffusion(network_of(make_unet()), PROCESS, SamplerConfig(timesteps=5), (3, 8, 8), lane=4)

    def sampled(config: CalibrationConfig, model_hash: str | None = None) -> tuple[CalibrationSet, Any]:
        return sample_calibration(DiffusionRuns(diffusion, config), Recipe(correction=None, calibration=config), model_hash)

    data, table = sampled(CalibrationConfig(samples=6, steps=2, batch_size=4), "h")
    assert table is None and data.model_hash == "h" and data.t.tolist() == [600] * 6 + [200] * 6
    again, _ = sampled(CalibrationConfig(samples=6, steps=2, batch_size=6))
    torch.testing.assert_close(again.x, data.x, rtol=0, atol=0)
    other, _ = sampled(CalibrationConfig(samples=6, steps=2, seed=1))
    assert not torch.allclose(other.x, data.x, atol=0.1)


class Together(OneProcess):
    """One of several threads that stand in for processes."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.world, self.is_first = rank, len(slots), rank == 0
        self.slots, self.barrier = slots, barrier

    def everyone(self, value: Any) -> list[Any]:
        self.barrier.wait(60)
        self.slots[self.rank] = pickle.dumps(value)
        self.barrier.wait(60)
        return [pickle.loads(slot) for slot in self.slots]

    def agree(self, error: str | None) -> None:
        for message in self.everyone(error):
            super().agree(message)


def in_all(world: int, function: Callable[[Together], Any]) -> list[Any]:
    """What `function` returns or raises in each of `world` processes."""
    slots, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = function(Together(rank, slots, barrier))
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def all_runs(make_unet: Any, processes: OneProcess) -> list[torch.Tensor]:
    """What the runs of a network and of a changed one show, as tensors."""
    exact, rough = (
        Diffusion(network_of(make_unet(seed)), PROCESS, SamplerConfig(timesteps=3, eta=1.0), (3, 8, 8), lane=2) for seed in (0, 1)
    )
    runs = DiffusionRuns(exact, CalibrationConfig(samples=5, steps=2, batch_size=4), processes=processes)
    recorder, pairs, norms = NoiseRecorder(CorrectionConfig(interval=2)), OfflineRecorder(), []
    data = runs.calibration_set(recorder)
    kept, ends = runs.predictions(), runs.trajectory(5)
    runs.diffusion = rough
    runs.compare(kept, pairs)
    runs.compare(kept, lambda step, x, quantized, full: norms.append((quantized - full).norm()))  # says not what it keeps
    tensors, _ = recorder.table().to_tensors()
    statistics, _ = pairs.statistics().to_tensors()
    return [data.x, data.t, *tensors.values(), *statistics.values(), torch.stack(norms), *ends]


@pytest.mark.parametrize("world", [2, 4])  # of 3 lanes
def test_any_number_of_processes_sees_what_one_sees(make_unet: Any, world: int) -> None:
    torch.manual_seed(0)
    one = all_runs(make_unet, OneProcess())
    lock = threading.Lock()

    def locked(**settings: Any) -> Any:  # seeds are the process's own, not the thread's
        with lock:
            return make_unet(**settings)

    for several in in_all(world, lambda processes: all_runs(lambda seed: locked(seed=seed), processes)):
        assert len(several) == len(one)
        assert all(torch.equal(there, here) for there, here in zip(several, one, strict=True))


def test_what_goes_wrong_in_one_process_is_told_in_all(make_unet: Any) -> None:
    diffusion = Diffusion(network_of(make_unet()), PROCESS, SamplerConfig(timesteps=4), (3, 8, 8), lane=2)

    class Watcher(OfflineRecorder):
        def __call__(self, step: Any, x: torch.Tensor, *_: Any) -> None:
            if threading.current_thread() is not threading.main_thread() and broken == [threading.get_ident()]:
                raise ValueError("broken here")

    broken: list[int] = []

    def run(processes: Together) -> None:
        runs = DiffusionRuns(diffusion, CalibrationConfig(samples=4, steps=2), processes=processes)
        if processes.rank == 1:
            broken.append(threading.get_ident())
        runs.compare(runs.predictions(), Watcher())

    assert [str(error) for error in in_all(2, run)] == ["broken here"] * 2
