"""Text to image with Stable Diffusion or the small bundled model, in full precision or quantized (--ptq).

    qncd sample --plms --prompt "a large red circle above a small blue square" --outdir out/txt2img
    qncd sample --plms --cond --ptq --weight_bit 8 --quant_mode qncd --quant_act --act_bit 8 \\
        --cali_st 25 --cali_batch_size 1 --cali_n 128 --no_grad_ckpt --scale_split_static --sample_reverse \\
        --reverse_interval 10 --running_stat --sm_abit 16 --from_file val_ann.txt --n_samples 2
    qncd sample --config configs/sd-v1-inference.yaml --ckpt sd-v1-4.ckpt --plms --prompt "a cat" --outdir out/sd

Without --config and --ckpt it samples the bundled model (configs/scenes.yaml). The output folder holds images/,
prompts.jsonl (which image has which prompt and seed), contact_sheet.png and run.json; the same command line goes on
with a run that was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import write_text
from qncd.io.prompts import check_text, read_prompts
from qncd.models.configs import CONFIGS
from qncd.recipe import SamplerConfig

if TYPE_CHECKING:
    from qncd.app.job import ImagePlan
    from qncd.distributed import Processes
    from qncd.io.runs import Run
    from qncd.models.latent import LatentModel
    from qncd.recipe import Recipe

DEFAULT_CONFIG = CONFIGS / "scenes.yaml"
GUIDANCE = 7.5
STEPS = 50


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_sampling_parser(description)
    cli.add_latent_model_arguments(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action=cli.Once, help="one prompt, for --n_samples images")
    group.add_argument("--from_file", type=Path, help="text file with a prompt a line, for one image each")
    group.add_argument("--begin_data", type=int, default=0, help="prompts of --from_file to skip (default 0)")
    group.add_argument("--max_prompts", type=int, help="prompts of --from_file to take (default: all)")
    group.add_argument("--n_samples", type=int, default=3, help="images at a time, and how many of one --prompt (default 3)")
    group.add_argument("--n_iter", type=int, default=1, help="go over the prompts so often, with other seeds (default 1)")
    group = parser.add_argument_group("sampling")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument("--plms", action="store_true", help="PLMS instead of DDIM")
    kinds.add_argument("--dpm", "--dpm_solver", action="store_true", help="DPM-Solver++ instead of DDIM")
    group.add_argument(
        "--ddim_steps", type=int, help=f"time steps of whichever sampler (default {STEPS}; of a pipeline, its own)"
    )
    group.add_argument("--ddim_eta", type=float, help="noise of DDIM (default 0)")
    group.add_argument("--scale", type=float, help=f"classifier-free guidance (default: the yaml's, else {GUIDANCE})")
    group.add_argument("--seed", type=cli.seed, default=42, help="image i has the seed SEED + i (default 42)")
    group.add_argument("--fixed_code", action="store_true", help="every --n_samples images start from the same noises")
    group.add_argument("--H", type=int, help="height in pixels (default: the model's)")
    group.add_argument("--W", type=int, help="width in pixels (default: the model's)")
    group.add_argument("--C", type=int, help="latent channels: checked against the model")
    group.add_argument("--f", type=int, help="downsampling factor: checked against the model")
    group.add_argument(
        "--precision", choices=("full", "autocast"), default="full",
        help="autocast: mixed precision (faster on a GPU; the original's default)",
    )  # fmt: skip
    cli.add_lane_argument(group)
    cli.add_pipeline_arguments(parser)
    cli.add_ptq_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--outdir", type=Path, default=Path("outputs/txt2img-samples"), help="output folder (default %(default)s)")
    group.add_argument("--skip_grid", action="store_true", help="no contact sheet")
    group.add_argument("--skip_save", action="store_true", help="remove the single images at the end")
    group.add_argument(
        "--n_rows", type=int, help="images in a row of the contact sheet (default: --n_samples, 8 with --from_file)"
    )
    group.add_argument(
        "--safety_checker", metavar="MODEL", help="black out what this checker flags: folder or hub id (default: off)"
    )
    group.add_argument(
        "--watermark", metavar="TEXT", help="invisible watermark, needs the package invisible-watermark (default: off)"
    )
    cli.add_output_arguments(group)
    group.add_argument(
        "--no_grad_ckpt", action="store_true",
        help="no gradient checkpointing: always so here, nothing is back-propagated; accepted for the original's command lines",
    )  # fmt: skip
    return parser


def chosen_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt or --from_file. Raises ValueError where there are none, or `read_prompts` refuses them."""
    if (args.prompt is None) == (args.from_file is None):
        raise ValueError("give either --prompt TEXT or --from_file FILE")
    if args.prompt is not None:
        if args.begin_data or args.max_prompts:
            raise ValueError("--begin_data and --max_prompts count lines of --from_file")
        return [check_text(args.prompt, "--prompt")]
    try:
        found = read_prompts(args.from_file)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"--from_file {error}") from None
    prompts = found[args.begin_data : None if args.max_prompts is None else args.begin_data + args.max_prompts]
    if not prompts:
        raise ValueError(f"--from_file {args.from_file}: {len(found)} prompts, none left after --begin_data {args.begin_data}")
    return prompts


def latent_shape(args: argparse.Namespace, model: LatentModel) -> tuple[int, int, int]:
    """(C, h, w) of the latents for --H, --W, --C, --f. Raises ValueError where the model has others."""
    (channels, height, width), factor = model.latent_shape, model.first_stage.factor
    for name, value, own in (("C", args.C, channels), ("f", args.f, factor)):
        if value is not None and value != own:
            raise ValueError(f"--{name} {value}: this model has {own}")
    for name, value in (("H", args.H), ("W", args.W)):
        if value is not None and (value < factor or value % factor):
            raise ValueError(f"--{name} {value}: allowed are multiples of {factor}")
    return channels, args.H // factor if args.H else height, args.W // factor if args.W else width


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """DDIM, PLMS or DPM-Solver++ in latent-diffusion's convention. Raises ValueError for values out of range."""
    kind = "plms" if args.plms else "dpm_solver" if args.dpm else "generalized"
    with cli.naming_flags(eta="ddim_eta", timesteps="ddim_steps"):
        return SamplerConfig(kind, "uniform", args.ddim_steps or STEPS, args.ddim_eta or 0.0, "ldm")


def check(args: argparse.Namespace) -> tuple[Recipe | None, list[str]]:
    """The recipe that is asked for and the prompts. Raises ValueError for faulty arguments, before anything is loaded."""
    counts = ("n_samples", "n_rows", "max_prompts", "lane", "ddim_steps", "H", "W", "C", "f")
    cli.check_counts(args, (*counts, "cali_n", "cali_st", "cali_batch_size"))
    cli.check_scale(args.scale)
    if args.begin_data < 0:
        raise ValueError(f"--begin_data {args.begin_data}: allowed are whole numbers, 0 or more")
    if args.scheduler and (args.plms or args.dpm):
        raise ValueError(f"--scheduler {args.scheduler}: excludes --plms and --dpm, which name another one")
    if args.skip_grid and args.skip_save:
        raise ValueError("--skip_grid and --skip_save together leave nothing to look at")
    recipe = flags.recipe_of(args)
    flags.check_files(args)
    sampler_config(args)
    return recipe, chosen_prompts(args)


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("n_iter",))
    run(args)


def run(args: argparse.Namespace) -> None:
    """The same for 0 images too: the network is quantized and nothing is sampled."""
    recipe, prompts = check(args)
    from qncd.app.job import in_processes
    from qncd.app.pipelines import means_pipeline

    in_processes(args, recipe, functools.partial(sample_pipeline if means_pipeline(args) else sample, prompts))


class PromptPlan:
    """Which image has which prompt and seed."""

    def __init__(self, prompts: Sequence[str], args: argparse.Namespace) -> None:
        self.prompts, self.args = prompts, args
        self.rounds = len(prompts) if args.from_file else args.n_samples
        self.count = args.n_iter * self.rounds

    def number(self, index: int) -> int:
        """Of image `index`, its prompt's place among the prompts."""
        return index % self.rounds if self.args.from_file else 0

    def prompt(self, index: int) -> str:
        """Of image `index`."""
        return self.prompts[self.number(index)]

    def seed(self, index: int) -> int:
        """Of image `index`."""
        return int(self.args.seed + (index % self.args.n_samples if self.args.fixed_code else index))

    def calibration(self, samples: int) -> list[str]:
        """Prompts spread over the whole file; where there are fewer, they are taken several times with other noise."""
        return [self.prompts[i * len(self.prompts) // samples] for i in range(samples)]

    @property
    def columns(self) -> int:
        """Of the contact sheet."""
        return int(self.args.n_rows or (8 if self.args.from_file else self.args.n_samples))

    @property
    def settings(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "fixed_code": self.args.n_samples if self.args.fixed_code else None,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "images": self.count,
        }

    def write(self, run: Run, plan: ImagePlan) -> None:
        """prompts.jsonl."""
        lines = []
        for i in range(self.count):
            name, number = str(plan.path(Path("images"), i)), self.args.begin_data + self.number(i)
            line = {"index": i, "file": name, "seed": self.seed(i), "prompt_index": number, "prompt": self.prompt(i)}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(run.folder / "prompts.jsonl", "".join(lines))


def sample_pipeline(prompts: Sequence[str], args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run on a pipeline of diffusers, in each of the processes."""
    from qncd.app import pipelines

    chosen = PromptPlan(prompts, args)

    def rows(pipe: Any, samples: int) -> pipelines.Rows:
        pipelines.check_takes(pipe, "prompt", "text", "scripts/sample_diffusion_ldm.py or scripts/sample_diffusion_ddim.py")
        spread = [{"prompt": text} for text in chosen.calibration(samples)] if samples else []
        return pipelines.Rows(lambda i: {"prompt": chosen.prompt(i)}, spread)

    names = {
        "num_inference_steps": "ddim_steps", "eta": "ddim_eta", "guidance_scale": "scale", "height": "H", "width": "W",
    }  # fmt: skip
    named = "PNDM" if args.plms else "DPMSolverMultistep" if args.dpm else args.scheduler
    request = pipelines.Request(
        arguments={name: (flag, getattr(args, flag)) for name, flag in names.items()},
        refused={name: "the pipeline knows its own" for name in ("C", "f") if getattr(args, name) is not None},
        scheduler=named,
        count=chosen.count,
        seed_of=chosen.seed,
        batch_size=args.n_samples,
        output=args.outdir,
        rows=rows,
        describe=chosen.write,
        columns=chosen.columns,
        grid=not args.skip_grid,
        settings=chosen.settings,
        finish=(args.safety_checker, args.watermark),
    )
    pipelines.sample(request, args, recipe, processes)
    if args.skip_save and chosen.count and processes.is_first:
        shutil.rmtree(args.outdir / "images")


def sample(prompts: Sequence[str], args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run, in each of the processes."""
    from qncd.app import job, latent, quantizing
    from qncd.models.original.ldm import ldm_unet_key_map
    from qncd.models.safety import image_finisher
    from qncd.sampling.guidance import Conditions

    cli.refuse_pipeline_arguments(args)
    quantizing.check_engine_arguments(args, recipe)
    sampler = sampler_config(args)
    device = str(processes.device)
    finish = image_finisher(args.safety_checker, args.watermark, device)
    model, config = latent.load_model(args, DEFAULT_CONFIG, device)
    scale = latent.check_guidance(model, args.scale, latent.recommended_scale(config, GUIDANCE))
    encode = latent.PromptEncoder(model, scale)
    shape = latent_shape(args, model)
    with cli.naming_flags(timesteps="ddim_steps"):
        diffusion = latent.build_diffusion(model, sampler, shape, args.lane, scale != 1, args.precision)
    # Latents have more channels and attention than images: a quarter of the side for the same memory.
    recipe = recipe.decided(cli.default_calibration_batch(4 * max(shape[1:])), diffusion.step_count) if recipe else None
    chosen = PromptPlan(prompts, args)

    def conditions(indices: Sequence[int]) -> Conditions:
        return encode([chosen.prompt(i) for i in indices])

    settings = {
        **latent.model_hashes(model),
        "seed": args.seed,
        **chosen.settings,
        "guidance": scale,
        "latents": shape,
        "precision": args.precision,
        "lane": diffusion.lane,
        "sampler": dataclasses.asdict(sampler),
        "finish": [args.safety_checker, args.watermark],
    }
    height, width = (side * model.first_stage.factor for side in shape[1:])
    needed = 12 * chosen.count * height * width
    calibration = encode(chosen.calibration(recipe.calibration.samples)) if recipe else None
    task = job.Task(diffusion, settings["model"], recipe, calibration, ldm_unet_key_map(config))
    run = processes.first(lambda: job.open_folder(args, task, args.outdir, settings, args.n_samples, needed))
    latent.tell_model(model)
    decode = latent.make_decoder(model, diffusion.lane, finish)
    plan = job.ImagePlan(chosen.count, chosen.seed, conditions, decode, chosen.columns)
    if processes.is_first:
        chosen.write(run, plan)
    job.SamplingJob(run, plan, args.n_samples, processes).sample_and_finish(args, task, not args.skip_grid)
    if args.skip_save and chosen.count and processes.is_first:
        shutil.rmtree(run.folder / "images")
