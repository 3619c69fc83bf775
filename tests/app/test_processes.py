"""A sampling command in several processes: the same checkpoint and images as one, and nothing lost when they are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from script_runs import run_in_process

ROOT = Path(__file__).parents[2]
SCRIPT = "sample_diffusion_ddim.py"
IMAGES = 40


def arguments(folder: Path) -> list[str]:
    """A short run that calibrates with a control, and samples in batches of 4."""
    words = f"--config {ROOT}/configs/fashion_mnist.yml --timesteps 4 --max_images {IMAGES} --batch_size 4 --lane 4 --device cpu"
    quantized = f"--ptq --quant_mode qncd --weight_bit 8 --cali_n 8 --cali_st 2 --cali_ckpt {folder}/quantized.safetensors"
    return [*words.split(), *quantized.split(), "-l", str(folder / "run")]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "run" / "images").glob("[0-9]*.png")}


def checkpoint(folder: Path) -> dict[str, object]:
    with safe_open(folder / "quantized.safetensors", "pt") as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()} | file.metadata()  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_what_two_processes_leave_one_takes_over(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_in_process(SCRIPT, *arguments(one))
    command = [sys.executable, str(ROOT / "scripts" / SCRIPT), *arguments(two), "--devices", "2"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as first:
        end = time.monotonic() + 300
        while len(images(two)) < 4 and first.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        first.kill()
    time.sleep(0.5)  # the worker has ended too, and writes no more
    begun = images(two)
    assert 4 <= len(begun) < IMAGES, "it was killed on its way"
    assert checkpoint(two) == checkpoint(one)
    run_in_process(SCRIPT, *arguments(two))
    assert images(two) == images(one) and len(images(one)) == IMAGES
    assert begun.items() <= images(one).items()
