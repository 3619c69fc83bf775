"""Latent diffusion models: every source gives the same model, folders are diffusers' own, every fault has its line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from latent_models import config_of, same, state_of, with_extras
from safetensors.torch import load_file, save_file

from qncd.models import loading
from qncd.models.latent import load_latent_model, save_latent_model
from qncd.models.loading import load_config, state_dict_hash
from qncd.models.original.compvis import original_state_dict
from qncd.models.original.conditioning import ClassConditioner, TextConditioner

NEAR = Path(__file__).resolve().parents[1] / "data" / "golden"
FAR = Path(__file__).resolve().parents[3] / "shared" / "golden"  # data too large for the repository


@pytest.fixture(params=["none", "class", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_source_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, use_ema=False)
    state = state_of(config)
    torch.save(state, tmp_path / "bare.ckpt")
    torch.save(with_extras(state, config), tmp_path / "lightning.ckpt")
    torch.save({"state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "weights.safetensors")
    expected = load_latent_model(config, tmp_path / "bare.ckpt")
    save_latent_model(expected, tmp_path / "folder")
    for source in ("lightning.ckpt", "old.pth", "weights.safetensors", "folder"):
        assert same(load_latent_model(config, tmp_path / source), expected), source
    for network in (expected.unet, expected.first_stage.model, expected.conditioner):
        if network is not None:
            assert not network.training
            assert all(not p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    back = original_state_dict(config, expected.unet, expected.first_stage, expected.conditioner)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in back)
    assert (expected.latent_shape, expected.image_size) == ((3, 8, 8), 16)


def test_diffusers_alone_loads_the_folder(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    torch.save(state_of(config), tmp_path / "m.ckpt")
    model = load_latent_model(config, tmp_path / "m.ckpt")
    save_latent_model(model, tmp_path / "folder")
    unet = type(model.unet).from_pretrained(tmp_path / "folder" / "unet")
    assert state_dict_hash(unet) == state_dict_hash(model.unet)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "folder", subfolder="scheduler")
    assert abs(scheduler.betas.double().numpy() - model.betas).max() < 1e-8
    settings = scheduler.config
    assert (settings.set_alpha_to_one, settings.steps_offset, settings.clip_sample) == (False, 1, False)
    generator = torch.Generator().manual_seed(0)
    if kind == "class":
        stage = diffusers.VQModel.from_pretrained(tmp_path / "folder" / "vqvae")
        assert state_dict_hash(stage) == state_dict_hash(model.first_stage.model)
        return
    if kind == "none":
        pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "folder")
        images = pipeline(num_inference_steps=2, generator=generator, output_type="np").images
    else:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
        assert pipeline.safety_checker is None
        options = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
        images = pipeline("a cat", height=16, width=16, **options).images
        found = pipeline.encode_prompt(["a cat"], "cpu", 1, False)[0]
        assert isinstance(model.conditioner, TextConditioner)
        assert (found - model.conditioner(["a cat"])).abs().max() < 1e-6
    assert images.shape == (1, 16, 16, 3)


def test_averaged_weights(tmp_path: Path) -> None:
    config = config_of("none")
    state = state_of(config)
    torch.save(with_extras(state, config), tmp_path / "m.ckpt")
    torch.save(state, tmp_path / "raw.ckpt")
    raw, averaged = load_latent_model(config, tmp_path / "raw.ckpt"), load_latent_model(config, tmp_path / "m.ckpt")
    difference = averaged.unet.state_dict()["conv_in.bias"] - raw.unet.state_dict()["conv_in.bias"]
    assert torch.allclose(difference, torch.full_like(difference, 1e-2), atol=1e-6)
    assert same(load_latent_model(config_of("none", use_ema=False), tmp_path / "m.ckpt"), raw)
    checkpoint = with_extras(state, config)
    only = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("model.")}
    torch.save(only, tmp_path / "only.ckpt")
    assert same(load_latent_model(config, tmp_path / "only.ckpt"), averaged)
    del only["model_ema.diffusion_modelout2bias"]
    torch.save(only, tmp_path / "only.ckpt")
    with pytest.raises(ValueError, match=r"model_ema: 1 of \d+ keys are missing in the checkpoint: out\.2\.bias"):
        load_latent_model(config, tmp_path / "only.ckpt")
    torch.save({**only, "model_ema.diffusion_modelout2bias": torch.zeros(3), "model_ema.diffusion_modelx": torch.zeros(1)},
               tmp_path / "only.ckpt")  # fmt: skip
    with pytest.raises(ValueError, match=r"1 averaged weights that a model of this config lacks: model_ema\.diffusion_modelx"):
        load_latent_model(config, tmp_path / "only.ckpt")


def test_a_measured_scale_factor_is_in_the_checkpoint(tmp_path: Path) -> None:
    config = config_of("none", scale_by_std=True)
    torch.save({**state_of(config), "scale_factor": torch.tensor(0.22)}, tmp_path / "m.ckpt")
    model = load_latent_model(config, tmp_path / "m.ckpt")
    assert model.first_stage.scale == pytest.approx(0.22)
    save_latent_model(model, tmp_path / "folder")
    assert load_latent_model(config, tmp_path / "folder").first_stage.scale == pytest.approx(0.22)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    config = config_of("class")
    half = {key: value.half() for key, value in state_of(config).items()}
    save_file(half, tmp_path / "m.safetensors")
    torch.save({key: value.float() for key, value in half.items()}, tmp_path / "m.ckpt")
    assert same(load_latent_model(config, tmp_path / "m.safetensors"), load_latent_model(config, tmp_path / "m.ckpt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.diffusion_model.out.2.bias": None},
            r"model\.diffusion_model: 1 of \d+ keys are missing in the checkpoint: out\.2",
        ),
        ({"model.diffusion_model.x": torch.zeros(1)}, r"1 keys that a model \(model\.diffusion_model\) of this config lacks: x$"),
        (
            {"model.diffusion_model.out.2.bias": torch.zeros(4)},
            r"another shape than the config's: out\.2\.bias \(4,\) for \(3,\)",
        ),
        ({"first_stage_model.quantize.embedding.weight": None}, r"first_stage_model: 1 of .*: quantize\.embedding\.weight"),
        ({"first_stage_model.encoder.x": torch.zeros(1)}, r"model \(first_stage_model\) of this config lacks: encoder\.x"),
        ({"cond_stage_model.embedding.weight": torch.zeros(4, 8)}, r"embedding\.weight \(4, 8\) for \(5, 8\)"),
        ({"cond_stage_model.other": torch.zeros(1)}, r"model \(cond_stage_model\) of this config lacks: other"),
        ({"elsewhere.x": torch.zeros(1)}, r"1 keys belong to no network of this config: elsewhere\.x$"),
        ({"model.diffusion_model.out.2.bias": torch.full((3,), torch.nan)}, r"conv_out\.bias holds NaN or infinite values"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(3, dtype=torch.int64)}, r"conv_out\.bias holds torch\.int64"),
        ({"model.diffusion_model.out.2.bias": [0, 0, 0]}, r"1 keys that hold no tensor: out\.2\.bias"),
        ({"betas": torch.linspace(1e-4, 2e-2, 1000)}, r"its noise schedule \(betas\) is not the config's"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = config_of("class")
    state = {**state_of(config), **changes}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        load_latent_model(config, tmp_path / "m.ckpt")
    assert str(caught.value).startswith(str(tmp_path / "m.ckpt"))
    assert "\n" not in str(caught.value)


def without(config: dict[str, Any], **params: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["model"]["params"].update(params)
    return changed


TWO_CHANNELS = copy.deepcopy(config_of("text")["model"]["params"]["first_stage_config"])
TWO_CHANNELS["params"]["embed_dim"] = 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("none", parameterization="v"), "parameterization 'v' is not supported: allowed is eps"),
        (config_of("none", conditioning_key="concat"), "conditioning_key 'concat' is not supported: allowed is crossattn"),
        (config_of("class", cond_stage_config="__is_unconditional__"), "cond_stage_config and the UNet's context_dim need one"),
        (config_of("class", cond_stage_config={"target": "a.BERTEmbedder"}), "BERTEmbedder is not supported: allowed are Class"),
        (
            config_of("class", cond_stage_config="x"),
            "cond_stage_config 'x': allowed are a target with params, __is_unconditional__",
        ),
        (config_of("none", image_size=None), "no model.params.image_size"),
        (config_of("none", beta_schedule="cosine"), "beta_schedule 'cosine' is not supported"),
        (config_of("none", first_stage_config=TWO_CHANNELS), "the UNet has 3 channels, the first stage's latents have 2"),
    ],
)
def test_config_errors_come_before_the_file_is_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_latent_model(config, "gone.ckpt")


def test_what_is_missing() -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt: no such file$"):
        load_latent_model(config_of("none"), "gone.ckpt")
    with pytest.raises(ValueError, match="no weights: give --ckpt PATH or --use_pretrained"):
        load_latent_model(config_of("none"))
    with pytest.raises(ValueError, match=r"names no published weights \(model\.pretrained; there are ldm_"):
        load_latent_model(config_of("none"), use_pretrained=True)


def test_a_checkpoint_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(3, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"m\.ckpt: holds a int, expected a state dict"):
        load_latent_model(config_of("none"), tmp_path / "m.ckpt")


def test_bundled_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(kind)
    save_file(state_of(config), tmp_path / "m.safetensors")
    model = load_latent_model(config, tmp_path / "m.safetensors")
    save_latent_model(model, tmp_path / "folder")
    monkeypatch.setattr(loading, "ASSETS", tmp_path)
    for name in ("m", "folder"):
        assert same(load_latent_model({"model": {**config["model"], "weights": name}}), model)
    with pytest.raises(ValueError, match=r"^model\.weights 'other' is no bundled model: allowed are folder, m$"):
        load_latent_model({"model": {**config["model"], "weights": "other"}})


def test_folder_and_config_must_agree(tmp_path: Path) -> None:
    config = config_of("class")
    torch.save(state_of(config), tmp_path / "m.ckpt")
    save_latent_model(load_latent_model(config, tmp_path / "m.ckpt"), tmp_path / "folder")
    for other, message in (
        (config_of("none"), "the UNet is a UNet2DConditionModel, the config's a UNet2DModel"),
        (without(config, image_size=16), "sample_size is 8, the config says 16"),
        (without(config, linear_end=0.02), "its noise schedule is not the config's"),
        (without(config, scale_factor=0.18215), "scaling_factor is 1, the config says 0.18215"),
    ):
        with pytest.raises(ValueError, match=rf"folder: {message}"):
            load_latent_model(other, tmp_path / "folder")


def test_faulty_folders(tmp_path: Path) -> None:
    config, folder = config_of("class"), tmp_path / "folder"
    torch.save(state_of(config), tmp_path / "m.ckpt")
    save_latent_model(load_latent_model(config, tmp_path / "m.ckpt"), folder)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_latent_model(config, folder)

    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    for change, message in (
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction is not supported: allowed is epsilon"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2 is not supported"),
        ({"beta_start": "x"}, "beta_start 'x': allowed are numbers between 0 and 1"),
    ):
        scheduler.write_text(json.dumps({**settings, **change}))
        refused(message)
    scheduler.write_text(json.dumps(settings))
    weights = folder / "class_embedder" / "diffusion_pytorch_model.safetensors"
    embedding = load_file(weights)
    save_file({"embedding.weight": embedding["embedding.weight"][:, :4].contiguous()}, weights)
    refused(r"tensors have another shape than their layer: embedding\.weight")
    for path in sorted((folder / "class_embedder").iterdir()):
        path.unlink()
    (folder / "class_embedder").rmdir()
    refused("no conditioning for a UNet with contexts of 8")
    scheduler.unlink()
    refused(r"scheduler_config\.json: no such file, it holds the noise schedule")
    (folder / "vqvae").rename(folder / "other")
    refused(r"no vqvae/ or vae/ in it")
    (folder / "unet").rename(folder / "another")
    refused(r"no unet/ in it")


def test_a_folder_without_a_scaling_factor_is_from_before_it_was_used(tmp_path: Path) -> None:
    config = config_of("none")
    torch.save(state_of(config), tmp_path / "m.ckpt")
    save_latent_model(load_latent_model(config, tmp_path / "m.ckpt"), tmp_path / "folder")
    path = tmp_path / "folder" / "vqvae" / "config.json"
    settings = json.loads(path.read_text())
    del settings["scaling_factor"]
    path.write_text(json.dumps(settings))
    assert load_latent_model(config, tmp_path / "folder").first_stage.scale == 1.0


def test_models_without_a_folder_are_refused(tmp_path: Path) -> None:
    config = config_of("none")
    config["model"]["params"]["unet_config"]["params"]["attention_resolutions"] = [1, 2]
    torch.save(state_of(config), tmp_path / "m.ckpt")
    model = load_latent_model(config, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"diffusers' UNet2DModel cannot be told how .* this model runs from its original"):
        save_latent_model(model, tmp_path / "folder")


def far_config(name: str) -> dict[str, Any]:
    if not (FAR / f"{name}.ckpt").is_file():
        pytest.skip(f"{name}.ckpt is not here")
    config: dict[str, Any] = yaml.safe_load((FAR / f"{name}.yaml").read_text())
    if name == "sd_txt2img":
        fields = json.loads((FAR / "sd_txt2img_clip_text_config.json").read_text())
        config["model"]["params"]["cond_stage_config"]["params"] = {"text_config": fields}
    return config


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("source", ["ckpt", "folder"])
@torch.no_grad()
def test_parity_unconditional(golden: Any, tmp_path: Path, source: str) -> None:
    config, io = far_config("ldm_uncond"), golden("ldm_uncond_io")
    model = load_latent_model(config, FAR / "ldm_uncond.ckpt")
    if source == "folder":
        save_latent_model(model, tmp_path)
        model = load_latent_model(config, tmp_path)
    assert error(model.unet(io["x"], io["t"]).sample, io["eps_ema"]) < 1e-5
    stage = model.first_stage
    assert error(stage.decode(io["z"]), io["decode"]) < 2e-5
    assert error(stage.decode(io["z"], force_not_quantize=True), io["decode_force_not_quantize"]) < 2e-5
    assert error(stage.encode(io["image"]), io["encode"]) < 2e-5
    codes, _, (_, _, indices) = stage.model.quantize(io["z"])
    assert torch.equal(indices, io["vq_indices"])
    assert error(codes, io["vq_zq"]) < 1e-6
    raw = load_latent_model(without(config, use_ema=False), FAR / "ldm_uncond.ckpt")
    assert error(raw.unet(io["x"], io["t"]).sample, io["eps_raw"]) < 1e-5


@torch.no_grad()
def test_parity_with_classes(golden: Any) -> None:
    model, io = load_latent_model(far_config("ldm_class_cond"), FAR / "ldm_class_cond.ckpt"), golden("ldm_class_cond_io")
    assert isinstance(model.conditioner, ClassConditioner)
    assert torch.equal(model.conditioner(io["class_label"]), io["context"])
    assert torch.equal(model.conditioner.unconditional(2), io["uncond_context"])
    assert error(model.unet(io["x"], io["t"], io["context"]).sample, io["eps"]) < 1e-5
    assert error(model.unet(io["x"], io["t"], io["uncond_context"]).sample, io["eps_uncond"]) < 1e-5
    assert error(model.first_stage.decode(io["z"]), io["decode"]) < 2e-5
    assert torch.equal(model.first_stage.model.quantize(io["z"])[2][2], io["vq_indices"])


@torch.no_grad()
def test_parity_with_text(golden: Any) -> None:
    model, io = load_latent_model(far_config("sd_txt2img"), FAR / "sd_txt2img.ckpt"), golden("sd_txt2img_io")
    assert isinstance(model.conditioner, TextConditioner)
    assert error(model.conditioner.encode(io["tokens"]), io["context"]) < 1e-5
    assert error(model.conditioner.encode(io["uncond_tokens"]), io["uncond_context"]) < 1e-5
    assert error(model.unet(io["x"], io["t"], io["context"]).sample, io["eps"]) < 1e-5
    assert error(model.unet(io["x"], io["t"], io["uncond_context"]).sample, io["eps_uncond"]) < 1e-5
    stage = model.first_stage
    assert stage.scale == 0.18215
    assert error(stage.decode(io["z"]), io["kl_decode_scaled"]) < 2e-5
    assert error(stage.decode(io["z"] * stage.scale), io["kl_decode"]) < 2e-5
    assert error(stage.encode(io["image"]) / stage.scale, io["kl_mode"]) < 2e-5
    moments = stage.model.encode(io["image"]).latent_dist
    assert error(moments.mean, io["kl_moments"][:, :4]) < 2e-5


def test_the_configs_of_the_published_models() -> None:
    root = Path(__file__).resolve().parents[2] / "configs"
    from qncd.models.files.registry import load_registry
    from qncd.models.original.compvis import check_config

    for name in ("cin256-v2", "lsun_beds256", "lsun_churches256", "celebahq256", "ffhq256", "sd-v1-inference"):
        config = load_config(root / f"{name}.yaml")
        check_config(config)
        assert config["model"]["pretrained"] in load_registry()


@pytest.mark.parametrize("manifest", ["ldm_cin256_v2", "ldm_lsun_beds256_released", "sd_v1"])
def test_every_key_of_the_published_models_is_known(manifest: str) -> None:
    """What the networks' own tables do not hold is the noise schedule and averaged weights."""
    from qncd.models.original import compvis

    keys = json.loads((NEAR / f"manifest_{manifest}.json").read_text())
    networks = (compvis._UNET, compvis._FIRST_STAGE, compvis._CONDITION)
    rest = {key for key in keys if not key.startswith((*networks, *compvis._UNUSED_PREFIXES))}
    assert rest <= compvis._SCHEDULE_BUFFERS
