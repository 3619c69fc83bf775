"""Every kind of pipeline with every scheduler: the sampling commands' images against diffusers' own call from the same noise.

    python tests/pipeline_table.py

prints the table of docs/pipelines.md. tests/app/test_pipelines.py goes through `HELD` of its cells.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from script_runs import run_in_process
from small_pipelines import COUNT, KINDS, PROMPTS, made

SEEDS = (3, 4)
STEPS = (8, 20, 30)  # 30 does not divide 1000
SCHEDULERS: dict[str, Any] = {
    "own": None,
    "DDIM": lambda own: diffusers.DDIMScheduler.from_config(own),
    "DDIM, trailing": lambda own: diffusers.DDIMScheduler.from_config(own, timestep_spacing="trailing"),
    "DDIM, clipped": lambda own: diffusers.DDIMScheduler.from_config(own, clip_sample=True, clip_sample_range=2.0),
    "DDIM, thresholding": lambda own: diffusers.DDIMScheduler.from_config(own, thresholding=True, sample_max_value=2.0),
    "DDIM, zero SNR": lambda own: diffusers.DDIMScheduler.from_config(
        own, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "DDIM, to alpha 1": lambda own: diffusers.DDIMScheduler.from_config(own, set_alpha_to_one=True, steps_offset=0),
    "PNDM": lambda own: diffusers.PNDMScheduler.from_config(own, skip_prk_steps=True),
    "Euler": lambda own: diffusers.EulerDiscreteScheduler.from_config(own),
    "Euler ancestral": lambda own: diffusers.EulerAncestralDiscreteScheduler.from_config(own),
    "DPM++ 2M": lambda own: diffusers.DPMSolverMultistepScheduler.from_config(own),
    "LCM": lambda own: diffusers.LCMScheduler.from_config(own),
    "DDPM": lambda own: diffusers.DDPMScheduler.from_config(own),
}
ARGUMENTS = (
    "strength", "guidance_rescale", "max_sequence_length", "use_resolution_binning", "clean_caption", "cfg_normalization",
    "complex_human_instruction",
)  # fmt: skip
# Kinds of rectified flow, which the schedulers above do not sample.
FLOW = ("SD3", "FLUX", "FLUX Control", "Chroma", "AuraFlow", "Sana", "Lumina2", "Qwen-Image", "Z-Image")
BY_TEXT = tuple(name for name, kind in KINDS.items() if "prompt" in kind.call)
# One pipeline with every scheduler and number of steps; every other one with its own and with two more.
CELLS = [("SD1", scheduler, steps) for scheduler in SCHEDULERS for steps in STEPS]
CELLS += [
    (kind, scheduler, 8)
    for kind in KINDS
    if kind not in ("SD1", "Kandinsky 2.2", "DeepFloyd IF", "Wan")
    for scheduler in ("own", "Euler", "DPM++ 2M")
    if scheduler == "own" or kind not in ("LDM", "DDPM", "DDIM", "LCM", *FLOW)
]
# 20 steps divide 1000 as 8 do; what scheduler a pipeline is called with is no matter of its kind, but for Euler's scaled inputs.
HELD = [cell for cell in CELLS if cell[1:] != ("DPM++ 2M", 8) or cell[0] in ("SD1", "SDXL") if cell[2] != 20]


def with_scheduler(pipe: Any, name: str) -> Any:
    make = SCHEDULERS[name]
    if make is not None:
        pipe.scheduler = make(dict(pipe.scheduler.config))
    return pipe


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed << 8) for seed in SEEDS]


def expected(folder: Path, kind: str, steps: int) -> np.ndarray:
    """Images uint8 (2, H, W, C) of diffusers' own call."""
    pipe = type(made(kind)).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {**KINDS[kind].call, "num_inference_steps": steps, "generator": generators(), "output_type": "np"}
    return (pipe(**call).images * 255).round().astype(np.uint8)


def by_command(folder: Path, kind: str, steps: int, out: Path) -> np.ndarray:
    """Images of the sampling command for this kind, read back."""
    call = KINDS[kind].call
    common = ["--seed", SEEDS[0], "--lane", 2, "--device", "cpu"]
    if kind in BY_TEXT:
        prompts = out.with_suffix(".txt")
        prompts.write_text("\n".join(PROMPTS) + "\n")
        flags = ["--from_file", prompts, "--n_samples", 2, "--ddim_steps", steps, "--outdir", out]
        if "guidance_scale" in call:
            flags += ["--scale", call["guidance_scale"]]
        for name, flag in (("image", "--image"), ("control_image", "--image"), ("mask_image", "--mask_image")):
            if name in call:
                pictures = out.with_name(f"{out.name}_{name}")
                pictures.mkdir()
                for i, picture in enumerate(call[name]):
                    picture.save(pictures / f"{i}.png")
                flags += [flag, pictures]
        for name, flag in (("height", "--H"), ("width", "--W")):
            if name in call:
                flags += [flag, call[name]]
        for name in ARGUMENTS:
            if name in call:
                flags += ["--argument", f"{name}={json.dumps(call[name])}"]
        run_in_process("txt2img.py", "--ckpt", folder, *flags, *common)
    elif kind.startswith("LDM") or kind == "DiT":
        classes = ["--classes", ",".join(map(str, call["class_labels"]))] if "class_labels" in call else []
        run_in_process("sample_diffusion_ldm.py", "-r", folder, "-n", 2, "-c", steps, "-l", out, *classes, *common)
    else:
        assert call == COUNT
        flags = ["--max_images", 2, "--timesteps", steps, "-l", out]
        run_in_process("sample_diffusion_ddim.py", "--ckpt", folder, *flags, *common)
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "images").glob("*.png"))])


def saved(kind: str, scheduler: str, folder: Path) -> Path:
    """A folder with the pipeline, as diffusers writes it."""
    with_scheduler(made(kind), scheduler).save_pretrained(folder)
    return folder


def difference(kind: str, scheduler: str, steps: int, folder: Path) -> tuple[int, float]:
    """(largest difference of a pixel in levels of 255, standard deviation of the images)."""
    model = saved(kind, scheduler, folder / "model")
    own, other = by_command(model, kind, steps, folder / "out"), expected(model, kind, steps)
    return int(np.abs(own.astype(int) - other).max()), float(other.std())


def main() -> None:
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    print("| pipeline | scheduler | steps | largest difference, of 255 |\n|---|---|---|---|")
    for kind, scheduler, steps in CELLS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                worst, spread = difference(kind, scheduler, steps, Path(folder))
                print(f"| {kind} | {scheduler} | {steps} | {worst} (std {spread:.0f}) |", flush=True)
            except AssertionError as error:
                print(f"| {kind} | {scheduler} | {steps} | {str(error).strip().splitlines()[-1][:300]} |", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
