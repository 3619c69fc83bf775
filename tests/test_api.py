"""The Python API on a small StableDiffusionPipeline and on bare denoisers; tests/test_public_api.py has a bundled model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from small_pipelines import KINDS, image_unet, made
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

import qncd
from qncd.models.original.conditioning import build_text_model, clip_tokenizer
from qncd.ptq.pipeline_calls import merged, rows_of_call
from qncd.quant.inspection import quant_layers
from qncd.recipe import MODES, Recipe

PROMPTS = ["a large red circle above a small blue square", "a small green square left of a large blue circle"]
FEW = {"prompts": PROMPTS, "steps": 4, "samples": 4}
RECONSTRUCTED = ("qdiff", "ptqd", "tfmq", "d2dpm")


def small_pipeline(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """Random weights, latents of 8x8."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
    }  # fmt: skip
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    network = UNet2DConditionModel(**{**settings, **unet})
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    pipe = StableDiffusionPipeline(
        vae,
        build_text_model(text),
        clip_tokenizer(),
        network,
        scheduler,
        None,
        None,
        requires_safety_checker=False,  # type: ignore[arg-type]
    )
    for name in ("vae", "unet", "text_encoder"):
        getattr(pipe, name).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, steps: int = 4, **arguments: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    out: Tensor = pipe(PROMPTS, num_inference_steps=steps, generator=generators, output_type="latent", **arguments).images
    return out


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return small_pipeline()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (torch.compile, r"OptimizedModule wraps a network: quantize the network itself, and wrap or compile it afterwards"),
        (torch.nn.DataParallel, "DataParallel wraps a network"),
        (lambda unet: unet.to("meta"), r"UNet2DConditionModel: conv_in\.weight is on the meta device, without values"),
        (lambda unet: weight_norm(unet.conv_in) and unet, "conv_in has a parametrized weight: remove_parametrizations first"),
        (lambda unet: unet.fuse_qkv_projections() or unet, "attention with fused projections is not supported; unfuse it first"),
        (lambda unet: unet.mid_block.half() and unet, r"mid_block\..*: (mixed dtype|.* same dtype|expected)"),
    ],
)
def test_what_cannot_be_quantized_is_named(spoil: Any, message: str) -> None:
    pipe = small_pipeline()
    object.__setattr__(pipe, "unet", spoil(pipe.unet))
    with pytest.raises(ValueError, match=message) as caught:
        qncd.quantize(pipe, "W8A8", "linear", prompts=["x"], samples=2, steps=2)
    assert "\n" not in str(caught.value)


def test_what_a_recipe_leaves_open_is_decided() -> None:
    """Inputs at a time, and as many calibration time steps as the sampler has."""
    open_recipe = Recipe.of("linear", **{"calibration.batch_size": None, "calibration.steps": None})
    report = qncd.quantize(small_pipeline(), recipe=open_recipe, prompts=["x"], steps=2)
    assert (report.recipe.calibration.batch_size, report.recipe.calibration.steps) == (8, 10)
    assert report.inputs == 2 * 2 * open_recipe.calibration.samples  # with and without the text


def test_a_network_in_training_mode_is_calibrated_for_use() -> None:
    pipe = small_pipeline()
    pipe.unet.train()
    qncd.quantize(pipe, "W8A8", "linear", prompts=["x"], samples=2, steps=2)
    dropouts = [part for part in pipe.unet.modules() if isinstance(part, torch.nn.Dropout)]
    assert dropouts and not any(part.training for part in (pipe.unet, *dropouts))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_a_pipeline(mode: str, base: Any, tmp_path: Path) -> None:
    pipe = copy.deepcopy(base)
    options = {"reconstruction": True, "iterations": 2, "inputs": 8} if mode in RECONSTRUCTED else {}
    width = "W4A6" if mode == "qncd+" else "W8A8"
    report = qncd.quantize(pipe, width, mode, **FEW, **options)
    assert len(report.layers) == len(quant_layers(pipe.unet)) > 30 and not report.left_out
    assert report.inputs == 4 * 4 * 2  # samples, steps, halves of guidance
    exact, images = latents(base), latents(pipe)
    assert 0 < distance(images, exact) < (0.5 if mode == "qncd+" else 0.2)
    qncd.save(pipe, tmp_path)
    again = copy.deepcopy(base)
    assert qncd.load_quantized(again, tmp_path) == report.recipe
    assert torch.equal(latents(again), images)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("qncd+", {"smoothing": True}),
        ("tfmq", {"reconstruction": True, "iterations": 2, "inputs": 8}),
        ("qncd", {"reconstruction": False, "interval": 2}),
    ],
    ids=["GPTQ, mixed precision, tracking", "BRECQ, a range for each step", "runtime correction"],
)
def test_rotations_and_branches_with_the_rest(mode: str, options: dict[str, Any], base: Any, tmp_path: Path) -> None:
    pipe = copy.deepcopy(base)
    report = qncd.quantize(pipe, "W4A6", mode, rotation=True, rank=4, branch_bits=4.0, **options, **FEW)
    layers = quant_layers(pipe.unet).values()
    assert sum(layer.rotation is not None and layer.up is not None for layer in layers) > 25
    assert report.bits.weight_bits > 5
    images = latents(pipe)
    assert 0 < distance(images, latents(base)) < 0.5
    qncd.save(pipe, tmp_path)
    again = copy.deepcopy(base)
    assert qncd.load_quantized(again, tmp_path) == report.recipe
    assert torch.equal(latents(again), images)


def test_modes_smooth_unets_alone(base: Any, tmp_path: Path) -> None:
    """On transformers smoothing by AdaLN is done where it is asked for by name, and so it stands in the recipe."""
    few = {"calls": [KINDS["DiT"].call] * 2, "steps": 2, "samples": 2, "reconstruction": False, "tracking": False}
    for options, smoothed in (({}, False), ({"smoothing": True}, True), ({"strength": 0.5}, True)):
        pipe = made("DiT")
        report = qncd.quantize(pipe, "W8A8", "qncd", **few, **options)
        factors = [layer.smoothing is not None for layer in quant_layers(pipe.transformer).values()]
        assert any(factors) == smoothed == (report.recipe.smoothing is not None)
        folder = tmp_path / "_".join(("saved", *options))
        qncd.save(pipe, folder)
        assert qncd.load_quantized(made("DiT"), folder) == report.recipe
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "qncd", reconstruction=False, **FEW)
    assert any(layer.smoothing is not None for layer in quant_layers(pipe.unet).values())


def test_a_correction_acts_through_the_scheduler(base: Any) -> None:
    corrected, plain = copy.deepcopy(base), copy.deepcopy(base)
    qncd.quantize(corrected, "W4A8", "qncd+", **FEW)
    qncd.quantize(plain, "W4A8", "qncd+", tracking=False, **FEW)
    # On the very runs that the filters were fitted to: the same seeds and prompts as in calibration.
    record = corrected.unet._qncd.record
    assert record.kernels.shape[0] == 4 and bool((record.left <= 1).all())
    del corrected.scheduler.step  # without the correction the pipelines are the same
    corrected.unet._forward_pre_hooks.clear()
    from qncd.ptq.stages.prepare import watch_
    from qncd.quant.stepwise import select_steps_on_call

    network = qncd.network_of(corrected.unet)
    watch_(network)
    select_steps_on_call(corrected.unet, network.times_of)
    assert torch.equal(latents(corrected), latents(plain))


def test_another_number_of_steps_is_refused(base: Any) -> None:
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "ptqd", **FEW)
    with pytest.raises(ValueError, match="fitted for 4 steps"):
        latents(pipe, steps=5)
    assert bool(torch.isfinite(latents(pipe)).all())


def test_a_replaced_scheduler_or_processor_is_noticed(base: Any) -> None:
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "ptqd", **FEW)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler was replaced by a DPMSolverMultistepScheduler"):
        latents(pipe)
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "linear", **FEW)
    pipe.enable_attention_slicing()
    with pytest.raises(ValueError, match="quantized attention was replaced"):
        latents(pipe)


def test_the_control_of_runtime_correction(base: Any) -> None:
    """With full precision in the quantized network's place, corrected runs are nearly those without correction."""
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "qncd", interval=2, **FEW)
    exact, images = latents(base), latents(pipe)
    assert distance(images, exact) < 0.1


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers(base: Any, scheduler: Any) -> None:
    pipe = copy.deepcopy(base)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    exact = latents(pipe)
    qncd.quantize(pipe, "W8A8", "qncd+", **FEW)
    assert 0 < distance(latents(pipe), exact) < 0.2


def test_calls_instead_of_prompts(make_unet: Any) -> None:
    pipe = DDIMPipeline(make_unet(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    report = qncd.quantize(pipe, "W8A8", "qncd+", calls=[{"batch_size": 2, "eta": 0.0}, {"batch_size": 3, "eta": 0.0}], steps=3)
    assert report.recipe.calibration.samples == 5 and report.inputs == 5 * 3
    with pytest.raises(ValueError, match="takes no colour"):
        qncd.quantize(DDIMPipeline(make_unet(), DDIMScheduler()), "W8A8", "linear", calls=[{"colour": 1}])
    with pytest.raises(ValueError, match="takes no prompts"):
        qncd.quantize(DDIMPipeline(make_unet(), DDIMScheduler()), "W8A8", "linear", prompts=PROMPTS)


def calibration(unet: Any, count: int = 8) -> qncd.CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    shape = (count, unet.config.in_channels, 8, 8)
    given = (
        {"encoder_hidden_states": torch.randn(count, 5, 12, generator=generator)} if "cross_attention_dim" in unet.config else {}
    )
    return qncd.CalibrationSet(torch.randn(shape, generator=generator), torch.arange(count) * 120, given)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_a_bare_denoiser(mode: str, make_cross_unet: Any, caplog: pytest.LogCaptureFixture) -> None:
    unet = make_cross_unet()
    data = calibration(unet)
    exact = unet(data.x, data.t, data.inputs["encoder_hidden_states"]).sample
    options = {"reconstruction": True, "iterations": 2, "inputs": 8} if mode in RECONSTRUCTED else {}
    report = qncd.quantize(unet, "W8A8", mode, calibration=data, **options)
    found = unet(data.x, data.t, data.inputs["encoder_hidden_states"]).sample
    assert 0 < distance(found, exact) < 0.1
    corrects = mode in ("ptqd", "d2dpm", "qncd", "qncd+")
    assert bool(report.left_out) == corrects and ("scheduler=" in caplog.text) == corrects
    with_sampler = make_cross_unet()
    report = qncd.quantize(with_sampler, "W8A8", mode, calibration=data, scheduler=DDIMScheduler(), steps=4, **options)
    assert not report.left_out
    record = with_sampler._qncd.record
    assert (record is not None) == corrects


def test_settings_have_an_effect(make_unet: Any) -> None:
    """Every switch changes the result, or is refused."""
    switches: dict[str, dict[str, Any]] = {
        "plain": {},
        "gptq": {"gptq": True, "bias_correction": True},
        "bias": {"bias_correction": True},
        "split": {"split": True},
        "reconstruction": {"reconstruction": True, "iterations": 20},
    }
    results = {}
    for name, options in switches.items():
        unet = make_unet()
        data = calibration(unet, 16)
        qncd.quantize(unet, "W4A8", "linear", calibration=data, **options)
        results[name] = unet(data.x, data.t).sample
    names = list(results)
    assert not any(torch.equal(results[a], results[b]) for i, a in enumerate(names) for b in names[i + 1 :])
    unet = make_unet()
    refused = {
        "tracking": True, "bit_allocation": True, "no_such_option": 1, "gtpq": True, "prompts": PROMPTS, "steps": 3,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ValueError, match=name.split("_")[0]):
            qncd.quantize(unet, "W8A6", "linear", calibration=calibration(unet), **{name: value})  # type: ignore[arg-type]
    assert not quant_layers(unet)


@pytest.fixture(scope="module")
def exported(base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A quantized pipeline, which tests leave as it is, and the folder with its exported network."""
    pipe, folder = copy.deepcopy(base), tmp_path_factory.mktemp("exported")
    qncd.quantize(pipe, "W8A8", "qncd+", **FEW)
    qncd.export(pipe, folder)
    return pipe, folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_in_a_pipeline(engine: str, base: Any, exported: tuple[Any, Path]) -> None:
    pytest.importorskip(engine)
    pipe, folder = exported
    fast = qncd.open_engine(pipe, folder, engine)
    expected = latents(pipe)
    assert distance(latents(fast), expected) < 0.9 * distance(expected, latents(base))
    assert fast.unet is not pipe.unet and pipe.unet is not base.unet


def test_half_precision(base: Any) -> None:
    pipe = copy.deepcopy(base)
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    exact = latents(pipe).float()
    qncd.quantize(pipe, "W8A8", "linear", **FEW)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert distance(latents(pipe).float(), exact) < 0.2


def test_pipelines_that_calls_and_steps_do_not_describe_are_refused() -> None:
    """A scheduler without steps, a second denoiser, guidance that replaces attention at each call."""
    no_steps = diffusers.ScoreSdeVePipeline(image_unet(), diffusers.ScoreSdeVeScheduler())
    two = made("Wan")
    two.transformer_2 = two.transformer
    parts = made("SD1").components
    pag = diffusers.StableDiffusionPAGPipeline(**{**parts, "requires_safety_checker": False}, pag_applied_layers=["mid"])
    other_step = made("SD1")
    other_step.scheduler = diffusers.CogVideoXDPMScheduler()
    for pipe, message in (
        (other_step, r"CogVideoXDPMScheduler\.step takes model_output, old_pred_original_sample, timestep: allowed is model_out"),
        (no_steps, r"^ScoreSdeVePipeline: its ScoreSdeVeScheduler has no step"),
        (two, r"^WanPipeline: has two denoisers, transformer and transformer_2"),
        (pag, r"^StableDiffusionPAGPipeline: its guidance replaces attention"),
    ):
        with pytest.raises(ValueError, match=message):
            qncd.quantize(pipe, "W8A8", mode="linear", calls=[{}], steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": PROMPTS, "steps": 0}, "steps 0: allowed are whole numbers, 1 or more"),
        ({"prompts": PROMPTS, "steps": "2"}, "steps '2': allowed are whole numbers, 1 or more"),
        ({"prompts": 3}, "prompts: expected a sequence of texts, one or more"),
        ({"calls": {"prompt": PROMPTS}}, "calls: expected a sequence of mappings, one or more"),
        ({"calls": []}, "calls: expected a sequence of mappings, one or more"),
        (
            {"calls": [{"prompt": PROMPTS, "num_inference_steps": 3}], "steps": 2},
            "steps 2: a call says num_inference_steps 3; give one of the two",
        ),
    ],
)
def test_odd_arguments(arguments: dict[str, Any], message: str, base: Any) -> None:
    with pytest.raises(ValueError, match=message):
        qncd.quantize(base, "W8A8", mode="linear", **arguments)


def test_prompts_may_come_one_at_a_time(base: Any) -> None:
    report = qncd.quantize(copy.deepcopy(base), "W8A8", mode="linear", prompts=iter(PROMPTS), samples=2, steps=2)
    assert report.inputs == 8  # guided, at both steps


def test_a_network_is_quantized_once_and_with_its_hooks_off(base: Any) -> None:
    pipe = copy.deepcopy(base)
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel: conv_in has a hook .* remove it first"):
        qncd.quantize(pipe, "W8A8", mode="linear", **FEW)
    handle.remove()
    qncd.quantize(pipe, "W8A8", mode="linear", **FEW)
    with pytest.raises(ValueError, match="UNet2DConditionModel is quantized already: load the full-precision model again"):
        qncd.quantize(pipe, "W8A8", mode="linear", **FEW)


def test_another_guidance_is_told(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Than the one that the correction was fitted with; the same is not."""
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "qncd+", **FEW)
    caplog.clear()
    latents(pipe)
    assert not caplog.records
    latents(pipe, guidance_scale=3.0)
    assert caplog.records[-1].getMessage().startswith("guidance 3: the noise correction was fitted with 7.5, so it is less sure")


def test_noise_that_a_scheduler_adds_is_told(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe = copy.deepcopy(base)
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    qncd.quantize(pipe, "W8A8", "ptqd", **FEW)
    caplog.clear()
    latents(pipe)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("DDPMScheduler adds noise of its own at each step: the part of the corr")]


def test_a_run_that_was_broken_off_leaves_nothing(base: Any) -> None:
    """The calls of its last step do not count as those of the next run's first, where a correction repeats them."""
    pipe = copy.deepcopy(base)
    qncd.quantize(pipe, "W8A8", "linear", correction=True, interval=1, **FEW)
    expected = latents(pipe)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    own = pipe.scheduler.scale_model_input
    for when in (2, 3):
        calls: list[int] = []
        pipe.scheduler.scale_model_input = lambda *given, calls=calls, when=when: (
            stop() if len(calls) > when else calls.append(0) or own(*given)
        )
        with pytest.raises(KeyboardInterrupt):
            latents(pipe)
        pipe.scheduler.scale_model_input = own
        assert torch.equal(latents(pipe), expected)


def test_what_calls_hold_for_each_image() -> None:
    """Embeddings in the place of texts, as pipelines take them, with what belongs to them."""
    pipe = made("SDXL")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    call = dict(zip(names, pipe.encode_prompt(PROMPTS, device="cpu"), strict=True))
    assert rows_of_call(call) == 2
    joined = merged([call, call], 5)
    assert all(torch.equal(joined[name], torch.cat([call[name]] * 3)[:5]) for name in names)
    texts = merged([{"prompt": "a", "negative_prompt": "x"}, {"prompt": "b", "negative_prompt": "y"}], 3)
    assert texts == {"prompt": ["a", "b", "a"], "negative_prompt": ["x", "y", "x"]}
    assert merged([{"prompt": ["a"], "negative_prompt": "x"}] * 2, 2) == {"prompt": ["a", "a"], "negative_prompt": "x"}
    with pytest.raises(ValueError, match=r"prompt_embeds: of shapes \[\(2, 4\), \(3, 4\)\], allowed is one"):
        merged([{"prompt_embeds": torch.zeros(1, length, 4)} for length in (2, 3)], 2)
    assert qncd.quantize(pipe, "W8A8", "qncd+", calls=[call, call], steps=2).inputs == 16


def test_what_cannot_go_back_through_the_sampler_is_left_out_by_name() -> None:
    pipe = made("FLUX Control")
    report = qncd.quantize(pipe, "W4A6", "qncd+", calls=[KINDS["FLUX Control"].call], steps=2)
    assert len(report.left_out) == 1 and report.left_out[0].startswith("bit allocation (qncd+): goes back through the sampler's")
    assert not report.recipe.quant.bit_allocation
    with pytest.raises(ValueError, match="bit_allocation goes back through the sampler's steps, which is done for samples"):
        qncd.quantize(made("FLUX Control"), "W4A6", "qncd+", calls=[KINDS["FLUX Control"].call], steps=2, bit_allocation=True)
