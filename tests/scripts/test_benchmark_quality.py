"""The quality benchmark on a tiny model: its cells, its table, and going on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from script_runs import load_script

from qncd.app import parser as cli
from qncd.models.original.ddim import build_ddim_unet
from qncd.ptq.evaluation import NoiseErrorRecorder
from qncd.sampling.samplers import StepState
from qncd.sampling.schedule import Step

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_quality.py"
CONFIG: dict[str, Any] = {
    "data": {"dataset": "FASHION_MNIST", "image_size": 32, "channels": 1},
    "model": {
        "in_channels": 1, "out_ch": 1, "ch": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [],
        "num_groups": 4, "dropout": 0.0, "resamp_with_conv": True,
    },
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    module = load_script(SCRIPT)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("benchmark")
    torch.manual_seed(0)
    build_ddim_unet(CONFIG).save_pretrained(folder / "unet")
    (folder / "tiny.yml").write_text(yaml.safe_dump(CONFIG))
    return [
        "--config", str(folder / "tiny.yml"), "--ckpt", str(folder / "unet"), "--out", str(folder / "out"), "--device", "cpu",
        "--images", "4", "--timesteps", "2", "--seeds", "1", "--widths", "w4a8",
        "--modes", "linear", "qncd,correction=true", "--cali_iters", "3",
        "--batch_size", "3", "--cali_n", "4", "--cali_st", "2", "--interval", "1", "--jobs", "1",
    ]  # fmt: skip


def changed(arguments: list[str], flag: str, *values: str) -> list[str]:
    """The arguments with one flag's single value replaced."""
    at = arguments.index(flag)
    return [*arguments[: at + 1], *values, *arguments[at + 2 :]]


def test_run_resume_report(script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(arguments[arguments.index("--out") + 1])
    script.main(script.parse_args(arguments))
    table = capsys.readouterr().out
    content = json.loads((out / "quality.json").read_text())
    assert [(row["width"], row["mode"], row["seeds"]) for row in content["rows"]] == [
        ("FP", "FP", 1), ("W4A8", "linear", 1), ("W4A8", "qncd,correction=true", 1)
    ]  # fmt: skip
    assert content["missing"] == [] and len(content["cells"]) == 3
    full, linear, qncd = (record["figures"] for record in content["cells"])
    assert full.keys() == {"fid", "sfid", "megabytes"}
    for figures in (linear, qncd):
        assert all(len(figures[f"{key}_per_step"]) == 2 for key in ("noise_error", "gain", "bias"))
        assert figures["noise_error"] == pytest.approx(sum(figures["noise_error_per_step"]) / 2)
        assert 0 < figures["noise_error"] < 1
        assert figures["psnr"] > 10
        assert 1 / 8 < figures["megabytes"] / full["megabytes"] < 1 / 2  # 4 bits, with scales, norms and edge layers beside
    for record in content["cells"][1:]:
        kept = record["samples"]
        assert len(kept["first"]) == 4 and len(kept["worst"]) == len(kept["median"]) == 2
        for folder in ("FP", f"W4A8_{record['cell']['mode']}_seed0"):
            assert {path.name for path in (out / "samples" / folder).iterdir()} == set(kept["first"])
    row = content["rows"][1]
    assert row["fid_difference"]["mean"] == pytest.approx(linear["fid"] - full["fid"])
    settings = content["cells"][2]["settings"]
    recipe = settings["recipe"]
    assert recipe["quant"]["weight_bits"] == 4 and recipe["quant"]["split"] and recipe["reconstruction"]["iterations"] == 3
    assert recipe["smoothing"]["floor"] == 1.0 and recipe["correction"]["interval"] == 1
    text = (out / "quality.md").read_text()
    assert "| W4A8 | linear | " in text and "| W4A8 | qncd, correction | " in text and "Biased upwards" in text
    assert table.startswith("| width |") and all((out / f"quality{end}.png").stat().st_size > 1000 for end in ("", "_bars"))

    files = sorted(path for name in ("cells", "cache") for path in (out / name).iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    script.main(script.parse_args(arguments))
    assert [path.stat().st_mtime_ns for path in files] == times
    (out / "cells" / "W4A8_qncd,correction=true_seed0.json").write_text("{")  # damaged: as if it were not there
    script.main(script.parse_args([*arguments, "--report"]))
    assert json.loads((out / "quality.json").read_text())["missing"] == ["W4A8_qncd,correction=true_seed0"]

    # Other settings make their cells anew and leave the rest: the interval is none of linear's settings.
    script.main(script.parse_args(changed(arguments, "--interval", "2")))
    renewed = json.loads((out / "quality.json").read_text())
    assert renewed["cells"][:2] == content["cells"][:2]
    assert renewed["cells"][2]["settings"]["recipe"]["correction"]["interval"] == 2


def test_engines(script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Full precision and every mode are timed once, and the same command times nothing again.

    The cells themselves are those of the test before, where it ran.
    """
    out, words = Path(arguments[arguments.index("--out") + 1]), list(arguments)
    words.remove("qncd,correction=true")
    words += ["--engines", "onnxruntime"]
    script.main(script.parse_args(words))
    files = sorted((out / "engines").iterdir())
    assert [file.name for file in files] == ["FP.json", "W4A8_linear_seed0.json"]
    times = [file.stat().st_mtime_ns for file in files]
    record = json.loads(files[1].read_text())
    speed = record["images_per_second"]["onnxruntime"]
    assert speed == pytest.approx(16 / (2 * record["call_seconds"]["onnxruntime"])) and speed > 0
    rows = json.loads((out / "quality.json").read_text())["rows"]
    assert [row["images_per_second"]["onnxruntime"]["mean"] > 0 for row in rows] == [True, True]
    assert "images/s on onnxruntime" in capsys.readouterr().out
    script.main(script.parse_args(words))
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--images", "1", "--images 1: allowed are 2 or more"),
        ("--widths", "W9A8", "--widths W9A8: allowed are names such as W4A8"),
        ("--cali_st", "3", "cali_st 3: the sampler takes 2 steps"),
        ("--interval", "9", "--interval 9: none of the 2 steps would make an estimate"),
        ("--ckpt", "/no/such/folder", "/no/such/folder"),
    ],
)
def test_bad_input(
    script: ModuleType, arguments: list[str], flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run_main(script.main, script.parse_args(changed(arguments, flag, value)))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_engines_that_run_no_file_are_refused(
    script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run_main(script.main, script.parse_args([*arguments, "--engines", "triton"]))
    assert stop.value.code == 2
    assert "--engines triton: allowed are onnxruntime, openvino, tensorrt" in capsys.readouterr().err.splitlines()[-1]


def test_noise_error_is_relative_and_counts_the_first_images_only() -> None:
    reference = SimpleNamespace(denoiser=lambda conditions: lambda x, t: 2 * x)
    recorder = NoiseErrorRecorder(reference, images=3)  # type: ignore[arg-type]
    step = Step(0, 10, 0, 0.7, 0.7, 0.9, 0.4, 0.0, 0.0)
    x = torch.ones(2, 1, 4, 4)
    for error in (0.2, 0.4, 9.0):
        recorder(StepState(step, x, x, 2 * x + error, x, x))
    # Two images off by 0.2 and one by 0.4, against a prediction of 2 everywhere.
    assert recorder.error_per_step() == pytest.approx([(2 * 0.04 + 0.16) / (3 * 4)])
    assert recorder.bias_per_step() == pytest.approx([0.8 / 3])
    assert recorder.gain_per_step() == pytest.approx([1 + 0.8 / 3 / 2])
    assert recorder.mean_error() == pytest.approx(0.02)
