"""Models as pipelines of diffusers: they give the images of this package's samplers, survive saving, and say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, LDMPipeline, StableDiffusionPipeline
from diffusers.models.unets.unet_2d import UNet2DModel
from latent_models import config_of, state_of
from safetensors.torch import load_file, save_file
from small_pipelines import made

from qncd.models.class_conditional import ClassConditionalLDMPipeline
from qncd.models.latent import LatentModel, load_latent_model, save_latent_model
from qncd.models.loading import load_config, load_ddim, state_dict_hash
from qncd.models.network import network_of
from qncd.models.original.ddim import to_ddim_state_dict
from qncd.models.pipelines import load_pipeline
from qncd.recipe import SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.process import Process
from qncd.sampling.schedule import betas_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DDIM, CLASSES, TEXT = (CONFIGS / name for name in ("fashion_mnist.yml", "fashion_mnist_ldm.yaml", "scenes.yaml"))
SEEDS, STEPS = (3, 4), 10
PROMPTS = ["a red circle above a blue square", "a small “green” triangle"]

CONTEXT = "encoder_hidden_states"


def generators() -> list[torch.Generator]:
    """The noise of SEEDS as this package's samplers draw it."""
    return [torch.Generator().manual_seed(seed << 8) for seed in SEEDS]


def own_samples(model: LatentModel, conditions: Conditions | None, eta: float = 0.0) -> torch.Tensor:
    sampler = SamplerConfig(timesteps=STEPS, eta=eta, convention="ldm")
    return Diffusion(network_of(model.unet), Process.from_betas(model.betas), sampler, model.latent_shape, lane=2).sample(
        SEEDS, conditions=conditions
    )


def pixels(images: torch.Tensor) -> np.ndarray:
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_pipeline_equals_the_sampler(eta: float) -> None:
    config, sampler = load_config(DDIM), SamplerConfig(timesteps=STEPS, eta=eta)
    network, process = network_of(load_ddim(config)), Process.from_betas(betas_of(config))
    expected = pixels(Diffusion(network, process, sampler, (1, 32, 32), lane=2).sample(SEEDS))
    pipeline = load_pipeline(DDIM)
    assert type(pipeline) is DDIMPipeline
    found = pipeline(batch_size=2, generator=generators(), num_inference_steps=STEPS, eta=eta, output_type="np").images
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(("scale", "eta"), [(3.0, 0.0), (3.0, 0.5), (1.0, 0.0)])
def test_class_conditional_pipeline_equals_the_sampler(scale: float, eta: float) -> None:
    model = load_latent_model(load_config(CLASSES))
    classes: Any = model.conditioner
    conditions = Conditions({CONTEXT: classes(torch.tensor([1, 7]))}, {CONTEXT: classes.unconditional(1)}, scale)
    pipeline = load_pipeline(CLASSES)
    assert type(pipeline) is ClassConditionalLDMPipeline
    arguments: dict[str, Any] = {"guidance_scale": scale, "num_inference_steps": STEPS, "eta": eta, "output_type": "latent"}
    expected = own_samples(model, conditions, eta)
    assert (pipeline([1, 7], generator=generators(), **arguments).images - expected).abs().max() < 1e-4
    start = torch.cat([torch.randn(1, *model.latent_shape, generator=generator) for generator in generators()])
    if eta == 0:
        assert (pipeline(torch.tensor([1, 7]), latents=start, **arguments).images - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_text_pipeline_equals_the_sampler() -> None:
    """Curly quotes too: the pipeline's tokenizer cleans prompts as CLIP's does."""
    model = load_latent_model(load_config(TEXT))
    text: Any = model.conditioner
    expected = own_samples(model, Conditions({CONTEXT: text(PROMPTS)}, {CONTEXT: text.unconditional(1)}, 4.0))
    pipeline = load_pipeline(TEXT)
    assert type(pipeline) is StableDiffusionPipeline and pipeline.safety_checker is None
    arguments: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": STEPS}
    found = pipeline(PROMPTS, generator=generators(), output_type="latent", **arguments).images
    assert (found - expected).abs().max() < 1e-4
    images = pipeline(PROMPTS, generator=generators(), output_type="np", **arguments).images
    assert np.abs(images - pixels(model.first_stage.decode(expected))).max() < 1e-3


def test_unconditional_latent_pipeline_equals_the_sampler(tmp_path: Path) -> None:
    config = config_of("none", use_ema=False)
    torch.save(state_of(config), tmp_path / "m.ckpt")
    model = load_latent_model(config, tmp_path / "m.ckpt")
    expected = pixels(model.first_stage.decode(own_samples(model, None)))
    pipeline = load_pipeline(tmp_path / "m.ckpt", config=config)
    assert type(pipeline) is LDMPipeline
    save_latent_model(model, tmp_path / "folder")
    assert np.array_equal(draw(load_pipeline(tmp_path / "folder")), draw(pipeline))
    found = pipeline(batch_size=2, generator=generators(), num_inference_steps=STEPS, output_type="np").images
    assert np.abs(found - expected).max() < 1e-4


def draw(pipeline: DiffusionPipeline) -> Any:
    first: tuple[Any, ...] = {"ClassConditionalLDMPipeline": ([1, 7],), "StableDiffusionPipeline": (PROMPTS[:1] * 2,)}.get(
        type(pipeline).__name__, (2,)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(*first, generator=generators(), num_inference_steps=2, output_type="np").images


@pytest.mark.parametrize("source", [DDIM, CLASSES, pytest.param(TEXT, marks=pytest.mark.slow)])
def test_saved_pipelines_come_back(source: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(source)
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(str(tmp_path / "saved"))
    assert type(again) is type(pipeline)
    assert np.array_equal(draw(again), draw(pipeline))
    if source == DDIM:
        unet = load_ddim(load_config(DDIM), tmp_path / "saved")
    else:
        unet = load_latent_model(load_config(source), tmp_path / "saved").unet
    assert state_dict_hash(unet) == state_dict_hash(pipeline.unet)


def test_the_pipeline_class_loads_its_folder(tmp_path: Path) -> None:
    pipeline = load_pipeline(CLASSES)
    pipeline.save_pretrained(tmp_path)
    again = ClassConditionalLDMPipeline.from_pretrained(tmp_path)
    assert np.array_equal(draw(again), draw(pipeline))


def test_output_types_and_callback() -> None:
    pipeline = load_pipeline(CLASSES)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[int, int]] = []

    def stop_at_zero(pipe: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert pipe is pipeline
        seen.append((step, int(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    result = pipeline(1, num_inference_steps=4, output_type="latent", callback_on_step_end=stop_at_zero)
    assert seen == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert result.images.abs().max() == 0
    (image,) = pipeline(1, num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (32, 32))
    assert pipeline(1, num_inference_steps=2, output_type="pt").images.shape == (1, 1, 32, 32)
    assert load_pipeline(DDIM)(num_inference_steps=2).images[0].mode == "L"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 11}, r"classes \[11\]: allowed are 0 to 10"),
        ({"class_labels": []}, "expected one class label or more"),
        ({"class_labels": 1, "output_type": "jpg"}, "output_type 'jpg': allowed are pil, np, pt, latent"),
        ({"class_labels": 1, "latents": torch.zeros(2, 3, 8, 8)}, r"latents of shape \(2, 3, 8, 8\): expected \(1, 3, height"),
        ({"class_labels": [1], "generator": generators()}, "2 generators for 1 class labels"),
    ],
)
def test_wrong_arguments_of_the_class_conditional_pipeline(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(CLASSES)(**arguments)


def test_original_checkpoints(tmp_path: Path) -> None:
    """As the source with its yaml, or as the weights of a yaml; and a UNet's folder with its yaml."""
    config = load_config(DDIM)
    unet = load_ddim(config)
    torch.save(to_ddim_state_dict(unet.state_dict(), config), tmp_path / "m.ckpt")
    unet.save_pretrained(tmp_path / "unet")
    for pipeline in (
        load_pipeline(tmp_path / "m.ckpt", config=DDIM),
        load_pipeline(DDIM, ckpt=tmp_path / "m.ckpt"),
        load_pipeline(tmp_path / "unet", config=config),
    ):
        assert type(pipeline) is DDIMPipeline and state_dict_hash(pipeline.unet) == state_dict_hash(unet)
    latent = config_of("class")
    save_file(state_of(latent), tmp_path / "m.safetensors")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(latent))
    assert type(load_pipeline(tmp_path / "m.yaml", ckpt=tmp_path / "m.safetensors")) is ClassConditionalLDMPipeline


def test_other_folders_are_whatever_they_name(make_unet: Callable[..., UNet2DModel], tmp_path: Path) -> None:
    """The pipeline samples with its own scheduler, also where this package's samplers have none such."""
    DDPMPipeline(make_unet(), DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert type(pipeline) is DDPMPipeline and pipeline.scheduler.config.prediction_type == "v_prediction"


def refused(error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        load_pipeline(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_what_is_no_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(FileNotFoundError, r"gone\.yaml: no such config file$", tmp_path / "gone.yaml")
    refused(FileNotFoundError, r"gone\.ckpt: no such file or folder, and no hub id", tmp_path / "gone.ckpt")
    refused(ValueError, r"not the folder of a pipeline \(no model_index\.json in it; none\)", tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "m.ckpt")
    refused(ValueError, r"m\.ckpt: which yaml describes it\? 0 lie beside it: name one with --config$", tmp_path / "m.ckpt")
    refused(ValueError, r"ckpt= and use_pretrained= are for a yaml", tmp_path / "m.ckpt", ckpt=tmp_path / "m.ckpt")
    refused(ValueError, r"fashion_mnist\.yml: config= is the yaml of a checkpoint", DDIM, config=DDIM)
    refused(ValueError, "model.params.unet_config", tmp_path / "m.ckpt", config={"model": {"params": {}}})
    load_pipeline(DDIM).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "unet" / "config.json").write_text("{")
    refused(ValueError, r"saved: diffusers cannot load this DDIMPipeline \(", tmp_path / "saved")
    refused(ValueError, "needs its yaml: give config=PATH", tmp_path / "saved" / "unet")
    load_pipeline(DDIM).save_pretrained(tmp_path / "spoiled")
    weights = tmp_path / "spoiled" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "conv_in.weight"}, weights)
    refused(ValueError, r"spoiled: the weights of its unet have no conv_in\.weight", tmp_path / "spoiled")
    save_file(state | {"conv_in.bias": state["conv_in.bias"] / 0}, weights)
    refused(ValueError, r"spoiled: in its unet, conv_in\.bias holds NaN or infinity", tmp_path / "spoiled")
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name: str(tmp_path / name.partition("/")[2]))
    load_pipeline(DDIM).save_pretrained(tmp_path / "whole")
    assert load_pipeline("google/whole").name_or_path == str(tmp_path / "whole")
    refused(ValueError, r"spoiled: in its unet, conv_in\.bias holds NaN or infinity", "google/spoiled")

    def offline(name: str, **_: Any) -> None:
        raise OSError("\nno connection\nsecond line")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    message = (
        r"^google/none: no such path here, and not to be had from the hub \(no connection\): download its folder and name that$"
    )
    refused(FileNotFoundError, message, "google/none")


@pytest.mark.parametrize("library", ["payload", "diffusers", "os", "subprocess", "unet.payload", 3, ["a"]])
def test_no_code_of_a_folder_is_run(library: Any, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("payload", "diffusers"):
        (tmp_path / "unet" / f"{name}.py").write_text("raise SystemExit(77)")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": [library, "UNet2DModel"]}))
    with pytest.raises(
        ValueError, match=r"model_index\.json: unet .*: allowed are classes of diffusers, transformers, qncd; no other"
    ):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": ["payload", "Pipeline"]}))
    with pytest.raises(ValueError, match=r"model_index\.json: _class_name \['payload', 'Pipeline'\]: allowed are texts$"):
        load_pipeline(tmp_path)


def spoiled(kind: str, folder: Path, spoil: Callable[[Path], None]) -> Path:
    """A pipeline's folder after something has been done to it."""
    made(kind).save_pretrained(folder)
    spoil(folder)
    return folder


def without_weight(part: str, name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        weights = load_file(file)
        save_file({key: value for key, value in weights.items() if not key.endswith(name)}, file, {"format": "pt"})

    return spoil


def without_files(part: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in (folder / part).iterdir()]  # type: ignore[return-value]


def setting(file: str, **settings: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **settings}
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return spoil


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("SD1", without_weight("text_encoder", "mlp.fc1.weight"), r"the weights of its text_encoder have no .*mlp\.fc1\.weight"),
        ("SD3", without_weight("text_encoder_3", "SelfAttention.q.weight"), "the weights of its text_encoder_3 have no encoder"),
        ("SD1", without_files("tokenizer"), r"tokenizer: no vocabulary of a CLIPTokenizer \(merges\.txt, .*vocab\.json\) in it"),
        ("SD1", setting("model_index.json", _class_name=None), "has no _class_name, the class of the pipeline"),
        ("SD1", setting("scheduler/scheduler_config.json", num_train_timesteps=0), "diffusers cannot load this StableDiff"),
        ("SD1", setting("scheduler/scheduler_config.json", beta_start=float("nan")), "DDIMScheduler hold NaN or infinity"),
    ],
    ids=["text", "T5", "tokenizer", "class", "steps", "levels"],
)
def test_folders_that_diffusers_takes_for_whole(kind: str, spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """It draws weights that are missing at random, or comes to grief while sampling."""
    with pytest.raises(ValueError, match=message):
        load_pipeline(spoiled(kind, tmp_path / "model", spoil))


def test_other_files_beside_a_variant(tmp_path: Path) -> None:
    """Those of other engines are no weights of the network."""
    made("SD1").to(dtype=torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    (tmp_path / "model" / "unet" / "openvino_model.bin").write_bytes(b"x")
    assert isinstance(load_pipeline(tmp_path / "model"), StableDiffusionPipeline)
