"""Quantized pipelines in folders of diffusers: bit-identical round trips, in other processes, with what people put on top."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from child_processes import python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import run_in_process
from small_pipelines import KINDS, PROMPTS, made, run

import qncd
from qncd.quant.inspection import quant_layers

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, torch.Tensor]]:
    """folder(kind, mode, width, **options): what `qncd.save` wrote, and the images of what was saved; made once."""
    there: dict[tuple[Any, ...], tuple[Path, torch.Tensor]] = {}

    def make(kind: str, mode: str, width: str, **options: Any) -> tuple[Path, torch.Tensor]:
        key = (kind, mode, width, *options.items())
        if key not in there:
            pipe, path = made(kind), tmp_path_factory.mktemp("saved") / "model"
            options |= {"interval": 2} if mode == "qncd" else {}
            qncd.quantize(pipe, width, mode, calls=[KINDS[kind].call] * 2, steps=STEPS, **options)
            assert qncd.save(pipe, path) == path
            there[key] = path, run(pipe, kind)
        return there[key]

    return make


@pytest.mark.parametrize(
    ("kind", "mode", "width", "options"),
    [
        ("SD1", "linear", "W8A8", {}),
        ("SD1", "qncd", "W8A8", {}),
        ("SD2, v-prediction", "qncd", "W8A8", {}),
        ("DDPM", "ptqd", "W8A8", {}),
        ("LCM", "linear", "W4A32", {}),
        ("PixArt alpha", "svdquant", "W4A4", {}),
        ("FLUX", "hadamard", "W4A4", {}),
        ("SD1", "qncd+", "W4A8", {"weight_granularity": "group32", "act_granularity": "token"}),
        ("PixArt alpha", "linear", "FP8", {"act_granularity": "token"}),
        ("SD1", "modiff", "W4A4", {"reconstruction": False}),
        ("SD3", "qncd+", "W4A4", {"temporal_differences": True, "attention_bits": 8, "rotation": True}),
        ("Z-Image", "modiff", "W4A4", {"reconstruction": False}),
        ("Qwen-Image", "modiff", "W4A4", {"reconstruction": False}),
        ("PixArt alpha", "linear", "W4A16", {"weight_granularity": "group16"}),
        pytest.param("SDXL", "qncd+", "W4A6", {}, marks=pytest.mark.slow),
    ],
)
def test_round_trips(kind: str, mode: str, width: str, options: dict[str, Any], folder: Any, tmp_path: Path) -> None:
    path, images = folder(kind, mode, width, **options)
    again = diffusers.DiffusionPipeline.from_pretrained(path)
    assert torch.equal(run(again, kind), images)
    assert torch.equal(run(again, kind), images)  # nothing of the first run is left
    qncd.save(again, tmp_path / "twice")
    assert torch.equal(run(qncd.load(tmp_path / "twice"), kind), images)
    fresh = made(kind)
    qncd.load_quantized(fresh, path)
    assert torch.equal(run(fresh, kind), images)


def test_codes_alone_are_kept(folder: Any, tmp_path: Path) -> None:
    """From loading on, or while quantizing, or when asked for: the same images and the same files, in less memory."""
    path, images = folder("SD1", "qncd+", "W4A8")
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    packed = kept_bytes(pipe.unet)
    assert all(layer.packed for layer in quant_layers(pipe.unet).values())
    qncd.unpack_weights(pipe)
    assert not any(layer.packed for layer in quant_layers(pipe.unet).values())
    assert packed < 0.25 * kept_bytes(pipe.unet)
    assert torch.equal(run(pipe, "SD1"), images)
    qncd.pack_weights(pipe)
    assert kept_bytes(pipe.unet) == packed
    assert torch.equal(run(pipe, "SD1"), images)
    at_once = made("SD1")
    qncd.quantize(at_once, "W4A8", "qncd+", calls=[KINDS["SD1"].call] * 2, steps=STEPS, packed=True)
    assert kept_bytes(at_once.unet) == packed
    assert torch.equal(run(at_once, "SD1"), images)
    expected = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
    for name, model in {"unet": pipe.unet, "at_once": at_once.unet}.items():
        qncd.save(model, tmp_path / name)
        written = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    qncd.export(pipe, tmp_path / "onnx")
    engines = [qncd.open_engine(pipe, tmp_path / "onnx")]
    qncd.unpack_weights(pipe)
    engines.append(qncd.open_engine(pipe, tmp_path / "onnx"))
    found = [run(engine, "SD1") for engine in engines]
    assert torch.equal(*found) and float((found[0] - images).norm() / images.norm()) < 0.05
    with pytest.raises(ValueError, match="UNet2DConditionModel: has no quantized layer"):
        qncd.pack_weights(made("SD1"))


def kept_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def test_what_lies_in_the_folder(folder: Any) -> None:
    path, _ = folder("SD1", "qncd", "W8A8")
    config = json.loads((path / "unet" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qncd"
    assert config["quantization_config"]["recipe"]["quant"]["weight_bits"] == 8
    assert json.loads((path / "model_index.json").read_text())["scheduler"] == ["qncd.corrected", "CorrectedScheduler"]
    with safe_open(path / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        codes = [file.get_tensor(name) for name in file.keys() if name.endswith(".weight_codes")]  # noqa: SIM118
    assert len(codes) > 30 and all(value.dtype == torch.int8 for value in codes)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_parts(variant: str | None, folder: Any, tmp_path: Path) -> None:
    """As diffusers writes a network of more than 10 GB."""
    path, images = folder("SD1", "qncd", "W8A8")
    parts = tmp_path / "parts"
    shutil.copytree(path, parts)
    (parts / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet = diffusers.DiffusionPipeline.from_pretrained(path).unet
    unet.save_pretrained(parts / "unet", max_shard_size="50KB", variant=variant)
    files = sorted((parts / "unet").glob("*.safetensors"))
    assert len(files) > 2
    assert torch.equal(run(diffusers.DiffusionPipeline.from_pretrained(parts, variant=variant), "SD1"), images)
    assert torch.equal(run(qncd.load(parts), "SD1"), images)
    if variant is None:
        fresh = made("SD1")
        qncd.load_quantized(fresh, parts)
        assert torch.equal(run(fresh, "SD1"), images)
    tensors = load_file(files[1])
    save_file(tensors, files[1], {"format": "qncd-1"})
    with pytest.raises(ValueError, match="its parts are of different checkpoints"):
        qncd.load(parts)
    files[1].unlink()
    with pytest.raises(ValueError, match=re.escape(files[1].name)):
        qncd.load(parts)


@pytest.mark.parametrize("order", ["import qncd, diffusers", "import diffusers; diffusers.DiffusionPipeline; import qncd"])
def test_another_process_that_imports_qncd(order: str, folder: Any, tmp_path: Path) -> None:
    path, images = folder("SD1", "qncd", "W8A8")
    code = f"""
{order}
import sys, torch
pipe = diffusers.DiffusionPipeline.from_pretrained({str(path)!r})
generators = [torch.Generator().manual_seed(seed << 8) for seed in (3, 4)]
out = pipe({PROMPTS!r}, num_inference_steps={STEPS}, generator=generators, output_type="latent").images
torch.save(out, {str(tmp_path / "out.pt")!r})
"""
    python(code)
    assert torch.equal(torch.load(tmp_path / "out.pt").float(), images)


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, qncd; assert not {'torch', 'diffusers'} & set(sys.modules); import qncd.corrected"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_people_put_on_top(folder: Any) -> None:
    path, images = folder("SD1", "qncd", "W8A8")

    def load(**options: Any) -> Any:
        return diffusers.DiffusionPipeline.from_pretrained(path, **options)

    pipe = load()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(pipe, "SD1"), images)
    pipe = load()
    pipe.unet.to(memory_format=torch.channels_last)
    assert float((run(pipe, "SD1") - images).norm() / images.norm()) < 0.05
    assert float((run(load(dtype=torch.bfloat16), "SD1") - images).norm() / images.norm()) < 0.2
    with pytest.raises(ValueError, match="Casting a quantized model to a new `dtype` is unsupported"):
        load().to(torch.float16)
    pipe = load()
    pipe.enable_attention_slicing()
    with pytest.raises(ValueError, match="quantized attention was replaced by a SlicedAttnProcessor"):
        run(pipe, "SD1")
    pipe = load()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="the pipeline's scheduler does not apply it"):
        run(pipe, "SD1", 12)
    with pytest.raises(ValueError, match="the correction was fitted for 4 steps"):
        run(load(), "SD1", 5)
    with pytest.raises(ValueError, match="has no weights in floating point"):
        load().unet.dequantize()


@pytest.mark.slow
def test_compiled(folder: Any) -> None:
    path, images = folder("SD1", "linear", "W8A8")
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    assert torch.allclose(run(pipe, "SD1"), images, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"weight_bits": 4}, 0.35),
        ({"weight_bits": 4, "weight_granularity": "group32"}, 0.35),
        ({"weight_format": "fp8", "act_bits": 8, "act_format": "fp8", "act_granularity": "token"}, 0.5),
    ],
    ids=["W4", "W4, groups", "FP8, tokens"],
)
def test_what_needs_no_calibration_is_quantized_while_loading(settings: dict[str, Any], size: float, tmp_path: Path) -> None:
    made("SD1").save_pretrained(tmp_path / "float")
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": qncd.QNCDConfig(**settings)})
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=mapping)
    images, exact = run(pipe, "SD1"), run(made("SD1"), "SD1")
    assert 0 < float((images - exact).norm() / exact.norm()) < 0.2
    pipe.save_pretrained(tmp_path / "quantized")
    assert torch.equal(run(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "quantized"), "SD1"), images)
    sizes = [(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for name in ("float", "quantized")]
    assert sizes[1] < size * sizes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 9}, r"QNCDConfig: weight_bits 9: allowed are whole numbers, 2 to 8"),
        ({"act_bits": 8}, r"QNCDConfig: act_bits needs an act_granularity such as token: .* need qncd\.quantize"),
        ({"gptq": True}, r"QNCDConfig: gptq: allowed are weight_bits, .*; what needs calibration is for qncd\.quantize"),
        ({"weight_granularity": "group7"}, r"QNCDConfig: weight_granularity 'group7': allowed are channel, group16, "),
    ],
)
def test_what_a_config_cannot_ask_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qncd.QNCDConfig(**settings)


def test_damaged_and_foreign_folders(folder: Any, tmp_path: Path) -> None:
    path, _ = folder("SD1", "linear", "W8A8")
    with pytest.raises(ValueError, match=r"made from a base model with weights \w+"):
        qncd.load_quantized(made("SD1", seed=1), path)
    with pytest.raises(FileNotFoundError, match="no such quantized checkpoint"):
        qncd.load_quantized(made("SD1"), tmp_path)
    with pytest.raises(ValueError, match="not quantized by"):
        qncd.save(made("SD1"), tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("not to be lost")
    with pytest.raises(ValueError, match="mine: not empty"):
        qncd.save(diffusers.DiffusionPipeline.from_pretrained(path), tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").exists()
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "quantized.safetensors").write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole quantized checkpoint"):
        qncd.load_quantized(made("SD1"), tmp_path / "cut")


def test_another_scheduler_is_refused(folder: Any) -> None:
    """Put in the place of a folder's own, or in the pipeline that a folder is loaded into, if a correction needs it."""
    path, _ = folder("SD1", "qncd", "W8A8")
    for kind in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe = diffusers.DiffusionPipeline.from_pretrained(path)
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        for steps in (2, STEPS):
            with pytest.raises(ValueError, match="the pipeline's scheduler does not apply it: load the pipeline with the folder"):
                run(pipe, "SD1", steps)
        other = made("SD1")
        own = type(other.scheduler).__name__
        other.scheduler = kind.from_config(other.scheduler.config)
        with pytest.raises(ValueError, match=rf"was fitted with another scheduler \(class {own}, not {kind.__name__}"):
            qncd.load_quantized(other, path)
        assert type(other.unet.conv_in) is torch.nn.Conv2d


def test_a_command_samples_a_quantized_folder(folder: Any, tmp_path: Path) -> None:
    path, _ = folder("SD1", "qncd", "W8A8")
    common = ("--ckpt", path, "--prompt", "x", "--n_samples", 2, "--device", "cpu", "--lane", 2, "--outdir", tmp_path / "o")
    run_in_process("txt2img.py", *common, "--ddim_steps", STEPS)
    assert len(list((tmp_path / "o" / "images").glob("*.png"))) == 2
    settings = json.loads((tmp_path / "o" / "run.json").read_text())["settings"]
    assert (settings["quantization"]["mode"], settings["quantization"]["weight_bits"]) == ("qncd", 8)
    run_in_process("txt2img.py", *common, "--ddim_steps", STEPS, "--backend", "onnxruntime", "--outdir", tmp_path / "e")
    torch_images, engine_images = (
        [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / name / "images").glob("*.png"))] for name in "oe"
    )
    assert max(np.abs(a - b).mean() for a, b in zip(torch_images, engine_images, strict=True)) < 3
    log = run_in_process("txt2img.py", *common, "--ddim_steps", 5, "--outdir", tmp_path / "p", status=2)
    assert "the correction was fitted for 4 steps" in log.splitlines()[-1]
    log = run_in_process("txt2img.py", *common, "--ddim_steps", STEPS, "--ptq", "--outdir", tmp_path / "q", status=2)
    assert "is quantized already" in log.splitlines()[-1]
    log = run_in_process("txt2img.py", *common, "--scheduler", "EulerDiscrete", "--outdir", tmp_path / "r", status=2)
    assert "has a noise correction, which acts with its own " in log.splitlines()[-1]


def test_projections_fused_afterwards_are_refused() -> None:
    """They would run in floating point, without their quantizers, where diffusers' processor looks for them."""
    pipe = made("FLUX")
    qncd.quantize(pipe, "W8A8", mode="linear", calls=[KINDS["FLUX"].call], steps=2, samples=2)
    run(pipe, "FLUX")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"^transformer_blocks\.0\.attn: its quantized projections were fused or taken apart"):
        run(pipe, "FLUX")
