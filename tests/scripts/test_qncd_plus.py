"""--quant_mode qncd+ and its parts, as a user runs them on small random models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from .test_reconstruction_flags import common as common
from .test_reconstruction_flags import pixels, run, same

PLUS = ("--ptq", "--weight_bit", "4", "--act_bit", "6", "--quant_mode", "qncd+")


@pytest.fixture(scope="module")
def plus(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all parts, and its checkpoint q.safetensors."""
    folder = tmp_path_factory.mktemp("plus")
    run(common, folder, *PLUS, "--cali_ckpt", str(folder / "q.safetensors"))
    return folder


def test_a_checkpoint_gives_the_same_images_again(common: list[str], plus: Path, tmp_path: Path) -> None:
    checkpoint = plus / "q.safetensors"
    run(common, tmp_path / "two", *PLUS, "--cali_ckpt", str(checkpoint))
    assert same(pixels(plus / "images"), pixels(tmp_path / "two" / "images"))
    settings = json.loads((plus / "run.json").read_text())["settings"]
    assert settings["quantization"]["gptq"] and settings["quantization"]["stepwise_activations"]
    stored = load_file(checkpoint)
    assert stored["tracking.kernels"].shape == (4, 1, 2, 3, 3) and settings["offline_correction"] == "tracking"
    scales = {key: value for key, value in stored.items() if key.endswith(".scale")}
    assert scales and all(value.shape[0] == 4 for value in scales.values())  # a row for each of --timesteps 4
    with safe_open(checkpoint, "pt") as file:
        widths = json.loads(file.metadata()["act_bits"])
    assert settings["quantization"]["bit_allocation"] and len(set(widths.values())) > 2
    text = run(common, tmp_path / "three", *PLUS, "--no-gptq", "--cali_ckpt", str(checkpoint), status=2)
    assert "gptq True there, False asked for" in text
    # Weights of one run under new activation ranges.
    run(common, tmp_path / "four", *PLUS, "--resume_w", "--cali_ckpt", str(checkpoint), "--act_range", "max")
    again = load_file(tmp_path / "four" / "quantized.safetensors")
    weights = [key for key in stored if key.endswith(".weight_packed")]
    assert weights and all(stored[key].equal(again[key]) for key in weights)
    assert any(not stored[key].equal(again[key]) for key in scales)
    with safe_open(tmp_path / "four" / "quantized.safetensors", "pt") as file:
        assert set(json.loads(file.metadata()["act_bits"])) == set(widths)


@pytest.mark.slow
def test_each_part_changes_the_images(common: list[str], plus: Path, tmp_path: Path) -> None:
    parts = {
        "fixed": (), "nearest": ("--no-gptq",), "smoothed": ("--smooth_search",), "one_range": ("--no-stepwise_act",),
        "untracked": ("--no-tracking",),
    }  # fmt: skip
    for name, flags in parts.items():
        run(common, tmp_path / name, *PLUS, "--no-allocate_bits", *flags)
    seen = [pixels(folder / "images") for folder in (plus, *(tmp_path / name for name in parts))]
    assert not any(same(a, b) for a, b in itertools.combinations(seen, 2))
    run(common, tmp_path / "by_flags", *PLUS[:-1], "linear", "--quant_act", "--gptq", "--stepwise_act")
    settings = json.loads((tmp_path / "by_flags" / "run.json").read_text())["settings"]["quantization"]
    assert (
        settings["gptq"]
        and settings["bias_correction"]
        and settings["stepwise_activations"]
        and settings["weight_range"] == "max"
    )


def test_one_correction_at_a_time(common: list[str], tmp_path: Path) -> None:
    found = {}
    reverse = ("--sample_reverse", "2", "--no-allocate_bits")
    for name, mode, flags in (("reverse", "qncd+", reverse), ("tracking", "qncd", ("--tracking",))):
        run(common, tmp_path / name, *PLUS[:-1], mode, *flags)
        settings = json.loads((tmp_path / name / "run.json").read_text())["settings"]
        found[name] = (settings["correction"] is not None, settings["offline_correction"])
    assert found == {"reverse": (True, None), "tracking": (False, "tracking")}


def test_a_recipe_in_a_file_gives_the_images_of_its_flags(common: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mode: qncd+\nwidth: W4A6\ntracking: false\nbit_allocation: false\nsteps: 1\n")
    run(common, tmp_path / "flags", *PLUS, "--no-tracking", "--no-allocate_bits")
    run(common, tmp_path / "file", "--ptq", "--recipe", str(tmp_path / "r.yaml"))  # --cali_st 2 overrides its steps
    assert same(pixels(tmp_path / "flags" / "images"), pixels(tmp_path / "file" / "images"))
    settings = [json.loads((tmp_path / name / "run.json").read_text())["settings"] for name in ("flags", "file")]
    assert settings[0] == settings[1] and settings[0]["calibration"]["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recon",), "--recon with GPTQ"),
        (("--no-bias_correction",), "needs bias_correction"),
        (("--weight_only", "--smooth_search"), "--smooth_search is about quantized activations"),
        (("--weight_only", "--allocate_bits"), "--allocate_bits is about quantized activations"),
        (("--act_bit", "8", "--allocate_bits"), "more than act_bits 8: allowed with it are 2 to 7"),
        (("--weight_only", "--stepwise_act"), "--stepwise_act is about quantized activations"),
        (("--resume_w", "--gptq"), "--resume_w takes weights as they are"),
        (("--tracking", "--sample_reverse"), "--sample_reverse: --tracking is a correction too"),
        (("--quant_mode", "ptqd", "--tracking"), "--tracking: --quant_mode ptqd has a correction of its own"),
    ],
)
def test_contradictions_are_refused(common: list[str], tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    assert message in run(common, tmp_path / "out", *PLUS, *flags, status=2)
    assert not (tmp_path / "out").exists()
