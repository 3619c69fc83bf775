"""LoRA beside quantized weights: in floating point, scaled afterwards, taken off without a trace; networks with an IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from child_processes import python
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import run_in_process
from small_pipelines import KINDS, PROMPTS, made, picture, run, text_model, write_ip_adapter, write_lora

import qncd
from qncd.models.seen import seen_inputs
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantConv2d, QuantLayer, QuantLinear

pytest.importorskip("peft")
STEPS = 2
LAYERS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2", "time_emb_proj", "conv_in", "conv_out")


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder of `qncd.save`, with smoothing; and the images of it."""
    folder, pipe = tmp_path_factory.mktemp("adapters") / "model", made("SD1")
    qncd.quantize(pipe, "W8A8", "linear", smoothing=True, prompts=PROMPTS, steps=STEPS, samples=2)
    qncd.save(pipe, folder)
    return folder, run(pipe, "SD1", STEPS)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For linear layers and convolutions, first and last one included."""
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", made("SD1").unet, *LAYERS, scale=0.1)


def again(folder: Path) -> Any:
    """The quantized pipeline, in less time than reading the whole folder takes."""
    pipe = made("SD1")
    qncd.load_quantized(pipe, folder)
    return pipe


def adapt(pipe: Any, lora: Path, name: str = "style") -> Any:
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=name)
    return pipe


def test_a_lora_beside_a_loaded_folder(quantized: tuple[Path, torch.Tensor], lora: Path, tmp_path: Path) -> None:
    folder, plain = quantized
    float_pipe = adapt(made("SD1"), lora)
    exact = {weight: (float_pipe.set_adapters("style", weight), run(float_pipe, "SD1", STEPS))[1] for weight in (0.0, 0.5, 1.0)}
    pipe = adapt(diffusers.DiffusionPipeline.from_pretrained(folder), lora)
    assert any(isinstance(layer, QuantConv2d) for layer in quant_layers(pipe.unet).values())
    adapters = [m for name, m in pipe.unet.named_modules() if ".lora_A." in name or ".lora_B." in name]
    assert len(adapters) > 60 and not any(isinstance(m, QuantLayer) or m.weight.dtype != torch.float32 for m in adapters)
    found = {}
    for weight in (1.0, 0.5, 0.0):
        pipe.set_adapters("style", adapter_weights=weight)
        found[weight] = run(pipe, "SD1", STEPS)
        # Off by no more than quantization is, and by less than the adapter does.
        assert apart(found[weight], exact[weight]) < max(0.07, 0.5 * apart(exact[weight], exact[0.0]))
    assert torch.equal(found[0.0], plain) and not torch.equal(found[1.0], found[0.5])
    pipe.set_adapters("style", 1.0)
    halved = run(pipe, "SD1", STEPS, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(halved, found[0.5])
    pipe.disable_lora()
    assert torch.equal(run(pipe, "SD1", STEPS), plain)
    pipe.enable_lora()
    assert torch.equal(run(pipe, "SD1", STEPS), found[1.0])
    python(f"""
import qncd, diffusers, torch
pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})
pipe.load_lora_weights({str(lora.parent)!r}, weight_name={lora.name!r})
generators = [torch.Generator().manual_seed(seed << 8) for seed in (3, 4)]
out = pipe({PROMPTS!r}, num_inference_steps={STEPS}, generator=generators, output_type="latent").images
torch.save(out, {str(tmp_path / "out.pt")!r})
""")
    assert torch.equal(torch.load(tmp_path / "out.pt"), found[1.0])
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, "SD1", STEPS), plain)
    qncd.save(pipe, tmp_path / "again")
    saved = [load_file(path / "unet" / "diffusion_pytorch_model.safetensors") for path in (folder, tmp_path / "again")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


def test_a_lora_beside_packed_weights_of_flux(tmp_path: Path) -> None:
    """diffusers looks up the shapes of FLUX's weights, of which a packed network has codes alone."""
    pipe = made("FLUX")
    qncd.quantize(pipe, "W4A8", "linear", calls=[KINDS["FLUX"].call], steps=STEPS)
    qncd.save(pipe, tmp_path / "model")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    plain, network = run(pipe, "FLUX", STEPS), made("FLUX").transformer
    file = write_lora(tmp_path / "style.safetensors", network, "to_q", "to_v", prefix="transformer")
    adapt(pipe, file)
    adapted = run(pipe, "FLUX", STEPS)
    adapt(pipe, file, "again")  # beside an adapter
    pipe.set_adapters(["style", "again"], [0.5, 0.5])
    assert apart(adapted, plain) > 0.01 and apart(run(pipe, "FLUX", STEPS), adapted) < 1e-4
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, "FLUX", STEPS), plain)
    assert not any(name.endswith("to_q.weight") for name in pipe.transformer.state_dict())
    with pytest.raises(KeyError):
        pipe.transformer.state_dict()["no.such.weight"]


def test_what_an_adapter_is_given(lora: Path) -> None:
    """The input of the layer as it comes, not the codes that the layer makes of it, and without its smoothing."""
    pipe = made("SD1")
    qncd.quantize(pipe, "W4A4", "linear", prompts=PROMPTS, steps=2, samples=2, smoothing=True)
    adapt(pipe, lora)
    beside: Any = pipe.unet.up_blocks[0].resnets[0].conv2
    assert type(beside.base_layer) is QuantConv2d and beside.base_layer.smoothing is not None
    x = torch.randn(2, beside.base_layer.in_channels, 8, 8)
    with torch.no_grad():
        down, up = beside.lora_A["style"], beside.lora_B["style"]
        assert type(down) is type(up) is torch.nn.Conv2d
        assert torch.equal(beside(x), beside.base_layer(x) + up(down(x)) * beside.scaling["style"])
    assert type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer) is QuantLinear


def test_several_adapters_dtypes_and_the_text_encoder(quantized: tuple[Path, torch.Tensor], lora: Path, tmp_path: Path) -> None:
    folder, plain = quantized
    text = write_lora(tmp_path / "text.safetensors", text_model(), "q_proj", prefix="text_encoder", scale=1.0)
    pipe = adapt(adapt(again(folder), lora), text, "words")
    both = run(pipe, "SD1", STEPS)
    pipe.set_adapters(["style", "words"], [0.0, 1.0])
    words = run(pipe, "SD1", STEPS)
    assert not torch.equal(words, plain) and not torch.equal(words, both)
    pipe.fuse_lora(components=["text_encoder"])  # which is not quantized
    half = adapt(diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16), lora)
    assert half.unet.conv_in.lora_A["style"].weight.dtype == torch.bfloat16
    assert apart(run(half, "SD1", STEPS), run(adapt(again(folder), lora), "SD1", STEPS)) < 0.1


def test_what_adapters_cannot(quantized: tuple[Path, torch.Tensor], lora: Path, tmp_path: Path) -> None:
    folder, plain = quantized
    pipe = adapt(again(folder), lora)
    before = run(pipe, "SD1", STEPS)
    with pytest.raises(ValueError, match=r"^fuse_lora: the weights are quantized, and the adapter stays in floating point"):
        pipe.fuse_lora()
    assert torch.equal(run(pipe, "SD1", STEPS), before)
    for attempt in (
        lambda: qncd.save(pipe, tmp_path / "x"),
        lambda: pipe.save_pretrained(tmp_path / "x"),
        lambda: qncd.export(pipe, tmp_path / "x"),
        lambda: qncd.open_engine(pipe, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=r"has adapters beside its layers \(style\): unload_lora_weights\(\) first"):
            attempt()
    pipe.unet.conv_in.merge()
    with pytest.raises(ValueError, match="conv_in: load the pipeline again: an adapter was merged into integer weights"):
        run(pipe, "SD1", STEPS)
    fresh = adapt(made("SD1"), lora)
    for attempt in (
        lambda: qncd.quantize(fresh, prompts=PROMPTS, steps=2, samples=2),
        lambda: qncd.load_quantized(fresh, folder),
    ):
        with pytest.raises(ValueError, match=r"has adapters beside its layers \(style\): unload_lora_weights\(\) and load them"):
            attempt()
    fresh.unload_lora_weights()
    qncd.load_quantized(fresh, folder)
    assert torch.equal(run(fresh, "SD1", STEPS), plain)


def test_a_lora_beside_rotated_layers_with_branches(lora: Path) -> None:
    pipe = made("SD1")
    qncd.quantize(pipe, "W8A8", "linear", rotation=True, rank=4, branch_bits=4.0, prompts=PROMPTS, steps=STEPS, samples=2)
    plain, exact = run(pipe, "SD1", STEPS), run(adapt(made("SD1"), lora), "SD1", STEPS)
    adapt(pipe, lora)
    assert apart(run(pipe, "SD1", STEPS), exact) < max(0.07, 0.5 * apart(exact, run(made("SD1"), "SD1", STEPS)))
    pipe.set_adapters("style", 0.0)
    assert torch.equal(run(pipe, "SD1", STEPS), plain)


def test_dora_beside_a_smoothed_layer(quantized: tuple[Path, torch.Tensor], lora: Path, tmp_path: Path) -> None:
    folder, _ = quantized
    smoothed = next(name for name, layer in quant_layers(again(folder).unet).items() if layer.smoothing is not None)
    state = {name: value for name, value in load_file(lora).items() if name.startswith((f"unet.{smoothed}.", "unet.mid_block"))}
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): value for name, value in state.items() if "lora_B" in name
    }
    state |= {
        name: torch.ones(1, len(value), 1, 1) if value.ndim == 4 else torch.ones(len(value)) for name, value in magnitudes.items()
    }
    save_file(state, tmp_path / "dora.safetensors")
    pipe = adapt(again(folder), tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="DoRA needs the norm of the weight, which is smoothed here"):
        run(pipe, "SD1", STEPS)


def test_a_command_puts_a_lora_beside_a_quantized_folder(
    quantized: tuple[Path, torch.Tensor], lora: Path, tmp_path: Path
) -> None:
    folder, _ = quantized
    common = ("--ckpt", folder, "--prompt", PROMPTS[0], "--n_samples", 1, "--ddim_steps", STEPS, "--device", "cpu", "--lane", 1)
    pixels = {}
    for name, flags in (("plain", ()), ("none", ("--lora", f"{lora}=0")), ("half", ("--lora", f"{lora}=0.5"))):
        run_in_process("txt2img.py", *common, "--outdir", tmp_path / name, *flags)
        pixels[name] = next((tmp_path / name / "images").glob("*.png")).read_bytes()
    assert pixels["none"] == pixels["plain"] != pixels["half"]
    log = run_in_process("txt2img.py", *common, "--outdir", tmp_path / "half", "--lora", lora, status=2)
    assert "lora_weights" in log.splitlines()[-1]
    log = run_in_process("txt2img.py", *common, "--outdir", tmp_path / "x", "--lora", lora, "--backend", "openvino", status=2)
    assert f"--lora {lora}: beside quantized weights, a LoRA runs with --backend torch alone" in log.splitlines()[-1]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A pipeline's folder, an IP-Adapter for it, and an image."""
    folder, pipe = tmp_path_factory.mktemp("ip"), made("SD1")
    pipe.save_pretrained(folder / "model")
    picture(7).save(folder / "guide.png")
    return folder / "model", write_ip_adapter(folder / "ip", pipe.unet), folder / "guide.png"


def with_ip_adapter(adapter: Path, scale: float = 1.0) -> Any:
    pipe = made("SD1")
    pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, local_files_only=True)
    pipe.set_ip_adapter_scale(scale)
    return pipe


def test_an_ip_adapter_on_the_command_line(guided: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, adapter, image = guided
    common: list[Any] = ["--ckpt", folder, "--prompt", PROMPTS[0], "--n_samples", 2, "--ddim_steps", STEPS, "--device", "cpu"]
    common += ["--lane", 2, "--ip_adapter", f"{adapter}=0.6"]
    run_in_process("txt2img.py", *common, "--ip_adapter_image", image, "--outdir", tmp_path / "full")
    call = {"prompt": [PROMPTS[0]] * 2, "num_inference_steps": STEPS, "output_type": "np", "ip_adapter_image": picture(7)}
    pipe = with_ip_adapter(adapter, 0.6)
    expected = pipe(**call, generator=[torch.Generator().manual_seed(seed << 8) for seed in (42, 43)]).images
    found = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "full" / "images").glob("*.png"))])
    assert np.abs(found - (expected * 255).round()).max() <= 1
    ptq = ("--ptq", "--quant_act", "--weight_bit", 8, "--act_bit", 8, "--cali_n", 2, "--cali_st", 2, "--quant_mode", "linear")
    log = run_in_process(
        "txt2img.py", *common, *ptq, "--ip_adapter_image", image, "--cali_ckpt", tmp_path / "q.safetensors", "--outdir",
        tmp_path / "quantized",
    )  # fmt: skip
    assert "4 attention products compute what is not known here and stay in floating point" in log
    assert "attn2 (IPAdapterAttnProcessor2_0)" in log
    quantized = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "quantized" / "images").glob("*.png"))])
    assert 0 < np.abs(quantized.astype(float) - found).mean() < 12
    for flags, message in (
        ((), f"--ip_adapter {adapter}: needs --ip_adapter_image"),
        (("--ip_adapter_image", image, "--argument", "ip_adapter_image=1"), "--argument ip_adapter_image=1: allowed with"),
    ):
        log = run_in_process("txt2img.py", *common, *flags, "--outdir", tmp_path / "x", status=2)
        assert message in log.splitlines()[-1]


@pytest.mark.parametrize(
    ("mode", "width", "options"),
    [
        ("linear", "W8A8", {}),
        pytest.param("qdiff", "W4A8", {"iterations": 10}, marks=pytest.mark.slow),
        pytest.param("qncd", "W8A8", {"correction": True, "interval": 2}, marks=pytest.mark.slow),
        pytest.param("qncd+", "W4A6", {}, marks=pytest.mark.slow),
    ],
)
def test_a_network_with_an_ip_adapter(
    mode: str, width: str, options: dict[str, Any], guided: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Its image embeddings are inputs by name, its attention is called with them as before, and it comes back from a file."""
    _, adapter, _ = guided
    image = {"ip_adapter_image": [[picture(7)]]}
    exact = run(with_ip_adapter(adapter), "SD1", STEPS, **image)
    pipe = with_ip_adapter(adapter)
    report = qncd.quantize(pipe, width, mode, calls=[{"prompt": PROMPTS, **image}] * 2, steps=STEPS, **options)
    assert any("to_k_ip" in layer.name for layer in report.layers)
    assert "added_cond_kwargs.image_embeds.0" in (seen_inputs(pipe.unet) or {})
    found = run(pipe, "SD1", STEPS, **image)
    assert 0 < apart(found, exact) < 0.4
    with pytest.raises(ValueError, match=r"the pipeline has an IP-Adapter, which folders of diffusers do not hold"):
        qncd.save(pipe, tmp_path / "whole")
    qncd.save(pipe.unet, tmp_path / "unet")
    again = with_ip_adapter(adapter)
    qncd.load_quantized(again, tmp_path / "unet")
    assert torch.equal(run(again, "SD1", STEPS, **image), found)


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_an_ip_adapter_on_an_engine(engine: str, guided: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The image embeddings are an input of the exported model."""
    pytest.importorskip(engine)
    image = {"ip_adapter_image": [[picture(7)]]}
    pipe = with_ip_adapter(guided[1])
    qncd.quantize(pipe, "W8A8", "linear", calls=[{"prompt": PROMPTS, **image}], steps=STEPS)
    found = run(pipe, "SD1", STEPS, **image)
    qncd.export(pipe, tmp_path / "exported", engine=engine)
    fast = qncd.open_engine(pipe, tmp_path / "exported", engine)
    assert apart(run(fast, "SD1", STEPS, **image), found) < 0.1
