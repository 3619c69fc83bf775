"""Folders of diffusers: what they ask for and the samplers do not do is refused by name, all else loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from latent_models import config_of, state_of

from qncd.models.latent import load_latent_model, save_latent_model
from qncd.models.loading import load_config, load_ddim, save_ddim, state_dict_hash

CONFIG = load_config(Path(__file__).resolve().parents[3] / "configs" / "fashion_mnist.yml")
DDPM: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "trained_betas": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pixel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDIMPipeline's folder; tests write its scheduler."""
    folder = tmp_path_factory.mktemp("pixel") / "model"
    save_ddim(load_ddim(CONFIG), CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline's folder; tests write its scheduler."""
    folder, config = tmp_path_factory.mktemp("latent"), config_of("text")
    torch.save(state_of(config), folder / "m.ckpt")
    save_latent_model(load_latent_model(config, folder / "m.ckpt"), folder / "model")
    return folder / "model"


def write(path: Path, settings: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    return path


def refused(message: str, folder: Path, config: Any = CONFIG, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_ddim(config, folder, **kwargs) if config is not None else load_latent_model(config_of("text"), folder)
    assert "\n" not in str(caught.value)


def scheduler_of(folder: Path) -> Path:
    return folder / "scheduler" / "scheduler_config.json"


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"prediction_type": "v_prediction"}, "prediction_type v_prediction is not supported: allowed is epsilon"),
    ({"prediction_type": "sample"}, "prediction_type sample is not supported: allowed is epsilon"),
    ({"clip_sample": True}, "clip_sample true is not supported: allowed is false, or true with sample_type ddpm_noisy"),
    ({"thresholding": True}, "thresholding true is not supported: allowed is false"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true is not supported: allowed is false"),
    ({"timestep_spacing": "trailing"}, "timestep_spacing trailing is not supported: allowed is leading"),
    ({"timestep_spacing": "linspace"}, "timestep_spacing linspace is not supported: allowed is leading"),
    ({"variance_type": "learned_range"}, "variance_type learned_range is not supported: allowed is fixed_small, fixed_large"),
    ({"_class_name": "LCMScheduler"}, "_class_name LCMScheduler is not supported: allowed are DDIM.*qncd.load of"),
    ({"_class_name": "EulerDiscreteScheduler"}, "_class_name EulerDiscreteScheduler is not supported"),
    ({"_class_name": "PNDMScheduler"}, "skip_prk_steps false is not supported: allowed is true"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *CHANGES,
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos_cap_v2, the config says linear"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is scaled_linear, the config says linear"),
        ({"beta_end": 0.05}, r"beta_end is 0\.05, the config says 0\.02"),
        ({"beta_start": "x"}, r"beta_start 'x': allowed are numbers between 0 and 1$"),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500, the config says 1000"),
        ({"trained_betas": [0.01] * 1000}, "trained_betas are not the config's noise schedule"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one false is not supported: allowed is true"),
        ({"steps_offset": 1}, "steps_offset 1 is not supported: allowed is 0"),
    ],
)
def test_schedulers_of_pixel_models(pixel_folder: Path, changes: dict[str, Any], message: str) -> None:
    path = write(scheduler_of(pixel_folder), {**DDPM, **changes})
    refused(f"^{path}: {message}", pixel_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *CHANGES,
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2 is not supported: allowed are linear"),
        ({"set_alpha_to_one": True}, "set_alpha_to_one true is not supported: allowed is false"),
        ({"steps_offset": 0}, "steps_offset 0 is not supported: allowed is 1"),
    ],
)
def test_schedulers_of_latent_models(latent_folder: Path, changes: dict[str, Any], message: str) -> None:
    path = write(scheduler_of(latent_folder), {**DDPM, **changes})
    refused(f"^{path}: {message}", latent_folder, None)


def test_schedulers_that_the_samplers_compute(pixel_folder: Path, latent_folder: Path) -> None:
    expected = state_dict_hash(load_ddim(CONFIG))
    numbers = torch.linspace(1e-4, 0.02, 1000)  # float32
    for settings in (
        DDPM,
        {**DDPM, "clip_sample": False},
        {**DDPM, "beta_schedule": "other", "trained_betas": numbers.tolist()},
        dict(DDPMScheduler(clip_sample=False).config, _class_name="DDPMScheduler"),
        dict(DDIMScheduler(clip_sample=False).config, _class_name="DDIMScheduler"),
        dict(PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True).config, _class_name="PNDMScheduler"),
    ):
        write(scheduler_of(pixel_folder), settings)
        assert state_dict_hash(load_ddim(CONFIG, pixel_folder)) == expected
    for kind in (DDIMScheduler, PNDMScheduler):
        scheduler = kind(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
        )
        changes = {"clip_sample": False} if kind is DDIMScheduler else {"skip_prk_steps": True}
        write(scheduler_of(latent_folder), {**scheduler.config, **changes, "_class_name": kind.__name__})
        load_latent_model(config_of("text"), latent_folder)


def test_clipping_belongs_to_one_sampler(pixel_folder: Path) -> None:
    """The google/ddpm-* folders clip, and so does ddpm_noisy; the other samplers do not."""
    path = write(scheduler_of(pixel_folder), {**DDPM, "clip_sample": True, "variance_type": "fixed_large"})
    load_ddim(CONFIG, pixel_folder, sample_type="ddpm_noisy")
    refused("clip_sample true is not supported", pixel_folder, sample_type="generalized")
    write(path, {**DDPM, "clip_sample": False})
    refused("clip_sample false is not supported: allowed is true$", pixel_folder, sample_type="ddpm_noisy")
    write(path, {**DDPM, "clip_sample": True, "variance_type": "fixed_small"})
    refused("variance_type fixed_small is not supported: allowed is fixed_large$", pixel_folder, sample_type="ddpm_noisy")


def test_where_a_scheduler_is_looked_for(pixel_folder: Path, tmp_path: Path) -> None:
    """In scheduler/, beside a folder unet/, and in the folder of the UNet, as in the first folders of diffusers."""
    write(scheduler_of(pixel_folder), {**DDPM, "prediction_type": "sample"})
    refused("prediction_type sample", pixel_folder)
    refused("prediction_type sample", pixel_folder / "unet")
    unet = load_ddim(CONFIG)
    unet.save_pretrained(tmp_path / "flat")
    load_ddim(CONFIG, tmp_path / "flat")
    write(tmp_path / "flat" / "scheduler_config.json", {**DDPM, "beta_end": 0.03})
    refused("beta_end is 0.03", tmp_path / "flat")
    (tmp_path / "flat" / "scheduler_config.json").unlink()
    (tmp_path / "flat" / "scheduler_config.json").mkdir()
    refused(r"scheduler_config\.json: a folder, expected a file$", tmp_path / "flat")
    (tmp_path / "flat" / "scheduler_config.json").rmdir()
    (tmp_path / "flat" / "scheduler_config.json").symlink_to("nowhere.json")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json: no such file$"):
        load_ddim(CONFIG, tmp_path / "flat")
    (tmp_path / "flat" / "scheduler_config.json").unlink()
    silent = {key: value for key, value in CONFIG.items() if key != "diffusion"}
    load_ddim(silent, tmp_path / "flat")  # a config without a noise schedule contradicts none


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("freq_shift", 0, "freq_shift is 0, the config says 1"),
        ("flip_sin_to_cos", True, "flip_sin_to_cos is True, the config says False"),
        ("downsample_padding", 1, "downsample_padding is 1, the config says 0"),
        ("norm_eps", 1e-5, "norm_eps is 1e-05, the config says 1e-06"),
        ("norm_num_groups", 8, "norm_num_groups is 8, the config says 4"),
        ("attention_head_dim", 8, "attention_head_dim is 8, the config says None"),
        ("center_input_sample", True, "center_input_sample is True, the config says False"),
        ("act_fn", "gelu", "act_fn is gelu, the config says silu"),
    ],
)
def test_pixel_architectures_that_compute_otherwise(tmp_path: Path, key: str, value: Any, message: str) -> None:
    """None of these changes the shape of a weight."""
    load_ddim(CONFIG).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path / "config.json", {**settings, key: value})
    refused(f"^{tmp_path}: {message}$", tmp_path)


def test_inputs_that_the_samplers_do_not_give(latent_folder: Path) -> None:
    write(scheduler_of(latent_folder), DDPM)
    path = latent_folder / "unet" / "config.json"
    settings = json.loads(path.read_text())
    try:
        for changes, message in (
            ({"time_cond_proj_dim": 8}, r"unet: time_cond_proj_dim 8 \(an embedding of the guidance scale"),
            ({"addition_embed_type": "text_time"}, r"unet: addition_embed_type text_time \(an additional embedding"),
            ({"encoder_hid_dim_type": "ip_image_proj"}, "unet: encoder_hid_dim_type ip_image_proj"),
            ({"num_class_embeds": 4}, r"unet: num_class_embeds 4 \(a class embedding\)"),
            ({"in_channels": 7}, r"unet: in_channels 7, as for inpainting is not supported: allowed is 3"),
            ({"out_channels": 6}, r"unet: out_channels 6 is not supported: allowed is 3"),
        ):
            write(path, {**settings, **changes})
            refused(message, latent_folder, None)
    finally:
        write(path, settings)


@pytest.mark.parametrize("name", ["controlnet", "image_encoder", "text_encoder_2"])
def test_components_that_the_samplers_leave_out(latent_folder: Path, name: str) -> None:
    write(scheduler_of(latent_folder), DDPM)
    message = f"the pipeline's {name} is not supported: allowed are class_embedder, feature_extractor, .*qncd.load of the folder"
    (latent_folder / name).mkdir()
    try:
        refused(message, latent_folder, None)
    finally:
        (latent_folder / name).rmdir()
    index = json.loads((latent_folder / "model_index.json").read_text())
    try:
        write(latent_folder / "model_index.json", {**index, name: ["diffusers", "Any"]})
        refused(message, latent_folder, None)
    finally:
        write(latent_folder / "model_index.json", index)
    write(scheduler_of(latent_folder), {**DDPM, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    load_latent_model(config_of("text"), latent_folder)


def test_a_latent_folder_is_no_pixel_model(latent_folder: Path) -> None:
    refused("the pipeline's text_encoder is not supported: allowed are scheduler, unet", latent_folder)
