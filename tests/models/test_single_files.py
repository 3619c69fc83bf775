"""Checkpoints of Stable Diffusion 2, XL and inpainting in one file: the networks that diffusers makes of it, or one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from latent_models import config_of, state_of
from safetensors.torch import save_file
from single_files import configs_alone, made_for_files, prefixed, single_file_state

import qncd
from qncd.app.latent import find_model
from qncd.app.pipelines import is_pipeline
from qncd.models.loading import state_dict_hash
from qncd.models.single_files import find_single_file, is_pipeline_file, yaml_of

KINDS = ("SDXL refiner", "SD2, v-prediction", "SD1 inpainting", "SD1")
Model = tuple[Any, dict[str, torch.Tensor], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """model(kind): the pipeline, its state dict in the original layout, and its folder without weights; made once."""
    there: dict[str, Model] = {}

    def make(kind: str) -> Model:
        if kind not in there:
            pipe = made_for_files(kind)
            there[kind] = pipe, single_file_state(pipe), configs_alone(pipe, tmp_path_factory.mktemp("configs") / "model")
        return there[kind]

    return make


def hashes(pipe: Any) -> dict[str, str]:
    return {name: state_dict_hash(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_are_the_pipelines(model: Callable[[str], Model], kind: str, tmp_path: Path) -> None:
    pipe, state, folder = model(kind)
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    assert is_pipeline_file(path) == (kind != "SD1")
    found = qncd.load(path, config=folder)
    assert type(found) is type(pipe) and hashes(found) == hashes(pipe)
    assert found.scheduler.config.items() >= {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}.items()
    assert all(parameter.dtype == torch.float32 for parameter in found.unet.parameters())


def test_it_is_what_diffusers_makes_of_the_file(model: Callable[[str], Model], tmp_path: Path) -> None:
    pipe, state, folder = model("SDXL")
    save_file(state, tmp_path / "m.safetensors")
    found = qncd.load(tmp_path / "m.safetensors", config=folder)
    expected = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "m.safetensors"), config=str(folder), local_files_only=True
    )
    assert hashes(found) == hashes(expected) == hashes(pipe)
    assert dict(found.scheduler.config) == dict(expected.scheduler.config)
    assert {key: found.config[key] for key in expected.config} == dict(expected.config)


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_weights_alone(model: Callable[[str], Model], kind: str, tmp_path: Path, caplog: Any) -> None:
    """As LitEma names them, without dots; beside raw weights they are not used, as in diffusers."""
    caplog.set_level("INFO", logger="qncd")
    pipe, state, folder = model(kind)
    unet = "model.diffusion_model."
    averaged = {
        f"model_ema.diffusion_model{key.removeprefix(unet).replace('.', '')}" if key.startswith(unet) else key: value
        for key, value in state.items()
    }
    path = tmp_path / "m.safetensors"
    save_file(averaged, path)
    assert is_pipeline_file(path) == (kind != "SD1")
    assert hashes(qncd.load(path, config=folder)) == hashes(pipe)
    assert "averaged weights alone (model_ema.*): they are used" in caplog.text
    save_file({**state, **{key: value + 1 for key, value in averaged.items() if key.startswith("model_ema.")}}, path)
    assert hashes(qncd.load(path, config=folder)) == hashes(pipe)


class Callback:
    """What a trainer leaves in its checkpoints."""


def test_pickles_half_precision_and_wrappers(model: Callable[[str], Model], tmp_path: Path, caplog: Any) -> None:
    """Read by this package: diffusers would refuse this file, which names a class."""
    caplog.set_level("INFO", logger="qncd")
    pipe, state, folder = model("SDXL refiner")
    half = {f"module.{key}": value.half() for key, value in state.items()}
    extras = {"model_ema.decay": torch.tensor(0.9), "cond_stage_key": torch.zeros(1)}
    inner = {**half, **extras, "conditioner.embedders.0.model.attn_mask": torch.zeros(77, 77)}
    torch.save({"state_dict": {"state_dict": inner}, "callbacks": Callback()}, tmp_path / "m.ckpt")
    found = qncd.load(tmp_path / "m.ckpt", config=folder)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            expected = {key: value.half().float() for key, value in part.state_dict().items()}
            assert state_dict_hash(getattr(found, name)) == state_dict_hash(expected)
    assert any(
        f"{tmp_path / 'm.ckpt'}: not used: cond_stage_key, model_ema.*" == record.getMessage() for record in caplog.records
    )


@pytest.mark.parametrize(
    ("extra", "metadata", "prediction", "zero_snr", "told"),
    [
        ((), {}, "epsilon", False, "predicts epsilon as FOLDER says (the file does not: else name another)"),
        (("v_pred", "ztsnr"), {}, "v_prediction", True, "predicts v_prediction by v_pred, ztsnr of the file, zero terminal SNR"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v_prediction", False, "v_prediction by v_pred of the file"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", False, "by modelspec.prediction_type of the file"),
    ],
)
def test_what_a_file_says_of_its_predictions(
    model: Callable[[str], Model],
    extra: Any,
    metadata: Any,
    prediction: str,
    zero_snr: bool,
    told: str,
    tmp_path: Path,
    caplog: Any,
) -> None:
    caplog.set_level("INFO", logger="qncd")
    _, state, folder = model("SDXL refiner")
    save_file({**state, **{key: torch.zeros(0) for key in extra}}, tmp_path / "m.safetensors", metadata)
    scheduler = qncd.load(tmp_path / "m.safetensors", config=folder).scheduler
    assert type(scheduler) is diffusers.EulerDiscreteScheduler and scheduler.config.steps_offset == 1
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == (prediction, zero_snr)
    assert told.replace("FOLDER", str(folder)) in caplog.text and "not used" not in caplog.text


def test_a_folder_of_velocities_and_a_file_of_noise(model: Callable[[str], Model], tmp_path: Path) -> None:
    _, state, folder = model("SD2, v-prediction")
    path = tmp_path / "m.safetensors"
    save_file(state, path, {"modelspec.prediction_type": "epsilon"})
    assert qncd.load(path, config=folder).scheduler.config.prediction_type == "epsilon"


def test_a_scheduler_that_does_not_know_zero_terminal_snr(model: Callable[[str], Model], tmp_path: Path) -> None:
    pipe, state, _ = model("SD1")
    save_file({**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "m.safetensors")
    own, pipe.scheduler = pipe.scheduler, diffusers.PNDMScheduler(skip_prk_steps=True)
    other = configs_alone(pipe, tmp_path / "other")
    pipe.scheduler = own
    refused(r"rescale_betas_zero_snr \(v_pred, ztsnr\), which PNDMScheduler does not have", tmp_path / "m.safetensors", other)
    scheduler = qncd.load(tmp_path / "m.safetensors", config=other, scheduler="DDIM").scheduler
    assert type(scheduler) is diffusers.DDIMScheduler and float(scheduler.alphas_cumprod[-1]) == 0
    assert scheduler.config.prediction_type == "v_prediction"


def test_velocities_of_stable_diffusion_1_are_a_pipelines(model: Callable[[str], Model], tmp_path: Path) -> None:
    """CompVis' samplers take noise only."""
    _, state, folder = model("SD1")
    save_file({**state, "v_pred": torch.zeros(0)}, tmp_path / "m.safetensors")
    assert is_pipeline_file(tmp_path / "m.safetensors")
    assert qncd.load(tmp_path / "m.safetensors", config=folder).scheduler.config.prediction_type == "v_prediction"
    config = config_of("text")
    save_file(state_of(config), tmp_path / "m.safetensors", {"modelspec.prediction_type": "v"})
    refused(r"predicts velocities \(modelspec\.prediction_type\), which no yaml describes", tmp_path / "m.safetensors", config)


def refused(message: str, path: Path, config: Any = None, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        qncd.load(path, config=config)
    assert "\n" not in str(caught.value) and (str(path) in str(caught.value) or "gone" in message)


def test_what_does_not_fit_is_named(model: Callable[[str], Model], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    _, state, folder = model("SDXL")
    other = model("SD2, v-prediction")[2]

    def write(change: dict[str, Any], but: str = "none of them") -> None:
        save_file({key: value for key, value in {**state, **change}.items() if not key.startswith(but)}, path)

    write({}, "model.diffusion_model.out.2.bias")
    refused(r"unet: not that of .*: 1 keys are missing: conv_out\.bias$", path, folder)
    write({"model.diffusion_model.input_blocks.1.2.weight": torch.zeros(1)})
    refused(r"unet: 1 keys that the network of .* lacks: input_blocks\.1\.2\.weight$", path, folder)
    write({"model.diffusion_model.out.2.bias": torch.zeros(5)})
    refused(r"unet: not that of .*: 1 tensors have another shape than their layer: conv_out\.bias$", path, folder)
    write({"conditioner.embedders.2.x": torch.zeros(1)})
    refused(r"1 keys belong to no network of .*: conditioner\.embedders\.2\.x$", path, folder)
    write({"conditioner.embedders.1.model.visual.proj": torch.zeros(1)})
    refused(r"text_encoder_2: 1 keys that no text model has: visual\.proj$", path, folder)
    write({}, "first_stage_model.")
    refused(r"has no vae, and there are no weights in .*vae either$", path, folder)
    write({})
    refused(r"m\.safetensors: unet: ", path, other)
    refused(r"no model_index\.json in it\), and .* needs that of Stable Diffusion XL$", path, folder / "unet")
    refused("gone: no such config file", path, tmp_path / "gone", FileNotFoundError)
    refused("Stable Diffusion XL, which no yaml describes: leave out --config", path, config_of("text"))
    save_file(state, path, {"modelspec.prediction_type": "x0"})
    refused(r"modelspec\.prediction_type 'x0': allowed are epsilon, v$", path, folder)
    averaged = {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(16, 4, 3, 3)}
    write(averaged, "model.")
    refused(r"unet: is another network than that of ", path, folder)
    refused(r"averaged weights alone \(model_ema\.\*\), of which no hub id is known: name a diffusers folder", path)
    write({**averaged, "model_ema.diffusion_modelx": torch.zeros(1)}, "model.")
    refused(r"1 averaged weights that the network of .*unet lacks: model_ema\.diffusion_modelx$", path, folder)
    save_file({"conv_in.weight": torch.zeros(1)}, path)
    refused("not a checkpoint of Stable Diffusion, and config=", path, folder)
    with pytest.raises(ValueError, match="names a pipeline, which says how the parts of a checkpoint file are made"):
        qncd.load("a/b", config=folder)


def test_a_part_that_the_file_lacks_is_the_folders(model: Callable[[str], Model], tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", logger="qncd")
    pipe, state, _ = model("SD2, v-prediction")
    pipe.save_pretrained(tmp_path / "whole")
    path = tmp_path / "m.safetensors"
    save_file({key: value for key, value in state.items() if not key.startswith("first_stage_model.")}, path)
    assert hashes(qncd.load(path, config=tmp_path / "whole")) == hashes(pipe)
    assert f"m.safetensors: has no vae, taken is that of {tmp_path / 'whole'}" in caplog.text


def test_by_default_the_configs_are_the_hubs(model: Callable[[str], Model], tmp_path: Path, monkeypatch: Any) -> None:
    pipe, state, folder = model("SDXL")
    path = tmp_path / "m.safetensors"
    seen: list[str] = []

    def download(name: str, **_: Any) -> str:
        seen.append(name)
        if name == "owner/none":
            raise OSError("no connection\nsecond line")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_file(state, path)
    assert hashes(qncd.load(path, config="owner/name")) == hashes(pipe)
    layers = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(20)}  # SDXL has that many
    save_file(state | layers, path)
    refused(r"text_encoder_2: not that of .*: 1 keys belong to no layer: .*layers\.9\.mlp\.fc2\.bias$", path)
    assert seen == ["owner/name", "stabilityai/stable-diffusion-xl-base-1.0"]
    refused(
        r"m\.safetensors: Stable Diffusion XL, and the file does not say how its parts are made: owner/none is not to be had "
        r"from the hub \(no connection\): name a diffusers folder of such a model with --config",
        path, "owner/none", FileNotFoundError,
    )  # fmt: skip


PARTS = {
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0.lora_down.weight"],
    "a LoRA ": ["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a ControlNet ": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a textual inversion": ["clip_g", "clip_l"],
    "an IP-Adapter": ["image_proj.proj.weight"],
    "the transformer of Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "the transformer of FLUX or of its kind": ["double_blocks.0.img_attn.qkv.weight"],
    "the transformer of FLUX or of its kind ": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "the network of another model": ["model.diffusion_model.patch_embedding.weight"],
    "an autoencoder alone": ["first_stage_model.encoder.conv_in.weight"],
    "an autoencoder alone ": ["decoder.up.0.block.0.conv1.weight", "quant_conv.weight"],
    "a UNet alone": ["down_blocks.0.resnets.0.conv1.weight"],
    "a text encoder alone": ["text_model.encoder.layers.0.mlp.fc1.weight"],
}


@pytest.mark.parametrize("what", PARTS)
def test_a_part_of_a_model_is_named(what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({key: torch.zeros(1) for key in PARTS[what]}, path)
    with pytest.raises(ValueError, match=rf"^{path}: is {what.strip()} \(.*\), not a whole model: ") as caught:
        is_pipeline(str(path))
    assert "\n" not in str(caught.value)


def test_a_control_net_with_its_model_is_one(model: Callable[[str], Model], tmp_path: Path) -> None:
    save_file({**model("SD1")[1], "control_model.input_hint_block.0.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    refused("is a ControlNet", tmp_path / "m.safetensors")


def test_files_of_other_layouts_are_left_to_their_yaml(tmp_path: Path) -> None:
    torch.save([{"module.conv_in.weight": torch.zeros(1)}, {}], tmp_path / "ddim.ckpt")
    assert find_single_file(tmp_path / "ddim.ckpt") is None and not is_pipeline(str(tmp_path / "ddim.ckpt"))
    save_file(state_of(config_of("class")), tmp_path / "classes.safetensors")
    assert not is_pipeline_file(tmp_path / "classes.safetensors")
    (tmp_path / "text.safetensors").write_text("not a checkpoint, but a text of more than eight letters")
    with pytest.raises(ValueError, match=r"text\.safetensors: truncated, or not a checkpoint"):
        is_pipeline(str(tmp_path / "text.safetensors"))


def test_stable_diffusion_1_needs_no_yaml(tmp_path: Path) -> None:
    """A yaml beside it comes first: of its name, config.yaml, the only one."""
    shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3), "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768)}
    state = prefixed("model.diffusion_model.", {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()})
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    assert yaml_of(path).name == "sd-v1-inference.yaml"
    config, ckpt = find_model(None, str(path), Path())
    assert config["model"]["params"]["unet_config"]["params"]["context_dim"] == 768 and ckpt == str(path)
    (tmp_path / "a.yaml").touch()
    assert yaml_of(path).name == "a.yaml"
    (tmp_path / "b.yaml").touch()
    assert yaml_of(path).name == "sd-v1-inference.yaml"
    (tmp_path / "m.yaml").touch()
    assert yaml_of(path).name == "m.yaml"
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="which yaml describes it"):
        yaml_of(tmp_path / "other.safetensors")
