"""Pipelines of diffusers through the sampling commands: diffusers' own images, quantized, saved, on engines, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_table import HELD, difference, saved
from script_runs import run_in_process
from small_pipelines import KINDS, PROMPTS, made, picture, run, unet, write_lora

import qncd
from qncd.models import configs
from qncd.sampling.pipeline import PipelineSampler

QUICK = {("SD1", "own", 8), ("SD1", "DDIM, trailing", 30), ("SD1", "Euler", 8), ("SDXL turbo", "own", 8), ("LCM", "own", 8)}
QUICK |= {("SD2, v-prediction", "own", 8), ("SD1 inpainting", "own", 8), ("DDPM", "own", 8), ("LDM", "own", 8)}
QUICK |= {("SD3", "own", 8), ("FLUX", "own", 8), ("DiT", "own", 8)}
QUICK |= {("SDXL", "DPM++ 2M", 8), ("SD1 ControlNet", "own", 8), ("LDM, classes", "own", 8), ("SDXL refiner", "own", 8)}


def _marked(cell: tuple[str, str, int]) -> Any:
    return pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow, id="-".join(map(str, cell)))


@pytest.mark.parametrize(("kind", "scheduler", "steps"), map(_marked, HELD))
def test_images_are_those_of_diffusers(kind: str, scheduler: str, steps: int, tmp_path: Path) -> None:
    """A level of 255 at most, where rounding to bytes is undecided."""
    worst, spread = difference(kind, scheduler, steps, tmp_path)
    assert worst <= 1 and spread > 20


@pytest.mark.parametrize(
    "kind",
    ["SD1", "SDXL", "SD2, v-prediction", "LCM", "SD1 img2img", "PixArt sigma", "SD3", "FLUX", "Chroma", "AuraFlow", "Sana",
     "Lumina2", "HunyuanDiT", "Qwen-Image"],
)  # fmt: skip
def test_latents_and_lanes(kind: str) -> None:
    """Latents to 1e-4 of diffusers' own call, alone and among others, in calls of one size."""
    pipe, call = made(kind), {**KINDS[kind].call, "num_inference_steps": 4, "output_type": "latent"}
    expected = pipe(**call, generator=[torch.Generator().manual_seed(seed << 8) for seed in (3, 4)])[0]
    rows = [{name: value[i] for name, value in call.items() if isinstance(value, list)} for i in range(2)]
    constants = {name: value for name, value in call.items() if not isinstance(value, list)}
    sampler = PipelineSampler(pipe, constants, lane=2)
    assert float((sampler.sample((3, 4), conditions=rows) - expected).abs().max()) < 1e-4
    alone = sampler.sample((4,), conditions=rows[1:])
    assert torch.equal(alone[0], sampler.sample((3, 4), conditions=rows)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(kind): a pipeline as diffusers writes it, made once."""
    there: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in there:
            there[kind] = saved(kind, "own", tmp_path_factory.mktemp("pipeline") / "model")
        return there[kind]

    return make


TEXT = ("--prompt", PROMPTS[0], "--n_samples", 2, "--ddim_steps", 3, "--device", "cpu", "--lane", 2)
PTQ = ("--ptq", "--quant_act", "--weight_bit", 8, "--act_bit", 8, "--cali_n", 4, "--cali_st", 3)


def images(out: Path, subfolder: str = "images") -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / subfolder).glob("*.png"))])


@pytest.mark.slow
def test_sdxl_quantized_saved_and_on_engines(folder: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("--ckpt", folder("SDXL"), *TEXT, *PTQ, "--quant_mode", "linear", "--cali_ckpt", tmp_path / "q.safetensors")
    run_in_process("txt2img.py", *common, "--outdir", tmp_path / "a", "--compare_fp")
    run_in_process("txt2img.py", *common, "--outdir", tmp_path / "b", "--resume")
    assert np.array_equal(images(tmp_path / "a"), images(tmp_path / "b"))
    assert not np.array_equal(images(tmp_path / "a"), images(tmp_path / "a", "fp"))
    exact = images(tmp_path / "a", "fp").astype(float)
    torch_error = np.abs(images(tmp_path / "a") - exact).mean()
    for backend in ("openvino", "onnxruntime"):
        pytest.importorskip(backend)
        run_in_process("txt2img.py", *common, "--outdir", tmp_path / backend, "--resume", "--backend", backend)
        # Sums in another order turn single codes of this random network: as near to full precision as torch is.
        assert 0.5 * torch_error < np.abs(images(tmp_path / backend) - exact).mean() < 1.5 * torch_error


@pytest.mark.parametrize("kind", ["Qwen-Image", pytest.param("FLUX", marks=pytest.mark.slow)])
def test_packed_latents_on_an_engine(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The exported network takes tokens, of as many patches as the images have; a file for other ones is refused."""
    pytest.importorskip("openvino")
    common = ["--ckpt", folder(kind), *TEXT, *PTQ, "--quant_mode", "linear", "--cali_ckpt", tmp_path / "q.safetensors"]
    run_in_process("txt2img.py", *common, "--H", 32, "--W", 48, "--outdir", tmp_path / "a")
    run_in_process("txt2img.py", *common, "--H", 32, "--W", 48, "--outdir", tmp_path / "b", "--resume", "--backend", "openvino")
    assert np.abs(images(tmp_path / "a").astype(int) - images(tmp_path / "b")).mean() < 1
    engine = ("--resume", "--backend", "openvino", "--onnx", tmp_path / "b" / "onnx")
    told = run_in_process("txt2img.py", *common, "--H", 32, "--W", 64, "--outdir", tmp_path / "c", *engine, status=2)
    assert re.search(r"model\.onnx: exported for samples \d+x16, this run has \d+x16", told)


@pytest.mark.parametrize(
    ("kind", "mode"), [("LCM", "qncd"), ("SD2, v-prediction", "qncd"), ("SDXL", "qncd"), ("SD1 inpainting", "qncd+")]
)
def test_corrected_pipelines(folder: Callable[[str], Path], tmp_path: Path, kind: str, mode: str) -> None:
    flags: list[Any] = ["--no-recon", "--reverse_interval", 2] if mode == "qncd" else []
    if "image" in KINDS[kind].call:
        for name in ("image", "mask_image"):
            picture(7).save(tmp_path / f"{name}.png")
            flags += [f"--{name}", tmp_path / f"{name}.png"]
        flags += ["--H", 16, "--W", 16]
    out = tmp_path / "out"
    common = (
        "--ckpt",
        folder(kind),
        *TEXT,
        *PTQ,
        "--quant_mode",
        mode,
        "--compare_fp",
        "--cali_ckpt",
        tmp_path / "q.safetensors",
    )
    run_in_process("txt2img.py", *common, *flags, "--outdir", out)
    first = images(out)
    assert np.abs(first.astype(float) - images(out, "fp")).mean() < 12
    run_in_process("txt2img.py", *common, *flags, "--outdir", tmp_path / "again")
    assert np.array_equal(images(tmp_path / "again"), first)


def test_a_run_is_resumed_and_independent_of_the_batch(folder: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("--ckpt", folder("SDXL turbo"), "--prompt", "x", "--ddim_steps", 2, "--scale", 0, "--device", "cpu", "--lane", 2)
    run_in_process("txt2img.py", *common, "--n_samples", 3, "--outdir", tmp_path / "a")
    whole = images(tmp_path / "a")
    sorted((tmp_path / "a" / "images").glob("*.png"))[1].unlink()
    run_in_process("txt2img.py", *common, "--n_samples", 3, "--outdir", tmp_path / "a")
    assert np.array_equal(images(tmp_path / "a"), whole)
    run_in_process("txt2img.py", *common, "--n_samples", 1, "--n_iter", 3, "--outdir", tmp_path / "b")
    assert np.array_equal(images(tmp_path / "b"), whole)
    log = run_in_process("txt2img.py", *common, "--n_samples", 3, "--scheduler", "DDIM", "--outdir", tmp_path / "a", status=2)
    assert "scheduler" in log.splitlines()[-1]


def test_classes_and_pixels(folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "classes"
    run_in_process(
        "sample_diffusion_ldm.py", "-r", folder("LDM, classes"), "-n", 3, "-c", 3, "--classes", "0,4", "--device", "cpu", *PTQ,
        "--quant_mode", "linear", "-l", out,
    )  # fmt: skip
    assert [line.split(",")[1] for line in (out / "labels.csv").read_text().splitlines()] == ["class", "0", "4", "0"]
    run_in_process(
        "sample_diffusion_ddim.py", "--ckpt", folder("DDPM"), "--max_images", 2, "--timesteps", 3, "--device", "cpu", *PTQ,
        "--quant_mode", "ptqd", "-l", tmp_path / "pixels",
    )  # fmt: skip
    assert len(images(tmp_path / "pixels")) == 2


@pytest.mark.parametrize("kind", ["SD1", "SDXL"])
def test_a_negative_prompt(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    run_in_process(
        "txt2img.py", "--ckpt", folder(kind), *TEXT, "--argument", "negative_prompt=blurry", "--outdir", tmp_path / "o"
    )
    call = {"prompt": [PROMPTS[0]] * 2, "negative_prompt": ["blurry"] * 2, "num_inference_steps": 3, "output_type": "np"}
    expected = made(kind)(**call, generator=[torch.Generator().manual_seed(seed << 8) for seed in (42, 43)]).images
    assert np.abs(images(tmp_path / "o") - (expected * 255).round()).max() <= 1
    other = made(kind)(
        **{**call, "negative_prompt": [""] * 2}, generator=[torch.Generator().manual_seed(s << 8) for s in (42, 43)]
    )
    assert np.abs(images(tmp_path / "o") - (other.images * 255).round()).max() > 1


QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_an_adapter_is_merged(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    common = ("--ckpt", folder("SD1"), *TEXT)
    run_in_process("txt2img.py", *common, "--outdir", tmp_path / "plain")
    lora = write_lora(tmp_path / "lora.safetensors", unet(), QUERY, scale=1.0)
    run_in_process("txt2img.py", *common, "--outdir", tmp_path / "merged", "--lora", lora)
    run_in_process("txt2img.py", *common, "--outdir", tmp_path / "nothing", "--lora", f"{lora}=0")
    assert not np.array_equal(images(tmp_path / "merged"), images(tmp_path / "plain"))
    assert np.array_equal(images(tmp_path / "nothing"), images(tmp_path / "plain"))
    pipe = made("SD1")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    call = {"prompt": [PROMPTS[0]] * 2, "num_inference_steps": 3, "output_type": "np"}
    expected = pipe(**call, generator=[torch.Generator().manual_seed(seed << 8) for seed in (42, 43)]).images
    apart = np.abs(images(tmp_path / "merged") - (expected * 255).round())
    assert apart.max() <= 1
    other = write_lora(tmp_path / "other.safetensors", unet(block_out_channels=(16, 48)), QUERY)
    log = run_in_process("txt2img.py", *common, "--outdir", tmp_path / "x", "--lora", other, status=2)
    assert f"--lora {other}: is not a LoRA of this model" in log.splitlines()[-1]


REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("SD1", ("--scheduler", "FlowX"), "scheduler FlowX: with DDIMScheduler in the folder, allowed are DDIM, DDPM"),
    ("SD1", ("--scheduler", "DDIM", "--plms"), "--scheduler DDIM: excludes --plms and --dpm"),
    ("SD2, zero terminal SNR", ("--plms",), "scheduler PNDM: PNDMScheduler has no rescale_betas_zero_snr, and the folder's"),
    ("SDXL", ("--ddim_eta", 0.5), "--ddim_eta 0.5: EulerDiscreteScheduler has no eta"),
    ("SD1", ("--argument", "colour=3"), "--argument colour=3: allowed with StableDiffusionPipeline are"),
    ("SD1", ("--argument", "strength"), "--argument strength: expected NAME=VALUE"),
    ("SD1", ("--argument", "generator=3"), "--argument generator=3: allowed with"),
    ("SD1", ("--image", "gone.png"), "--image gone.png: no such file or folder"),
    ("SD1 inpainting", (), "StableDiffusionInpaintPipeline needs --image"),
    ("SD1 ControlNet", (), "StableDiffusionControlNetPipeline needs --image"),
    ("SD1", ("--C", 4), "--C: the pipeline knows its own"),
    ("SD1", ("--config", "configs/scenes.yaml"), "--config: allowed with original checkpoints"),
    ("SD1", ("--sequence",), "--sequence: allowed with original checkpoints"),
    ("SD1", ("--lora", "gone.safetensors"), "--lora gone.safetensors: no such file"),
    ("SD1", ("--embedding", "gone.safetensors"), "--embedding gone.safetensors: no such file"),
    ("LDM, classes", (), "ClassConditionalLDMPipeline takes no text: scripts/sample_diffusion_ldm.py"),
    ("Kandinsky 2.2", (), "KandinskyV22Pipeline takes no text"),
    ("Wan", (), "WanPipeline makes videos, which no command saves"),
    ("SD3", ("--scheduler", "DDIM"), "scheduler DDIM: with FlowMatchEulerDiscreteScheduler in the folder, allowed are"),
]


@pytest.mark.parametrize(("kind", "flags", "message"), REFUSED, ids=[f"{k}-{m[:40]}" for k, _, m in REFUSED])
def test_what_cannot_be_honoured_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, kind: str, flags: tuple[Any, ...], message: str
) -> None:
    log = run_in_process("txt2img.py", "--ckpt", folder(kind), *TEXT, *flags, "--outdir", tmp_path / "o", status=2)
    line = log.splitlines()[-1]
    assert line.startswith("txt2img.py: error: ") and message in line
    assert not (tmp_path / "o").exists()


def test_other_flags_that_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for script, model, flags, message in (
        ("sample_diffusion_ldm.py", ("-r", folder("LDM")), ("--scale", 2), "--scale 2.0: LDMPipeline takes no guidance_scale"),
        ("sample_diffusion_ldm.py", ("-r", folder("LDM")), ("-v",), "--vanilla_sample: a pipeline samples with its scheduler"),
        (
            "sample_diffusion_ldm.py",
            ("-r", folder("LDM")),
            ("--classes", "1"),
            "is unconditional: allowed without --cond and --cla",
        ),
        ("sample_diffusion_ldm.py", ("-r", folder("SD1")), (), "takes no number of images alone: scripts/txt2img.py samples it"),
        ("sample_diffusion_ldm.py", ("-r", folder("LDM, classes")), ("--classes", "9"), "--classes 9: allowed are 0 to 5"),
        ("sample_diffusion_ddim.py", ("--ckpt", folder("DDPM")), ("--skip_type", "quad"), "--skip_type: a pipeline's scheduler"),
        ("sample_diffusion_ddim.py", ("--ckpt", folder("DDPM")), ("--eta", 1), "--eta 1.0: DDPMPipeline takes no eta"),
        ("sample_diffusion_ddim.py", (), (), "which model? Name its yaml with --config"),
        ("sample_diffusion_ddim.py", ("--config", "configs/fashion_mnist.yml"), ("--lora", "x"), "--lora x: allowed with a diff"),
    ):
        log = run_in_process(script, *model, "-l", tmp_path / "o", *flags, status=2)
        assert message in log.splitlines()[-1], log


def test_a_yaml_names_a_bundled_pipeline(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It recommends steps and guidance; its folder may also be given."""
    monkeypatch.setattr(configs, "ASSETS", folder("SDXL turbo").parent)
    config = tmp_path / "small.yaml"
    target = "diffusers.StableDiffusionXLPipeline"

    def write(**model: str) -> None:
        config.write_text(
            json.dumps({"model": {"target": target, "weights": "model"} | model, "sampling": {"timesteps": 3, "scale": 0}})
        )

    write()
    run_in_process("txt2img.py", "--config", config, *TEXT[:4], *TEXT[6:], "--outdir", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["settings"]["sampler"]["call"] == {"num_inference_steps": 3, "guidance_scale": 0}
    given = ("--ckpt", folder("SDXL turbo"), *TEXT, "--scale", 0)
    run_in_process("txt2img.py", *given, "--outdir", tmp_path / "b")
    assert np.array_equal(images(tmp_path / "a"), images(tmp_path / "b"))
    for changes, flags, message in (
        ({"weights": "other"}, (), "model.weights 'other' is no bundled pipeline: allowed are model"),
        ({"target": "diffusers.FluxPipeline"}, (), "a StableDiffusionXLPipeline, the yaml says FluxPipeline"),
        ({}, ("--use_pretrained",), "--use_pretrained: allowed with original checkpoints"),
    ):
        write(**changes)
        assert message in run_in_process("txt2img.py", "--config", config, *TEXT, *flags, "--outdir", tmp_path / "c", status=2)


def test_a_folder_in_half_precision_is_sampled_in_float32(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """All parts of it: those of transformers would stay in half precision."""
    made("SDXL").to(torch.float16).save_pretrained(tmp_path / "half")
    run_in_process("txt2img.py", "--ckpt", tmp_path / "half", *TEXT, "--outdir", tmp_path / "a")
    run_in_process("txt2img.py", "--ckpt", folder("SDXL"), *TEXT, "--outdir", tmp_path / "b")
    assert 0 < np.abs(images(tmp_path / "a").astype(int) - images(tmp_path / "b")).mean() < 3


def test_a_half_precision_variant_is_found(tmp_path: Path) -> None:
    """Weights that are there as the variant fp16 alone, in several files, as many published folders have them."""
    made("SD1").to(dtype=torch.float16).save_pretrained(tmp_path / "model", variant="fp16", max_shard_size="60KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.fp16-*-of-*.safetensors"))) > 1
    pipe = qncd.load(tmp_path / "model")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert part.dtype == torch.float32
    pipe("a cat", num_inference_steps=1, output_type="latent")


ALL_PARTS = ("LCM", "SD2, zero terminal SNR", "Kandinsky 2.2", "LDM, classes")  # and others through commands and folders
ALL_PARTS += ("FLUX Control", "Chroma")
ALL_PARTS += ("DiT", "PixArt sigma", "SD3", "FLUX", "AuraFlow", "Sana", "Lumina2", "HunyuanDiT", "Qwen-Image", "Z-Image", "Wan")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [pytest.param(kind, "linear", marks=() if kind in ("SDXL", "SD1 ControlNet", "FLUX") else pytest.mark.slow) for kind in KINDS]
    + [pytest.param(kind, "qncd+", marks=() if kind == "LCM" else pytest.mark.slow) for kind in ALL_PARTS],
)
def test_every_kind_is_quantized(kind: str, mode: str, tmp_path: Path) -> None:
    """Calibrated by calling it, near full precision, and the same after a round trip through a file."""
    exact, pipe, again = run(made(kind), kind, 3), made(kind), made(kind)
    report = qncd.quantize(pipe, "W4A6" if mode == "qncd+" else "W8A8", mode, calls=[KINDS[kind].call], steps=3)
    assert len(report.layers) > 20 and len(report.left_out) == ((kind, mode) == ("FLUX Control", "qncd+"))
    quantized = run(pipe, kind, 3)
    assert 0 < float((quantized - exact).norm() / exact.norm()) < 0.6
    qncd.save(pipe, tmp_path)
    qncd.load_quantized(again, tmp_path)
    assert torch.equal(run(again, kind, 3), quantized)


def add_known_error(pipe: Any) -> None:
    """Add a constant to what each channel of the network's prediction is."""
    constant = torch.tensor([0.2, -0.2, 0.1, 0.15])
    if hasattr(pipe, "unet"):
        pipe.unet.conv_out.bias += constant
    else:  # patches of 2x2, of FLUX with the channels outermost; larger, for the estimates of a few tokens are rougher
        last = pipe.transformer.proj_out
        last.bias += 4 * (constant.repeat_interleave(4) if pipe.transformer.config.in_channels == 16 else constant.repeat(4))


@pytest.mark.parametrize(
    "kind",
    [
        "SDXL",
        "FLUX",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("SD2, v-prediction", "SD2, zero terminal SNR", "SD3")),
    ],
)
def test_runtime_correction_takes_out_a_known_error(kind: str) -> None:
    """A constant added to what the network predicts, of velocities and under Euler's levels of noise."""
    prompts = {**KINDS[kind].call, "prompt": PROMPTS * 2, "guidance_scale": 1.0}

    def run(pipe: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed << 8) for seed in range(4)]
        return pipe(**prompts, num_inference_steps=8, output_type="latent", generator=generators).images

    exact, errors = run(made(kind)), {}
    for correction in (False, True):
        pipe = made(kind)
        options = {"interval": 1, "statistics": "channel", "correct_variance": False} if correction else {"correction": False}
        qncd.quantize(pipe, "W8A8", "qncd", calls=[{**prompts, "prompt": PROMPTS * 4}] * 2, steps=8, **options)
        add_known_error(pipe)
        errors[correction] = float((run(pipe) - exact).norm() / exact.norm())
    assert errors[True] < 0.7 * errors[False]


def test_the_pipeline_is_told_in_the_record_of_the_run(folder: Callable[[str], Path], tmp_path: Path) -> None:
    log = run_in_process("txt2img.py", "--ckpt", folder("SD1"), *TEXT, "--scheduler", "euler", "--outdir", tmp_path / "o")
    assert "Loading" not in log  # diffusers' bars
    sampler = json.loads((tmp_path / "o" / "run.json").read_text())["settings"]["sampler"]
    assert (sampler["pipeline"], sampler["scheduler"]) == ("StableDiffusionPipeline", diffusers.EulerDiscreteScheduler.__name__)
    assert sampler["call"] == {"num_inference_steps": 3}
