"""diffusers' pipelines with a network on an engine as their component."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.adapter import T2IAdapter
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_adapter import StableDiffusionAdapterPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from quantized_networks import prepared
from small_pipelines import KINDS, made, picture, run, stable, unet
from torch import Tensor

import qncd
from qncd.engines.engine import export, open_engine
from qncd.engines.network import in_float32
from qncd.models.network import network_of
from qncd.models.seen import remember_inputs
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.recipe import QuantConfig
from qncd.sampling.pipeline import denoiser_of

ENGINES = ("onnxruntime", "openvino")


def guided(unet: Any, scheduler: Any) -> Tensor:
    """Latents (2, 4, 8, 8) of a guided Stable Diffusion pipeline with random prompt embeddings."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).to("cpu")  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    embeddings = [torch.randn(2, 5, 12) for _ in range(2)]
    out: Tensor = pipe(
        prompt_embeds=embeddings[0], negative_prompt_embeds=embeddings[1], num_inference_steps=4, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1), output_type="latent", height=8, width=8,
    ).images  # fmt: skip
    return out


def test_stable_diffusion(make_cross_unet: Any, tmp_path: Path) -> None:
    """Guided, with integer and with float time steps, and ranges for each step."""
    full, config = make_cross_unet(), QuantConfig(4, 8, stepwise_activations=True)
    unet = prepared(copy.deepcopy(full), config, set_all_stepwise_)
    export(unet, tmp_path, config)
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler()):
        exact, expected = guided(full, scheduler), guided(unet, scheduler)
        for backend in ENGINES:
            found = guided(open_engine(unet, tmp_path, backend, threads=1), scheduler)
            assert found.shape == (2, 4, 8, 8)
            assert (found - expected).square().mean() < (0.9 * (expected - exact)).square().mean()


def test_ddim(make_unet: Any, tmp_path: Path) -> None:
    """The pipeline of an unconditional network, in full precision; the component may be put into a ready pipeline too."""
    unet = make_unet()
    export(unet, tmp_path, None)
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images)

    expected = sample()
    for backend in ENGINES:
        pipe.unet = open_engine(unet, tmp_path, backend, threads=1)
        torch.testing.assert_close(sample(), expected, rtol=1e-3, atol=1e-3)
        assert pipe.to(torch.float32).device == unet.device


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("DiT", "qncd+"), ("FLUX", "linear"),
     *(pytest.param(kind, "linear", marks=pytest.mark.slow)
       for kind in ("PixArt sigma", "SD3", "Sana", "AuraFlow", "Chroma", "HunyuanDiT", "Lumina2", "Wan", "Z-Image"))],
)  # fmt: skip
def test_transformers(kind: str, mode: str, tmp_path: Path) -> None:
    """Classes and rotations, ids of places that all samples share, masked texts, joint streams, linear attention, lists; as fake
    quantization.
    """
    pipe = made(kind)
    exact = run(pipe, kind)
    qncd.quantize(pipe, "W8A8", mode=mode, calls=[KINDS[kind].call] * 2, steps=4)
    expected = run(pipe, kind)
    qncd.export(pipe, tmp_path)
    for backend in ENGINES:
        found = run(qncd.open_engine(pipe, tmp_path, backend), kind)
        assert (found - expected).square().mean() <= 1.5 * (expected - exact).square().mean()


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [("SDXL", torch.float16, "W8A8"), ("SD3", torch.bfloat16, "W4A8"),
     pytest.param("HunyuanDiT", torch.float16, "W8A8", marks=pytest.mark.slow),
     pytest.param("FLUX", torch.bfloat16, None, marks=pytest.mark.slow)],
)  # fmt: skip
def test_half_precision(kind: str, dtype: torch.dtype, width: str | None, tmp_path: Path) -> None:
    """A network in half precision is float32 in the file, where it is not integers; the pipeline keeps its dtype."""
    pipe = made(kind).to(dtype)
    network, calls = network_of(denoiser_of(pipe)[1]), list[Any]()
    hook = network.module.register_forward_pre_hook(lambda _, args, kw: calls.append(network.bind(args, kw)), with_kwargs=True)
    run(pipe, kind)
    hook.remove()
    call = calls[0]
    if width is None:
        remember_inputs(network, call.x, call.t, call.inputs, call.constants)
        export(network, tmp_path, None)
    else:
        qncd.quantize(pipe, width, mode="linear", calls=[KINDS[kind].call] * 2, steps=4)
        qncd.export(pipe, tmp_path)
    floats = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in {**call.inputs, **call.constants}.items()
    }
    with torch.no_grad():
        expected = in_float32(network_of(denoiser_of(pipe)[1])).call(call.x.float(), call.t, **{"inputs": {}, **floats})
    for backend in ENGINES:
        found = network_of(open_engine(network, tmp_path, backend)).call(call.x, call.t, call.inputs, **call.constants)
        assert found.dtype is dtype
        apart = found.float() - expected
        assert apart.square().mean() <= 1e-2 * expected.square().mean()  # ties tip
        assert apart.abs().median() <= 1e-2 * expected.abs().mean()  # the output is rounded to the pipeline's dtype
    assert all(p.dtype is dtype for p in network.module.parameters() if p.ndim == 1)


def test_texts_of_any_length_and_one_shape_of_images(tmp_path: Path) -> None:
    """Qwen-Image from a folder of qncd.save: shapes that are no tensors are in the file, and other ones are refused."""
    pipe, call = made("Qwen-Image"), KINDS["Qwen-Image"].call
    qncd.quantize(pipe, "W8A8", mode="linear", calls=[call], steps=2, samples=2)
    qncd.save(pipe, tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    qncd.export(loaded, tmp_path / "exported")
    fast = qncd.open_engine(loaded, tmp_path / "exported")
    further = {"prompt": ["a cat", "a very long prompt about two dogs"], "negative_prompt": [" ", " "]}
    outputs = [
        model(
            **{**call, **further}, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images
        for model in (loaded, fast)
    ]
    assert (outputs[1] - outputs[0]).square().mean() < 1e-3 * outputs[0].square().mean()
    with pytest.raises(
        ValueError, match=r"img_shapes is \[\[\[1, 2, 8\]\]\]: the network on the engine is made for \[\[\[1, 4, 4"
    ):
        fast(**{**call, "height": 32, "width": 128}, num_inference_steps=1, output_type="latent")


def test_residuals_of_an_adapter_are_seen(tmp_path: Path) -> None:
    """diffusers' UNet takes them out of their list as it goes: calibration, and the exported network, need them all the same."""
    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    pipe = stable(unet(down_block_types=down, up_block_types=up), kind=StableDiffusionAdapterPipeline, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": ["a red circle"], "image": [picture()], "height": 16, "width": 16}

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found: Tensor = pipe(**call, num_inference_steps=3, generator=generator, output_type="latent").images
        return found

    exact = sample()
    qncd.quantize(pipe, "W8A8", mode="linear", calls=[call], steps=3, samples=1)
    expected = sample()
    qncd.export(pipe, tmp_path)
    pipe = qncd.open_engine(pipe, tmp_path)
    assert any(name.startswith("down_intrablock_additional_residuals.") for name in pipe.unet.inputs)
    assert (sample() - expected).square().mean() <= 1.5 * (expected - exact).square().mean()
