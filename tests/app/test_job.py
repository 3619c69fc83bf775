"""A run goes on where it can: NaN images are named, batches that are too large are halved, batches that matter stay whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qncd.app.job import ImagePlan, SamplingJob
from qncd.io.images import image_name
from qncd.io.runs import open_run


class Diffusion:
    """Stands for a model: sample i is full of seed i / 100, after `problem` had its say."""

    def __init__(self, problem: Callable[[list[int], torch.Tensor], None] = lambda *_: None) -> None:
        self.problem, self.batches = problem, []  # type: ignore[var-annotated]

    def sample(self, seeds: Sequence[int], *_: Any, **__: Any) -> torch.Tensor:
        x = torch.tensor(seeds)[:, None, None, None].expand(-1, 1, 2, 2) / 100
        self.problem(list(seeds), x := x.clone())
        self.batches.append(list(seeds))
        return x


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., SamplingJob]:
    def make(count: int = 10, batch_size: int = 4, **plan: Any) -> SamplingJob:
        run = open_run(tmp_path / "run", {"seed": 0})
        run.release()
        return SamplingJob(run, ImagePlan(count, lambda i: i, **plan), batch_size)

    return make


def indices(job: SamplingJob) -> set[int]:
    return job.run.existing_indices("images")


def test_nan_images_are_named_and_the_rest_is_made(
    make_job: Callable[..., SamplingJob], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(seeds: list[int], x: torch.Tensor) -> None:
        for row, seed in enumerate(seeds):
            if seed in (3, 8):
                x[row, 0, 1] = float("nan") if seed == 3 else float("inf")

    job = make_job()
    job.sample_images(Diffusion(spoil), "images", None, "W8A8")  # type: ignore[arg-type]
    assert indices(job) == set(range(10)) - {3, 8}
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "image 3 (seed 3) holds NaN and is not written",
        "image 8 (seed 8) holds NaN and is not written",
    ]
    with pytest.raises(SystemExit) as stop:
        job.finish("W8A8", compared=False, savez=True)
    assert stop.value.code == 1
    assert "2 of 10 images hold NaN and are not there: 3, 8" in caplog.text
    assert json.loads((job.run.folder / "run.json").read_text())["figures"]["images_with_nan"] == [3, 8]
    assert len(np.load(job.run.folder / "samples.npz")["arr_0"]) == 8
    # The next start tries them again.
    job.sample_images(mended := Diffusion(), "images", None, "W8A8")  # type: ignore[arg-type]
    assert mended.batches == [[3, 8]] and indices(job) == set(range(10))
    job.finish("W8A8", compared=False)


def test_nan_of_the_decoder_is_found_too(make_job: Callable[..., SamplingJob]) -> None:
    from qncd.io.images import to_uint8

    def decode(x: torch.Tensor) -> np.ndarray:
        return to_uint8(torch.where(x == 0.05, torch.nan, x))

    job = make_job(decode=decode)
    job.sample_images(Diffusion(), "images", None, "FP32")  # type: ignore[arg-type]
    assert indices(job) == set(range(10)) - {5}


def test_a_batch_that_does_not_fit_is_halved(make_job: Callable[..., SamplingJob], caplog: pytest.LogCaptureFixture) -> None:
    def narrow(seeds: list[int], _: torch.Tensor) -> None:
        if len(seeds) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")

    job = make_job()
    job.sample_images(narrowed := Diffusion(narrow), "images", None, "FP32")  # type: ignore[arg-type]
    assert narrowed.batches == [[i] for i in range(10)] and indices(job) == set(range(10))
    assert "4 images do not fit into the memory at once: 2 at a time" in caplog.text

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(ValueError, match="not even one image fits into the memory"):
        make_job(11).sample_images(Diffusion(never), "images", None, "FP32")  # type: ignore[arg-type]


def test_other_errors_end_the_run(make_job: Callable[..., SamplingJob]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        make_job().sample_images(Diffusion(fail), "images", None, "FP32")  # type: ignore[arg-type]


def test_batches_that_matter_stay_whole(make_job: Callable[..., SamplingJob]) -> None:
    """Where the correction takes its statistics by batch, an image depends on the others of its batch."""
    job = make_job()
    job.sample_images(Diffusion(), "images", None, "W8A8", True)  # type: ignore[arg-type]
    for index in (1, 9):
        (job.run.folder / "images" / image_name(index, index)).unlink()
    job.sample_images(again := Diffusion(), "images", None, "W8A8", True)  # type: ignore[arg-type]
    assert again.batches == [[0, 1, 2, 3], [8, 9]]

    def narrow(*_: Any) -> None:
        raise MemoryError

    with pytest.raises(ValueError, match="a batch of 4 images does not fit into the memory; a smaller one is another run"):
        make_job(12).sample_images(Diffusion(narrow), "images", None, "W8A8", True)  # type: ignore[arg-type]
