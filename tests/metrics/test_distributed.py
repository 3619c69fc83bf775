"""Two processes under Lightning Fabric give what one gives, and one line when an image is bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qncd.distributed import OneProcess

ROOT = Path(__file__).parents[2]


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "evaluator.py"), *map(str, arguments)]
    options = ["--features", "fashion_mnist", "--device", "cpu", "--no_cache", "--json", "-"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, make_images):
    make_images(tmp_path / "real", 13, 1)
    make_images(tmp_path / "synth", 11, 2)
    one, two = (evaluate(tmp_path / "real", tmp_path / "synth", "--batch_size", 3, "--devices", n) for n in (1, 2))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert json.loads(one.stdout) == json.loads(two.stdout)


@pytest.mark.slow
def test_a_bad_image_ends_all_processes_with_one_line(tmp_path, make_images):
    make_images(tmp_path / "real", 8, 1)
    make_images(tmp_path / "synth", 8, 2)
    path = tmp_path / "synth" / "000005_seed1239.png"
    path.write_bytes(path.read_bytes()[:-40])  # its header is whole
    done = evaluate(tmp_path / "real", tmp_path / "synth", "--batch_size", 2, "--devices", 2)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("000005_seed1239.png: not an image, or damaged") == 1 and "Traceback" not in done.stderr


def test_one_process_gathers_its_own_batch():
    processes, batch = OneProcess(), {"features": torch.zeros(2, 3)}
    assert processes.share(5) == 5 and processes.gather(batch) == [batch] and processes.gather(None) == []
    with pytest.raises(ValueError, match="broken"):
        processes.gather(None, "broken")
