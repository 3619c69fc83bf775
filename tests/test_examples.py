"""examples/: each script runs as it stands, on a small pipeline with random weights of the kind that its model id names."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from script_runs import ROOT
from small_pipelines import made

EXAMPLES = (  # script, kind of tests/small_pipelines.py, arguments that make it short
    ("stable_diffusion", "SD1", ["--steps", "2", "--samples", "2"]),
    ("sdxl", "SDXL", ["--steps", "2", "--samples", "2"]),
    ("pixart", "PixArt sigma", ["--steps", "2", "--calls", "1"]),
    ("flux", "FLUX", ["--steps", "2", "--size", "16", "--tokens", "12"]),
    ("flux", "Z-Image", ["--steps", "2", "--size", "16", "--tokens", "12", "--guidance", "0"]),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "short"), EXAMPLES)
def test_example_runs(
    name: str, kind: str, short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(kind).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *short])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "bits in the mean: weights" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "compared.png") as picture:
        assert picture.size == (32, 16)
    again = DiffusionPipeline.from_pretrained(tmp_path / "out" / "quantized")
    assert type(again).__name__ == type(made(kind)).__name__


def test_every_example_is_run() -> None:
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == {name for name, _, _ in EXAMPLES}
