"""Checkpoints as people pass them on: cast, wrapped, with keys that nothing needs. What is not known is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_models import config_of, same, state_of, with_extras
from safetensors.torch import save_file

from qncd.models.latent import load_latent_model
from qncd.models.loading import load_config, load_ddim, state_dict_hash
from qncd.models.original.ddim import to_ddim_state_dict

State = dict[str, Any]
CONFIG = config_of("text")


@pytest.fixture(scope="module")
def state() -> State:
    """A text model in the original layout, with the noise schedule and the autoencoder's attention."""
    return with_extras(state_of(CONFIG), CONFIG)["state_dict"]


def cast(state: State, dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_noise_schedule_is_compared_in_the_files_precision(state: State, dtype: torch.dtype, tmp_path: Path) -> None:
    """A pruned file has every tensor cast: its betas are off by 5e-4 in float16 and by 4e-3 in bfloat16."""
    path = tmp_path / "m.safetensors"
    save_file(cast(state, dtype), path)
    model = load_latent_model(CONFIG, path)
    assert model.betas[-1] == pytest.approx(0.012, rel=1e-12)  # the config's, not the file's
    other = {**state, "betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2}
    save_file(cast(other, dtype), path)
    with pytest.raises(ValueError, match=r"its noise schedule \(betas\) is not the config's$"):
        load_latent_model(CONFIG, path)
    close = cast({**state, "betas": state["betas"] * 1.02}, dtype)
    save_file(close, path)
    with pytest.raises(ValueError, match="its noise schedule"):
        load_latent_model(CONFIG, path)


def test_a_schedule_in_full_precision_is_compared_in_full(state: State, tmp_path: Path) -> None:
    torch.save({**state, "betas": state["betas"] * 1.0005}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="its noise schedule"):
        load_latent_model(CONFIG, tmp_path / "m.ckpt")


CONDITION, UNET = "cond_stage_model.", "model.diffusion_model."
VARIANTS: dict[str, Callable[[State], Any]] = {
    "text_projection, logit_scale": lambda state: {
        **state,
        f"{CONDITION}transformer.text_projection.weight": torch.eye(8),
        f"{CONDITION}transformer.text_model.logit_scale": torch.tensor(4.6),
        f"{CONDITION}logit_scale": torch.tensor(4.6),
    },
    "denoiser.sigmas": lambda state: {**state, "denoiser.sigmas": torch.zeros(1000)},
    "a shell of a state_dict": lambda state: {"state_dict": {**state, "state_dict": {"a": torch.zeros(1)}}},
    "state_dict in state_dict": lambda state: {"epoch": 1, "state_dict": {"state_dict": state, "step": 3}},
    "attention as linear layers": lambda state: {
        key: value[:, :, 0, 0] if ".attn_1." in key and value.ndim == 4 else value for key, value in state.items()
    },
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {key.replace("diffusion_model.", "diffusion_model._orig_mod."): state[key] for key in state},
    "wrapped inside": lambda state: {key.replace("diffusion_model.", "diffusion_model.module."): state[key] for key in state},
    "FSDP": lambda state: {f"_fsdp_wrapped_module.{key}": value for key, value in state.items()},
    "every matrix as a convolution": lambda state: {
        key: value[:, :, None, None] if "to_" in key and value.ndim == 2 else value for key, value in state.items()
    },
    "every 1x1 convolution as a linear layer": lambda state: {
        key: value[:, :, 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value for key, value in state.items()
    },
    "names of diffusers left in the autoencoder": lambda state: {
        key.replace(".attn_1.norm.", ".attn_1.group_norm.")
        .replace(".attn_1.q.", ".attn_1.to_q.")
        .replace(".attn_1.proj_out.", ".attn_1.to_out.0."): value
        for key, value in state.items()
    },
    "older names of diffusers": lambda state: {
        key.replace(".attn_1.k.", ".attn_1.key.").replace(".attn_1.proj_out.", ".attn_1.proj_attn."): value
        for key, value in state.items()
    },
    "averaged weights alone": lambda state: {
        **{key: value for key, value in state.items() if not key.startswith(("model.diffusion_model.", "model_ema."))},
        **{
            f"model_ema.diffusion_model{key.removeprefix(UNET).replace('.', '')}": value
            for key, value in state.items()
            if key.startswith(UNET)
        },
    },
    "a textual inversion's copy of the text model": lambda state: {
        **state,
        "embedding_manager.embedder.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    },
    "both": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "transformers 5": lambda state: {key.replace("text_model.", ""): value for key, value in state.items()},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_known_extras_and_renamings(state: State, name: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.ckpt")
    torch.save(VARIANTS[name](state), tmp_path / "m.ckpt")
    assert same(load_latent_model(CONFIG, tmp_path / "m.ckpt"), load_latent_model(CONFIG, tmp_path / "plain.ckpt"))


def test_the_attention_variant_is_one() -> None:
    assert any(".attn_1." in key and value.ndim == 4 for key, value in state_of(CONFIG).items())


def test_what_is_not_used_is_told_in_one_line(state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="qncd")
    torch.save(VARIANTS["text_projection, logit_scale"](state) | {"denoiser.sigmas": torch.zeros(3)}, tmp_path / "m.ckpt")
    load_latent_model(CONFIG, tmp_path / "m.ckpt")
    told = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert told == [
        f"{tmp_path / 'm.ckpt'}: not used: cond_stage_model.logit_scale, cond_stage_model.transformer.text_model.logit_scale, "
        "cond_stage_model.transformer.text_projection.weight, denoiser.sigmas, first_stage_model.loss.*, logvar, model_ema.*"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_of_the_schedule_is_compared_too(state: State, dtype: torch.dtype, tmp_path: Path) -> None:
    """A file patched to zero terminal SNR has the old betas beside other products."""
    products = torch.cumprod(1 - state["betas"].double(), 0)
    save_file(cast({**state, "alphas_cumprod": products}, dtype), tmp_path / "m.safetensors")
    load_latent_model(CONFIG, tmp_path / "m.safetensors")
    shifted = (products.sqrt() - products[-1].sqrt()) ** 2
    save_file(cast({**state, "alphas_cumprod": shifted}, dtype), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"its noise schedule \(alphas_cumprod\) is not the config's$"):
        load_latent_model(CONFIG, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("stored", "told"),
    [(torch.tensor(float("nan")), "nan"), (torch.tensor(0.0), "0.0"), (torch.tensor([0.1, 0.2]), r"\[0\.1.*\]"), ("x", "str")],
)
def test_a_measured_factor_that_is_none(stored: Any, told: str, tmp_path: Path) -> None:
    config = config_of("none", scale_by_std=True)
    torch.save({**state_of(config), "scale_factor": stored}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=rf"m\.ckpt: scale_factor {told}: allowed are numbers between 0 and 1e\+06$"):
        load_latent_model(config, tmp_path / "m.ckpt")


@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_weights_of_a_compiled_unet(compiled: bool, tmp_path: Path) -> None:
    config = config_of("none")
    full = with_extras(state_of(config), config)["state_dict"]
    torch.save(full, tmp_path / "plain.ckpt")
    dotted = {key.replace("diffusion_model.", "diffusion_model._orig_mod."): value for key, value in full.items()}
    merged = {key.replace("model_ema.diffusion_model", "model_ema.diffusion_model_orig_mod"): dotted[key] for key in dotted}
    torch.save(merged if compiled else dotted, tmp_path / "m.ckpt")
    assert same(load_latent_model(config, tmp_path / "m.ckpt"), load_latent_model(config, tmp_path / "plain.ckpt"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"denoiser.other": torch.zeros(1)}, r"1 keys belong to no network of this config: denoiser\.other$"),
        (
            {"v_pred": torch.zeros(0)},
            r"predicts velocities \(v_pred\), which no yaml describes: name a diffusers folder with --config$",
        ),
        ({f"{CONDITION}transformer.visual_projection.weight": torch.zeros(1)}, r"lacks: .*visual_projection\.weight$"),
        ({"state_dict": {"betas": torch.zeros(1)}}, "holds two state dicts, one inside the other"),
        ({"model.diffusion_model._orig_mod.out.2.bias": torch.zeros(3)}, "1 keys are there twice, with and without _orig_mod"),
    ],
)
def test_unknown_keys_are_refused(state: State, extra: State, message: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {**state, **extra}}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        load_latent_model(CONFIG, tmp_path / "m.ckpt")
    assert str(caught.value).startswith(str(tmp_path / "m.ckpt")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_ddim_checkpoints(prefix: str, tmp_path: Path) -> None:
    config = load_config(Path(__file__).resolve().parents[3] / "configs" / "fashion_mnist.yml")
    unet = load_ddim(config)
    original = to_ddim_state_dict(unet.state_dict(), config)
    torch.save({"state_dict": {prefix + key: value for key, value in original.items()}, "epoch": 3}, tmp_path / "m.ckpt")
    assert state_dict_hash(load_ddim(config, tmp_path / "m.ckpt")) == state_dict_hash(unet)
