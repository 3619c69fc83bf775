"""Processes that a test starts and waits for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def running(folder: Path, *words: object, **variables: object) -> Iterator[subprocess.Popen[bytes]]:
    """`python WORDS` with these variables, killed in the end; what it prints goes to FOLDER/stdout and FOLDER/stderr."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **{k: str(v) for k, v in variables.items()})
    with (folder / "stdout").open("ab") as out, (folder / "stderr").open("ab") as err:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=out, stderr=err, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def python(code: str) -> None:
    """Run code in another process, with as many threads as this one has, and wait for it."""
    import torch  # takes seconds, which processes that `running` starts and that import this module need not

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def until(condition: Callable[[], object], patience: float) -> None:
    """Wait for so many seconds at most."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
