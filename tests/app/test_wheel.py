"""A wheel alone is enough: built, unpacked, and used from an empty folder with nothing else of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a large red circle above a small blue square"
ONE_AFTER_ANOTHER = "import json, sys; from qncd.app.console import main; [main(line) for line in json.loads(sys.argv[1])]"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, built from a copy so that the checkout keeps no build files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("qncd", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"setuptools builds no wheel here: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.slow
def test_a_wheel_alone_is_enough(unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import qncd; print(qncd.__file__)").strip() == str(unpacked / "qncd" / "__init__.py")
    assert {path.name for path in (unpacked / "qncd" / "configs").iterdir()} == {p.name for p in (ROOT / "configs").iterdir()}
    (points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "qncd = qncd.app.console:main" in points.read_text()
    assert "  sample " in run("-m", "qncd", "--help")
    assert run("-m", "qncd", "export", "--help").startswith("usage: qncd export ")
    sample = ("sample", "--device", "cpu")
    run("-m", "qncd", *sample, "--max_images", "2", "--timesteps", "5", "-l", "out")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    lines = [
        ["evaluate", "fashion_mnist", "out/images", "--features", "fashion_mnist", "--metrics", "fid"],
        [*sample, "--config", "configs/fashion_mnist_ldm.yaml", "-n", "2", "-c", "2", "--outdir", "latent"],
        [*sample, "--prompt", PROMPT, "--ddim_steps", "5", "--outdir", "out2"],
    ]
    assert run("-c", ONE_AFTER_ANOTHER, json.dumps(lines)).startswith("FID ")
    assert len(list((tmp_path / "out2" / "images").iterdir())) == 3
