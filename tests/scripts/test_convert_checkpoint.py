"""scripts/convert_checkpoint.py as its user runs it, on small random checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from script_runs import run_in_process

from qncd.models.configs import CONFIGS
from qncd.models.latent import load_latent_model
from qncd.models.loading import load_config, load_ddim, state_dict_hash
from qncd.models.original.autoencoders import FirstStage, build_first_stage
from qncd.models.original.compvis import original_state_dict
from qncd.models.original.ddim import build_ddim_unet, to_ddim_state_dict
from qncd.models.original.ldm import build_ldm_unet

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_checkpoint.py"
DDIM: dict[str, Any] = {
    "data": {"dataset": "NONE", "image_size": 8, "channels": 3},
    "model": {"in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1,
              "attn_resolutions": [4], "num_groups": 4},
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 100},
}  # fmt: skip
UNET = {"in_channels": 3, "out_channels": 3, "model_channels": 8, "attention_resolutions": [2], "num_res_blocks": 1,
        "channel_mult": [1, 2], "num_groups": 4, "num_head_channels": 8}  # fmt: skip
STAGE = {"double_z": False, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2],
         "num_res_blocks": 1, "attn_resolutions": [], "num_groups": 4}  # fmt: skip
LDM: dict[str, Any] = {
    "model": {
        "params": {
            "image_size": 8,
            "unet_config": {"target": "openaimodel.UNetModel", "params": UNET},
            "first_stage_config": {
                "target": "autoencoder.VQModelInterface",
                "params": {"embed_dim": 3, "n_embed": 16, "ddconfig": STAGE},
            },
            "cond_stage_config": "__is_unconditional__",
        }
    }
}


def run(*arguments: Any, status: int = 0) -> str:
    return run_in_process("convert_checkpoint.py", *arguments, status=status)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with ddim.yml, ddim.ckpt, ldm.yaml and ldm.ckpt."""
    torch.manual_seed(0)
    (tmp_path / "ddim.yml").write_text(yaml.safe_dump(DDIM))
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump(LDM))
    torch.save(to_ddim_state_dict(build_ddim_unet(DDIM).state_dict(), DDIM), tmp_path / "ddim.ckpt")
    state = original_state_dict(LDM, build_ldm_unet(LDM), FirstStage(build_first_stage(LDM)), None)
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    return tmp_path


def test_latent_diffusion(files: Path) -> None:
    out = files / "out"
    run("--config", files / "ldm.yaml", "--ckpt", files / "ldm.ckpt", "--out", out)
    model, folder = load_latent_model(LDM, files / "ldm.ckpt"), load_latent_model(LDM, out)
    assert state_dict_hash(folder.unet) == state_dict_hash(model.unet)
    assert state_dict_hash(folder.first_stage.model) == state_dict_hash(model.first_stage.model)
    assert diffusers.LDMPipeline.from_pretrained(out).unet.config.sample_size == 8
    record = json.loads((out / "converted.json").read_text())
    assert record["unet_sha256"] == state_dict_hash(model.unet)
    assert (record["config"], record["checkpoint"]) == ("ldm.yaml", "ldm.ckpt")
    names = sorted(path.name for path in files.iterdir())
    digest = hashlib.sha256((files / "ldm.ckpt").read_bytes()).hexdigest()
    run("--config", files / "ldm.yaml", "--ckpt", files / "ldm.ckpt", "--sha256", digest, "--out", out)  # again, over its own
    assert sorted(path.name for path in files.iterdir()) == names
    assert json.loads((out / "converted.json").read_text()) == record


def test_ddim(files: Path) -> None:
    out = files / "out"
    run("--config", files / "ddim.yml", "--ckpt", files / "ddim.ckpt", "--out", out)
    expected = state_dict_hash(load_ddim(DDIM, files / "ddim.ckpt"))
    assert state_dict_hash(load_ddim(DDIM, out)) == expected
    pipeline = diffusers.DDIMPipeline.from_pretrained(out)
    assert state_dict_hash(pipeline.unet) == expected
    assert pipeline.scheduler.config.num_train_timesteps == 100
    images = pipeline(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3)


def test_to_the_original_layout_and_back(files: Path) -> None:
    """From a checkpoint, from the folder that it was converted to, and of the bundled models."""
    for kind, yaml_file in (("ldm", "ldm.yaml"), ("ddim", "ddim.yml")):
        config = ("--config", files / yaml_file)
        run(*config, "--ckpt", files / f"{kind}.ckpt", "--out", files / "folder")
        run(*config, "--ckpt", files / "folder", "--to", "original", "--out", files / kind)
        assert (files / kind / yaml_file).read_text() == (files / yaml_file).read_text()
        before, after = (torch.load(path) for path in (files / f"{kind}.ckpt", files / kind / "model.ckpt"))
        before, after = (state.get("state_dict", state) for state in (before, after))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    bundled = CONFIGS / "fashion_mnist.yml"
    run("--config", bundled, "--to", "original", "--out", files / "bundled")
    loaded = load_ddim(load_config(bundled), files / "bundled" / "model.ckpt")
    assert state_dict_hash(loaded) == state_dict_hash(load_ddim(load_config(bundled), None))


def test_faults_are_one_line(files: Path) -> None:
    def refused(message: str, *arguments: Any) -> None:
        stderr = run(*arguments, status=2)
        assert message in stderr
        assert stderr.count("\n") == 1

    ldm = ("--config", files / "ldm.yaml", "--out", files / "out")
    refused("keys are missing in the checkpoint", *ldm, "--ckpt", files / "ddim.ckpt")
    refused("gone.ckpt: no such file", *ldm, "--ckpt", files / "gone.ckpt")
    refused("no weights: give --ckpt PATH", *ldm)
    refused("the following arguments are required: --out", "--config", files / "ldm.yaml")
    weights = files / "ldm.ckpt"
    refused("is a file, expected a folder", *ldm[:2], "--ckpt", weights, "--out", weights)
    refused(f"{weights} is no folder", *ldm[:2], "--ckpt", weights, "--out", weights / "below")
    refused("argument --sha256: abc: expected 64 hexadecimal digits", *ldm, "--ckpt", weights, "--sha256", "abc")
    refused(f"--sha256 says {'0' * 64}", *ldm, "--ckpt", weights, "--sha256", "0" * 64)
    refused(f"--sha256 pins one file, and {files} is none", *ldm, "--ckpt", files, "--sha256", "0" * 64)
    assert not (files / "out").exists()
    (files / "out").mkdir()
    (files / "out" / "other.txt").write_text("x")
    refused("out: not empty, and not made by this command", *ldm, "--ckpt", files / "ldm.ckpt")
    assert [path.name for path in (files / "out").iterdir()] == ["other.txt"]
    several = yaml.safe_load((files / "ldm.yaml").read_text())
    unet = several["model"]["params"]["unet_config"]["params"]
    del unet["num_head_channels"]
    unet |= {"num_heads": 2, "attention_resolutions": [1, 2]}
    state = original_state_dict(several, build_ldm_unet(several), FirstStage(build_first_stage(several)), None)
    torch.save(state, files / "heads.ckpt")
    (files / "heads.yaml").write_text(yaml.safe_dump(several))
    command = ("--config", files / "heads.yaml", "--ckpt", files / "heads.ckpt", "--out", files / "heads")
    refused("has no diffusers folder", *command)
    assert not (files / "heads").exists()
