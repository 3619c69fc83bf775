"""scripts/sample_diffusion_ldm.py as its user runs it, on small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

QUANTIZED = (
    "--ptq", "--quant_mode", "qncd", "--weight_bit", "4", "--no-recon", "--cali_n", "8", "--cali_st", "2",
    "--reverse_interval", "2",
)  # fmt: skip


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_classes_in_turn_with_guidance(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("-r", latent_folder("class"), "-n", 6, "-c", 5, "-e", 0)
    log = run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "a", *QUANTIZED, "--compare_fp")
    assert "PSNR to full precision" in log
    assert len(pixels(tmp_path / "a" / "images")) == len(pixels(tmp_path / "a" / "fp")) == 6
    lines = (tmp_path / "a" / "labels.csv").read_text().splitlines()
    assert lines[:2] == ["file,class", "000000_seed1234.png,0"] and [line[-1] for line in lines[1:]] == list("012301")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["settings"]["guidance"] == 3.0 and record["settings"]["sampler"]["convention"] == "ldm"
    assert record["settings"]["correction"]["interval"] == 2 and record["settings"]["smoothing"]
    assert (tmp_path / "a" / "contact_sheet.png").is_file()
    # Another batch size and an interruption change no image.
    for path in list((tmp_path / "a" / "images").iterdir())[::2]:
        path.unlink()
    before = pixels(tmp_path / "a" / "images")
    log = run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "a", *QUANTIZED, "--compare_fp", "--batch_size", 1)
    after = pixels(tmp_path / "a" / "images")
    assert len(after) == 6 and all(np.array_equal(after[name], image) for name, image in before.items())
    # The class and the guidance matter.
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "b", "--classes", "2", "--scale", 1)
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "c", "--classes", "3", "--scale", 1)
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "d", "--classes", "3", "--scale", 4)
    b, c, d = (pixels(tmp_path / name / "images")["000000_seed1234.png"] for name in "bcd")
    assert not np.array_equal(b, c) and not np.array_equal(c, d)


@pytest.mark.parametrize("flags", [("--dpm",), ("-v",), ("-e", "1"), ("--skip_type", "quad", "-e", "0")])
def test_unconditional_with_each_sampler(
    run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path, flags: tuple[str, ...], monkeypatch: Any
) -> None:
    if "-v" in flags:  # 1000 steps: enough to see that they are asked for
        from qncd.sampling import diffusion

        seen: list[int] = []
        monkeypatch.setattr(diffusion, "sample", lambda *a, **k: (seen.append(a[0].timesteps), a[2](k.get("x", _noise(a)), 5))[1])
        run_script("sample_diffusion_ldm.py", "-r", latent_folder("none"), "-n", 1, "-l", tmp_path / "o", "--lane", 1, *flags)
        assert seen == [1000]
        return
    common = ("-r", latent_folder("none"), "-n", 2, "-c", 4, "-l", tmp_path / "o")
    run_script("sample_diffusion_ldm.py", *common, *flags, *QUANTIZED, "--cali_ckpt", tmp_path / "q.safetensors", "--lane", 4)
    assert len(pixels(tmp_path / "o" / "images")) == 2 and not (tmp_path / "o" / "labels.csv").exists()
    first = pixels(tmp_path / "o" / "images")
    resumed = ("-r", latent_folder("none"), "-n", 2, "-c", 4, "-l", tmp_path / "p", *flags, *QUANTIZED, "--lane", 4)
    run_script("sample_diffusion_ldm.py", *resumed, "--cali_ckpt", tmp_path / "q.safetensors", "--resume")
    again = pixels(tmp_path / "p" / "images")
    assert all(np.array_equal(again[name], image) for name, image in first.items())


def _noise(arguments: tuple[Any, ...]) -> Any:
    import torch

    return torch.zeros(len(arguments[4]), *arguments[3])


def test_weights_of_a_checkpoint_with_new_activation_ranges(
    run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    common = ("-r", latent_folder("none"), "-n", 2, "-c", 4, "-e", 0, "--lane", 4, *QUANTIZED)
    weights = tmp_path / "w.safetensors"
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "w", "--weight_only", "--cali_ckpt", weights)
    size = weights.stat().st_mtime_ns
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "a", "--act_bit", 6, "--cali_ckpt", weights, "--resume_w")
    assert weights.stat().st_mtime_ns == size, "the weights' checkpoint is left alone"
    assert (tmp_path / "a" / "quantized.safetensors").is_file()
    w, a = (pixels(tmp_path / name / "images") for name in "wa")
    assert any(not np.array_equal(w[name], a[name]) for name in w)
    log = run_script(
        "sample_diffusion_ldm.py",
        *common,
        "-l",
        tmp_path / "b",
        "--weight_bit",
        8,
        "--cali_ckpt",
        weights,
        "--resume_w",
        status=2,
    )
    assert "weight_bits 4 there, 8 asked for" in log


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("none", ("--scale", "2"), "--scale 2: "),
        ("none", ("--cond",), "is unconditional: allowed without --cond and --classes"),
        ("class", ("--classes", "1,9"), "--classes 1,9: allowed are 0 to 4"),
        ("class", ("--classes", "a"), "--classes a: expected whole numbers with commas between them"),
        ("class", ("--scale", "-1"), "--scale -1.0: allowed are finite numbers from 0 on"),
        ("class", ("-c", "1000"), "--custom_steps 1000: latent-diffusion's uniform spacing would end at time step 1000"),
        ("class", ("-c", "1001"), "--custom_steps 1001: allowed are 1 to 1000"),
        ("class", ("--classes=-1",), "--classes -1: allowed are whole numbers from 0 on"),
        ("class", ("--classes", "1,,2"), "--classes 1,,2: expected whole numbers with commas between them"),
        ("class", ("--scale", "inf"), "--scale inf: allowed are finite numbers from 0 on"),
        ("class", ("-e", "nan"), "--eta nan: allowed are numbers from 0 to 1"),
        ("class", ("--ptq", "-c", "4", "--cali_st", "5"), "cali_st 5: the sampler takes 4 steps; allowed are 1 to 4"),
        ("class", ("-v", "--dpm"), "--vanilla_sample is DDPM: it excludes --dpm and --eta other than 1"),
        ("class", ("--dpm", "-e", "1"), "--eta 1.0 with sample_type dpm_solver: allowed is 0"),
        (
            "class",
            ("--ptq", "--quant_mode", "qncd", "--a_min_max", "--act_range", "mse"),
            "--a_min_max contradicts --running_stat and --act_range mse",
        ),
        (
            "class",
            ("--ptq", "--quant_mode", "qncd", "--resume_w"),
            "--resume_w needs a quantized checkpoint: --cali_ckpt None is none",
        ),
        ("class", ("--emb_float",), "--emb_float needs --ptq"),
        ("text", (), "takes prompts: scripts/txt2img.py samples it"),
    ],
)
def test_bad_flags(
    run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path, kind: str, flags: tuple[str, ...], message: str
) -> None:
    log = run_script("sample_diffusion_ldm.py", "-r", latent_folder(kind), "-l", tmp_path / "o", *flags, status=2)
    line = log.splitlines()[-1]
    assert line.startswith("sample_diffusion_ldm.py: error: ") and message in line
    assert log.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_brings_its_yaml(run_script: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "model.ckpt")
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text("model: {}")
    log = run_script("sample_diffusion_ldm.py", "-r", tmp_path / "model.ckpt", "-l", tmp_path / "o", status=2)
    assert "which yaml describes it? 2 lie beside it: name one with --config" in log
    log = run_script("sample_diffusion_ldm.py", "-r", tmp_path / "none.ckpt", "-l", tmp_path / "o", status=2)
    assert "none.ckpt: no such checkpoint" in log


def test_reconstruction_changes_the_weights_and_goes_on(
    run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    common = ("-r", latent_folder("class"), "-n", 2, "-c", 4, "-e", 0, "--lane", 4, *QUANTIZED)
    recon = ("--recon", "--cali_iters", 3, "--recon_inputs", 8)
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "nearest")
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "a", *recon, "--cali_ckpt", tmp_path / "q.safetensors")
    blocks = list((tmp_path / "a" / "reconstruction").glob("*.safetensors"))
    assert len(blocks) > 10
    run_script("sample_diffusion_ldm.py", *common, "-l", tmp_path / "b", *recon, "--cali_ckpt", tmp_path / "q.safetensors")
    nearest, a, b = (pixels(tmp_path / name / "images") for name in ("nearest", "a", "b"))
    assert all(np.array_equal(a[name], b[name]) for name in a) and any(not np.array_equal(a[name], nearest[name]) for name in a)
    for flags, message in (
        (("--recon", "--cali_iters", 4), "was reconstructed otherwise"),
        (("--recon", "--cali_iters", 0), "--cali_iters 0: allowed are whole numbers, 1 or more"),
        (("--cali_iters", 4), "--cali_iters needs --recon"),
    ):
        log = run_script(
            "sample_diffusion_ldm.py", *common, "-l", tmp_path / "c", *flags, "--cali_ckpt", tmp_path / "q.safetensors", status=2
        )
        assert message in log.splitlines()[-1]


@pytest.mark.parametrize("mode", ["qdiff", "ptqd", "tfmq", "d2dpm"])
def test_peers(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path, mode: str) -> None:
    common = ("-r", latent_folder("class"), "-n", 2, "-c", 4, "-e", 0, "--lane", 4, *QUANTIZED[:-2], "--quant_mode", mode)
    fast = ("--recon", "--cali_iters", 2, "--recon_inputs", 8, "--cali_ckpt", tmp_path / "q.safetensors")
    run_script("sample_diffusion_ldm.py", *common, *fast, "-l", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
    assert record["quantization"]["weight_range"] == "mse" and record["quantization"]["act_bits"] == 8
    assert record["reconstruction"]["iterations"] == 2 and record["correction"] is None and record["smoothing"] is None
    assert record["offline_correction"] == (mode if mode in ("ptqd", "d2dpm") else None)
    run_script("sample_diffusion_ldm.py", *common, *fast, "-l", tmp_path / "b")
    a, b = (pixels(tmp_path / name / "images") for name in "ab")
    assert all(np.array_equal(a[name], b[name]) for name in a), "the statistics are in the checkpoint"
    if mode in ("ptqd", "d2dpm"):
        log = run_script("sample_diffusion_ldm.py", *common, "--sample_reverse", "-l", tmp_path / "c", status=2)
        assert f"--sample_reverse: --quant_mode {mode} has a correction of its own" in log
