"""The distillation script: the teacher's paths are kept, training goes on, and the folder is a pipeline of few steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from qncd.models.configs import read_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_paths_training_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(ROOT / "configs" / "scenes_turbo.yaml")
    config["training"]["distillation"] |= {"substeps": 1, "batch_size": 8, "snapshot_freq": 1}
    path = tmp_path / "tiny.yaml"

    def run(*further: str) -> None:
        path.write_text(yaml.safe_dump(config))
        words = ["--config", str(path), "--out", str(tmp_path / "run"), "--images", "16", "--precision", "32-true", *further]
        monkeypatch.setattr(sys, "argv", ["distill_text_to_image", *words])
        runpy.run_path(str(ROOT / "tools" / "distill_text_to_image.py"), run_name="__main__")

    run("--max_steps", "1")
    part = tmp_path / "run" / "paths" / "000000.safetensors"
    made = part.stat().st_mtime_ns
    run("--max_steps", "2")
    assert part.stat().st_mtime_ns == made
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline" and pipe.scheduler.config.rescale_betas_zero_snr
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "model").rglob("*")) <= 8e6
    image = pipe(
        "a large red circle above a small blue square", num_inference_steps=4, guidance_scale=1.0, output_type="np"
    ).images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    config["training"]["distillation"]["substeps"] = 2
    with pytest.raises(SystemExit):
        run("--max_steps", "2")
    assert "of other settings" in capsys.readouterr().err
