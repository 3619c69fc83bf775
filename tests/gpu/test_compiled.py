"""The kernels compile for GPUs that are not there: the interpreter takes what a compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        (90, ["DiT"]),
        pytest.param(80, ["SD1", "Sana"], marks=pytest.mark.slow),
        pytest.param(100, ["SD3"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernels_compile(target: int, kinds: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "compiled.py"), str(target), *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert list(found) == kinds
    assert all({"attend_kernel", "convolve_kernel", "rows_kernel", "pointwise_kernel"} <= kernels for kernels in found.values())
    assert "Sana" not in found or "depthwise_kernel" in found["Sana"]
    assert len(list(tmp_path.rglob("*.cubin"))) > 10
