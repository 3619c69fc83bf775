"""scripts/sample_diffusion_ddim.py as its user runs it, on a small random UNet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from script_runs import run_in_process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "sample_diffusion_ddim.py"
CONFIG = {
    "data": {"dataset": "NONE", "image_size": 16, "channels": 1},
    "model": {"in_channels": 1, "out_ch": 1, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1,
              "attn_resolutions": [8], "num_groups": 2},
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yml and a random UNet in unet/."""
    from qncd.models.original.ddim import build_ddim_unet

    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.yml").write_text(yaml.safe_dump(CONFIG))
    torch.manual_seed(0)
    build_ddim_unet(CONFIG).save_pretrained(folder / "unet")
    return folder


def run(model: Path, out: Path, *arguments: str, status: int = 0) -> str:
    """Run the script on the small model; returns what it wrote to stderr."""
    command = ["--config", str(model / "tiny.yml"), "--ckpt", str(model / "unet"), "-l", str(out), "--timesteps", "5"]
    common = [*command, "--cali_n", "4", "--cali_st", "2"]
    return run_in_process("sample_diffusion_ddim.py", *common, *arguments, status=status)


def test_as_a_process(model: Path, tmp_path: Path) -> None:
    """One real process, from another folder: exit status, one line on stderr, no traceback."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--config",
        str(model / "tiny.yml"),
        "--ckpt",
        "nowhere.pt",
        "-l",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "nowhere.pt" in done.stderr


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_papers_flags_whole_run_and_checkpoint(model: Path, tmp_path: Path) -> None:
    """The paper's command line (smaller), then the same from the quantized checkpoint: identical pixels."""
    checkpoint = tmp_path / "q.safetensors"
    paper = ["--eta", "0", "--skip_type", "quad", "--ptq", "--weight_bit", "8", "--quant_mode", "qncd"]
    paper += ["--cali_ckpt", str(checkpoint), "--sample_reverse", "2", "--max_images", "5"]
    run(model, tmp_path / "a", *paper, "--compare_fp", "--savez", "--sequence")
    out = tmp_path / "a"
    assert sorted(pixels(out / "images")) == [f"{i:06d}_seed{1234 + i}.png" for i in range(5)]
    assert np.load(out / "samples.npz")["arr_0"].shape == (5, 16, 16, 3)
    for name in ("contact_sheet.png", "sequence.png"):
        assert np.asarray(Image.open(out / name)).std() > 0
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["quantization"]["act_bits"] == 8 and record["settings"]["smoothing"] is not None
    assert record["settings"]["correction"]["interval"] == 2
    assert record["figures"]["psnr_to_fp_db"] > 10  # random weights: far from what a trained model reaches
    assert not same(pixels(out / "fp"), pixels(out / "images"))
    loaded = run(model, tmp_path / "b", *paper, "--resume")
    assert "loaded" in loaded
    assert same(pixels(out / "images"), pixels(tmp_path / "b" / "images"))


@pytest.mark.parametrize("extra", [[], ["--eta", "1"], ["--sample_type", "ddpm_noisy"], ["--sample_type", "dpm_solver"]])
def test_batch_size_changes_no_pixel_and_a_cut_off_run_goes_on(model: Path, tmp_path: Path, extra: list[str]) -> None:
    quantized = ["--ptq", "--quant_mode", "qncd", "--weight_bit", "4", "--no-recon", "--sample_reverse", "2", *extra]
    run(model, tmp_path / "a", *quantized, "--max_images", "7", "--batch_size", "7")
    run(model, tmp_path / "b", *quantized, "--max_images", "3", "--batch_size", "1")
    first = pixels(tmp_path / "b" / "images")
    victim = tmp_path / "b" / "images" / "000001_seed1235.png"
    victim.write_bytes(victim.read_bytes()[:-20])  # as a kill or a full disk would leave it, were writing not atomic
    run(model, tmp_path / "b", *quantized, "--max_images", "7", "--batch_size", "2")
    assert same(pixels(tmp_path / "a" / "images"), pixels(tmp_path / "b" / "images"))
    assert len(first) == 3


def test_a_correction_that_is_fitted_anew_says_so(model: Path, tmp_path: Path) -> None:
    quantized = ["--ptq", "--weight_bit", "8", "--quant_mode", "qncd", "--sample_reverse", "2", "--max_images", "1"]
    quantized += ["--cali_ckpt", str(tmp_path / "q.safetensors")]
    run(model, tmp_path / "a", *quantized)
    assert "fitted" not in run(model, tmp_path / "b", *quantized)
    log = run(model, tmp_path / "c", *quantized, "--eta", "1")
    assert "q.safetensors: its noise correction was fitted otherwise (eta 0.0 there, 1.0 asked for): fitted anew" in log


@pytest.mark.slow
def test_switches_act(model: Path, tmp_path: Path) -> None:
    """Each part of the method changes the images when it is switched off."""
    base = [
        "--ptq", "--quant_mode", "qncd", "--weight_bit", "4", "--no-recon", "--act_bit", "4", "--max_images", "2",
        "--cali_batch_size", "2",
    ]  # fmt: skip
    results = {}
    variants: dict[str, list[str]] = {
        "qncd": [], "no_split": ["--no-split"], "weights": ["--weight_only"], "linear": ["--quant_mode", "linear"],
        "published": ["--sample_reverse", "--reverse_target", "paper", "--no-reverse_control", "--reverse_statistics", "batch"],
        "softmax": ["--sm_abit", "2"], "symmetric": ["--a_sym"], "extremes": ["--act_range", "max"],
        "biased": ["--no-bias_correction"], "more": ["--cali_n", "16"], "running": ["--cali_n", "16", "--running_stat"],
    }  # fmt: skip
    for name, flags in variants.items():
        run(model, tmp_path / name, *base, *flags)
        results[name] = b"".join(image.tobytes() for image in pixels(tmp_path / name / "images").values())
    settings = {n: json.loads((tmp_path / n / "run.json").read_text())["settings"] for n in variants}
    assert settings["linear"]["quantization"]["act_bits"] is None  # the original's meaning: activations need --quant_act
    assert settings["linear"]["correction"] is None
    for name in ("weights", "linear", "published", "softmax", "symmetric", "no_split", "extremes", "biased"):
        assert results[name] != results["qncd"], name
    assert results["running"] != results["more"]  # 16 inputs move the ranges once: fewer are one move, the extremes


BAD = [
    (["--ptq", "--quant_mode", "qncd", "--weight_bit", "9"], "--weight_bit 9: allowed are whole numbers, 2 to 8"),
    (["--ptq", "--quant_mode", "qncd", "--sm_abit", "1"], "--sm_abit 1: allowed are whole numbers, 2 to 16"),
    (["--max_images", "0"], "--max_images 0: allowed are whole numbers, 1 or more"),
    (["--timesteps", "1001"], "--timesteps 1001: allowed are 1 to 1000"),
    (["--eta", "2"], "--eta 2.0: allowed are numbers from 0 to 1"),
    (["--sample_reverse"], "--sample_reverse corrects a quantized network: it needs --ptq"),
    (["--ptq", "--quant_mode", "qncd", "--sample_reverse", "3", "--reverse_interval", "4"], "name two intervals"),
    (["--ptq", "--quant_mode", "qncd", "--resume"], "--resume needs a quantized checkpoint"),
    (["--cali_ckpt", "x"], "--cali_ckpt needs --ptq"),
    (["--quant_mode", "qdrop"], "invalid choice: 'qdrop'"),
    (["--ckpt", "nowhere.ckpt"], "nowhere.ckpt"),
    (["--config", "nowhere.yml"], "nowhere.yml: no such config file"),
    (
        ["--ptq", "--quant_mode", "qncd", "--cali_n", "3", "--sample_reverse"],
        "the full-precision noise table needs 4 images or more, not 3",
    ),
    (["--ptq", "--quant_mode", "qncd", "--cali_st", "6"], "cali_st 6: the sampler takes 5 steps; allowed are 1 to 5"),
    (
        ["--ptq", "--quant_mode", "qncd", "--reverse_interval", "9"],
        "--reverse_interval 9: none of the 5 steps would make an estimate",
    ),
    (
        ["--ptq", "--quant_mode", "qncd", "--sample_reverse", "9"],
        "--sample_reverse 9: none of the 5 steps would make an estimate",
    ),
    (["--ptq", "--quant_mode", "qncd", "--recon", "--recon_lr", "inf"], "--recon_lr inf: allowed are numbers above 0"),
    (["--seed", "-3"], "seed -3: allowed are whole numbers, 0 or more"),
    (["--devise", "cpu"], "unrecognized arguments: --devise cpu"),
    (["--device", "nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(model: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    done = run(model, tmp_path / "out", *flags, status=2)
    lines = [line for line in done.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in done and not (tmp_path / "out").exists()


def test_files_that_do_not_belong(model: Path, tmp_path: Path) -> None:
    """A folder of another run, a damaged or foreign quantized checkpoint, a foreign calibration set: refused, kept."""
    checkpoint, calibration = tmp_path / "q.safetensors", tmp_path / "cali.pt"
    run(
        model,
        tmp_path / "a",
        "--ptq",
        "--quant_mode",
        "qncd",
        "--cali_ckpt",
        str(checkpoint),
        "--cali_data_path",
        str(calibration),
        "--max_images",
        "1",
    )
    before = pixels(tmp_path / "a" / "images")
    assert "holds a run with other settings" in run(model, tmp_path / "a", "--max_images", "1", status=2)
    assert same(before, pixels(tmp_path / "a" / "images"))
    other = run(
        model, tmp_path / "b", "--ptq", "--quant_mode", "qncd", "--weight_bit", "4", "--cali_ckpt", str(checkpoint), status=2
    )
    assert "weight_bits 8 there, 4 asked for" in other

    from qncd.models.original.ddim import build_ddim_unet

    torch.manual_seed(1)
    build_ddim_unet(CONFIG).save_pretrained(tmp_path / "other")
    foreign = ["--ckpt", str(tmp_path / "other"), "--ptq", "--quant_mode", "qncd", "--max_images", "1"]
    assert "base model" in run(model, tmp_path / "c", *foreign, "--cali_ckpt", str(checkpoint), status=2)
    assert "another model" in run(model, tmp_path / "d", *foreign, "--cali_data_path", str(calibration), status=2)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "not a whole quantized checkpoint" in run(
        model, tmp_path / "e", "--ptq", "--quant_mode", "qncd", "--cali_ckpt", str(checkpoint), status=2
    )
    calibration.write_bytes(b"PK\x03\x04 no")
    assert str(calibration) in run(
        model, tmp_path / "f", "--ptq", "--quant_mode", "qncd", "--cali_data_path", str(calibration), status=2
    )
    foreign_weights = ["--ptq", "--quant_mode", "qncd", "--cali_ckpt", str(checkpoint), "--resume_w"]
    assert "not a whole quantized checkpoint" in run(model, tmp_path / "g", *foreign_weights, status=2)
    assert not any((tmp_path / name).exists() for name in "bcdefg"), "claimed before its files were looked at"


def test_nan_weights_are_refused(model: Path, tmp_path: Path) -> None:
    from qncd.models.original.ddim import build_ddim_unet

    unet = build_ddim_unet(CONFIG)
    unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(tmp_path / "nan")
    assert "conv_in.weight holds NaN" in run(model, tmp_path / "o", "--ckpt", str(tmp_path / "nan"), status=2)
