"""The reconstruction benchmark on a small random UNet: its transcription of the published loop is what ours computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from script_runs import load_script

from qncd.models.network import network_of
from qncd.ptq.blocks import open_layers
from qncd.ptq.context import copied
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages import reconstruction
from qncd.ptq.stages.prepare import quantize_
from qncd.quant.rounding import LearnedRounding
from qncd.recipe import QuantConfig, ReconstructionConfig

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmark_reconstruction.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def inputs(count: int, seed: int = 0) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    return CalibrationSet(torch.randn(count, 3, 8, 8, generator=generator), torch.randint(0, 1000, (count,), generator=generator))


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0", "mid_block.attentions.0", "conv_out"])
def test_the_published_loop_and_ours_agree(script: ModuleType, make_unet: Any, tmp_path: Path, name: str) -> None:
    """With equal settings: the same batches, so the same rounding; what is measured is time and settings alone."""
    network = quantize_(make_unet(), QuantConfig(4, 8))
    block = script.block_data(network, copied(network), name, inputs(24), str(tmp_path))
    layers = open_layers(block.unit, ())
    ours = {key: LearnedRounding(layer) for key, layer in layers.items()}
    published = {key: script.PublishedRounding(layer) for key, layer in layers.items()}
    start = {key: rounding.hard() for key, rounding in ours.items()}
    reconstruction._optimize(block, ours, ReconstructionConfig(40, 8, 5e-2))
    script.published_loop(block, published, 40, 8, 5e-2)
    pairs = [(ours[key].hard(), published[key].hard(), start[key]) for key in layers]
    same = torch.cat([torch.isclose(a, b).flatten() for a, b, _ in pairs]).float().mean()
    moved = torch.cat([(~torch.isclose(a, s)).flatten() for a, _, s in pairs]).float().mean()
    assert same > 0.995 and moved > 0.02, (float(same), float(moved))


def test_three_reports(
    script: ModuleType, make_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "load", lambda model, count, seed=0: (network_of(make_unet()), inputs(count, seed)))
    monkeypatch.setattr(
        "sys.argv", ["benchmark_reconstruction.py", "--model", "ddim", "--rounds", "1", "--json", str(tmp_path / "s")]
    )
    script.main(script.parse_args())
    speed = json.loads((tmp_path / "s").read_text())["ddim"]
    assert len(speed["blocks"]) > 10 and speed["ratio"] == pytest.approx(speed["ours_ms"] / speed["published_ms"])
    assert "of the published loop's time" in capsys.readouterr().out
    flags = ["--quality", "--model", "ddim", "--block", "conv_out", "--inputs", "16", "--iterations", "2", "60"]
    flags += ["--settings", "published", "0.05:8", "published@5", "--json", str(tmp_path / "q")]
    monkeypatch.setattr("sys.argv", ["benchmark_reconstruction.py", *flags])
    script.main(script.parse_args())
    rows = json.loads((tmp_path / "q").read_text())["quality"]
    assert [(row["settings"], row["iterations"]) for row in rows] == [
        (s, n) for n in (2, 60) for s in ("published", "0.05:8")
    ] + [("published", 5)]
    assert rows[3]["of_nearest"] < min(0.99, rows[1]["of_nearest"]) and all(row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(script, "ACT_ITERATIONS", 20)
    flags = ["--steps", "--model", "ddim", "--inputs", "32", "--widths", "W8A3", "--json", str(tmp_path / "a")]
    monkeypatch.setattr("sys.argv", ["benchmark_reconstruction.py", *flags])
    script.main(script.parse_args())
    (row,) = json.loads((tmp_path / "a").read_text())["steps"]
    assert 0 < row["after"] < row["before"] and 0 < row["kept"] <= row["blocks"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--settings", "fast"], r"^--settings fast: allowed are published, default and LR:BATCH, e.g. 0.01:16$"),
        (["--settings", "published@0"], r"^--settings published@0: allowed behind @ are whole numbers, 1 or more$"),
        (["--steps", "--widths", "W9A9"], r"^--widths W9A9: allowed are names such as W4A8, 2 to 8 bits each$"),
        (["--steps", "--quality"], r"^--steps and --quality exclude one another$"),
        (["--iterations", "0"], r"^--iterations 0: allowed are whole numbers, 1 or more$"),
        (["--block", "conv_in"], r"^--block needs --quality and one --model$"),
    ],
)
def test_bad_input(script: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark_reconstruction.py", *flags])
    with pytest.raises(ValueError, match=message):
        script.main(script.parse_args())
