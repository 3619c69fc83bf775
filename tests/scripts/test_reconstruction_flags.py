"""--recon with its second phase, its cache and several processes, as a user runs them on a small random UNet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from script_runs import ROOT, run_in_process

CONFIG = {
    "data": {"dataset": "NONE", "image_size": 16, "channels": 1},
    "model": {"in_channels": 1, "out_ch": 1, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1,
              "attn_resolutions": [8], "num_groups": 2},
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
}  # fmt: skip
QUANTIZED = (
    "--ptq", "--quant_mode", "qncd", "--sample_reverse", "--weight_bit", "4", "--act_bit", "4", "--recon", "--cali_iters",
    "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a random model, and few steps and images."""
    from qncd.models.original.ddim import build_ddim_unet

    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.yml").write_text(yaml.safe_dump(CONFIG))
    torch.manual_seed(0)
    build_ddim_unet(CONFIG).save_pretrained(folder / "unet")
    model = ["--config", str(folder / "tiny.yml"), "--ckpt", str(folder / "unet"), "--device", "cpu"]
    return [*model, "--timesteps", "4", "--cali_n", "8", "--cali_st", "2", "--cali_batch_size", "4", "--max_images", "5"]


def run(common: list[str], out: Path, *arguments: str, status: int = 0) -> str:
    return run_in_process("sample_diffusion_ddim.py", *common, "-l", out, *arguments, status=status)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_the_second_phase_changes_scales_alone_and_is_in_the_checkpoint(common: list[str], tmp_path: Path) -> None:
    act = (*QUANTIZED, "--recon_act", "--cali_iters_a", "5", "--cali_lr", "0.02")
    run(common, tmp_path / "plain", *QUANTIZED, "--cali_ckpt", str(tmp_path / "plain.safetensors"))
    run(common, tmp_path / "act", *act, "--cali_ckpt", str(tmp_path / "act.safetensors"))
    settings = json.loads((tmp_path / "act" / "run.json").read_text())["settings"]["reconstruction"]
    assert (settings["act_iterations"], settings["act_lr"], settings["cache"]) == (5, 0.02, "fp16")
    plain, learned = (load_file(tmp_path / name) for name in ("plain.safetensors", "act.safetensors"))
    differing = {key for key in plain if not torch.equal(plain[key], learned[key])}
    assert differing and all(key.endswith(".scale") and ".weight" not in key for key in differing)
    assert list((tmp_path / "act" / "reconstruction").glob("*.steps"))
    run(common, tmp_path / "again", *act, "--cali_ckpt", str(tmp_path / "act.safetensors"), "--resume")
    assert same(pixels(tmp_path / "act" / "images"), pixels(tmp_path / "again" / "images"))
    assert not same(pixels(tmp_path / "act" / "images"), pixels(tmp_path / "plain" / "images"))


def test_a_checkpoint_from_before_these_settings_still_loads(common: list[str], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "q.safetensors"
    run(common, tmp_path / "a", *QUANTIZED, "--cali_ckpt", str(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = {key: json.loads(value) if value[:1] == "{" else value for key, value in metadata.items()}
    found = content["settings"]["reconstruction"]
    for name in ("cache", "act_iterations", "act_lr"):
        del found[name]
    save_file(load_file(path), path, {key: json.dumps(v) if isinstance(v, dict) else v for key, v in content.items()})
    run(common, tmp_path / "b", *QUANTIZED, "--cali_ckpt", str(path), "--resume")
    assert same(pixels(tmp_path / "a" / "images"), pixels(tmp_path / "b" / "images"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ptq", "--quant_mode", "qncd", "--recon_act"], "--recon_act needs --recon"),
        (["--recon_cache", "bf16"], "--recon_cache needs --recon"),
        ([*QUANTIZED, "--cali_iters_a", "5"], "--cali_iters_a needs --recon_act"),
        ([*QUANTIZED, "--cali_lr", "0.1"], "--cali_lr needs --recon_act"),
        ([*QUANTIZED, "--recon_act", "--cali_iters_a", "0"], "--cali_iters_a 0: allowed are whole numbers, 1 or more"),
        ([*QUANTIZED, "--recon_act", "--cali_lr", "0"], "--cali_lr 0.0: allowed are numbers above 0"),
        ([*QUANTIZED, "--recon_act", "--weight_only"], "--recon_act learns scales of quantized activations"),
        ([*QUANTIZED, "--recon_cache", "fp8"], "invalid choice: 'fp8'"),
        (["--devices", "0"], "--devices 0: allowed are whole numbers, 1 or more"),
        (["--num_nodes", "0"], "--num_nodes 0: allowed are whole numbers, 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_status_2(common: list[str], tmp_path: Path, flags: list[str], message: str) -> None:
    log = run(common, tmp_path / "o", *flags, status=2)
    assert message in log and len(log.splitlines()) == 1


def start(common: list[str], out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "sample_diffusion_ddim.py"), *common, "-l", str(out), *arguments]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_the_images_of_one(common: list[str], tmp_path: Path) -> None:
    flags = (*QUANTIZED, "--cali_n", "20", "--compare_fp", "--batch_size", "2", "--cali_ckpt")
    log = run(common, tmp_path / "1", *flags, str(tmp_path / "1.safetensors"))
    done = start(common, tmp_path / "2", *flags, str(tmp_path / "2.safetensors"), "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert log.count("5 images in /") == done.stderr.count("5 images in /") == 1, "the other process is silent"
    one, two = (load_file(tmp_path / f"{devices}.safetensors") for devices in "12")
    assert all(torch.equal(one[key], two[key]) for key in one if "weight" in key)
    for part in ("fp", "images"):
        assert len(pixels(tmp_path / "2" / part)) == 5
        assert same(pixels(tmp_path / "1" / part), pixels(tmp_path / "2" / part))
    records = [json.loads((tmp_path / devices / "run.json").read_text()) for devices in "12"]
    assert records[1]["resumed"] == [] and records[1]["finished"]
    first, second = (r["settings"] | {"calibration": None} for r in records)
    assert first == second, "the number of processes is no setting"


@pytest.mark.slow
def test_bad_input_of_two_processes_is_one_line(common: list[str], tmp_path: Path) -> None:
    done = start(common, tmp_path / "o", *QUANTIZED, "--weight_bit", "9", "--devices", "2")
    assert done.returncode == 2 and done.stderr.count("error: --weight_bit 9: allowed are whole numbers, 2 to 8") == 1
    assert "Traceback" not in done.stderr
