"""Sample a latent diffusion model, class-conditional or not, in full precision or quantized (--ptq).

    qncd sample --config configs/fashion_mnist_ldm.yaml -n 40 -e 0 -c 20 -l out/ldm
    qncd sample --config configs/fashion_mnist_ldm.yaml -n 40 -e 0 -c 20 -l out/w4a8 --ptq --weight_bit 4 --quant_mode qncd+
    qncd sample -r models/ldm/lsun_beds256/model.ckpt -n 8 -e 1 -c 200 -l out/beds

The output folder holds images/ (named by index and seed), labels.csv, contact_sheet.png and run.json; the same command line
goes on with a run that was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import write_text
from qncd.models.configs import CONFIGS
from qncd.recipe import SamplerConfig

if TYPE_CHECKING:
    from qncd.app.job import ImagePlan
    from qncd.distributed import Processes
    from qncd.io.runs import Run
    from qncd.recipe import Recipe

DEFAULT_CONFIG = CONFIGS / "fashion_mnist_ldm.yaml"
GUIDANCE = 3.0  # of the published ImageNet figures
STEPS = 50


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_sampling_parser(description)
    cli.add_latent_model_arguments(parser, "-r", "--resume_base")
    group = parser.add_argument_group("sampling")
    group.add_argument("-n", "--n_samples", type=int, default=64, help="images to make (default 64)")
    group.add_argument("-c", "--custom_steps", type=int, help=f"time steps (default {STEPS}; of a pipeline, its own)")
    group.add_argument("-e", "--eta", type=float, help="noise of DDIM (default 1, as in the original; 0 with --dpm)")
    group.add_argument("-v", "--vanilla_sample", action="store_true", help="DDPM over all of the model's time steps")
    group.add_argument("--dpm", action="store_true", help="DPM-Solver++ instead of DDIM")
    group.add_argument("--skip_type", choices=("uniform", "quad"), default="uniform", help="spacing of the time steps")
    group.add_argument("--seed", type=cli.seed, default=1234, help="image i has the seed SEED + i (default 1234)")
    group.add_argument("--batch_size", type=int, default=16, help="images at a time (default 16); changes no image")
    group.add_argument("--scale", type=float, help=f"classifier-free guidance (default {GUIDANCE:g}; 1 for none)")
    group.add_argument("--classes", help="comma-separated class numbers, repeated over the images (default: all in turn)")
    cli.add_lane_argument(group)
    cli.add_pipeline_arguments(parser)
    cli.add_ptq_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", type=Path, required=True, help="output folder")
    cli.add_output_arguments(group)
    return parser


def sampler_config(args: argparse.Namespace, train_timesteps: int) -> SamplerConfig:
    """DDIM in latent-diffusion's convention, DPM-Solver++, or DDPM: DDIM at eta 1 over all time steps.

    Raises ValueError for values out of range.
    """
    if args.vanilla_sample:
        if args.dpm or args.eta not in (None, 1.0):
            raise ValueError("--vanilla_sample is DDPM: it excludes --dpm and --eta other than 1")
        return SamplerConfig("generalized", "uniform", train_timesteps, 1.0)
    eta = args.eta if args.eta is not None else 0.0 if args.dpm else 1.0
    with cli.naming_flags(eta="eta", timesteps="custom_steps"):
        return SamplerConfig("dpm_solver" if args.dpm else "generalized", args.skip_type, args.custom_steps or STEPS, eta, "ldm")


def named_classes(text: str | None) -> list[int] | None:
    """The numbers of --classes. Raises ValueError where they are none."""
    if text is None:
        return None
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes {text}: expected whole numbers with commas between them") from None
    if min(classes) < 0:
        raise ValueError(f"--classes {text}: allowed are whole numbers from 0 on")
    return classes


def chosen_classes(named: list[int] | None, n_classes: int) -> list[int]:
    """The named classes, by default all but the last, which stands for none. Raises ValueError for one that is not there."""
    if named is None:
        return list(range(n_classes - 1))
    if max(named) >= n_classes:
        raise ValueError(f"--classes {','.join(map(str, named))}: allowed are 0 to {n_classes - 1}")
    return named


def check(args: argparse.Namespace) -> Recipe | None:
    """The recipe that is asked for. Raises ValueError for faulty arguments, before anything is loaded."""
    cli.check_counts(args, ("batch_size", "lane", "custom_steps", "cali_n", "cali_st", "cali_batch_size"))
    cli.check_scale(args.scale)
    sampler_config(args, 1000)
    named_classes(args.classes)
    recipe = flags.recipe_of(args)
    flags.check_files(args)
    return recipe


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("n_samples",))
    run(args)


def run(args: argparse.Namespace) -> None:
    """The same for 0 images too: the network is quantized and nothing is sampled."""
    recipe = check(args)
    from qncd.app.job import in_processes
    from qncd.app.pipelines import means_pipeline

    in_processes(args, recipe, sample_pipeline if means_pipeline(args) else sample)


def write_labels(run: Run, plan: ImagePlan, classes: Sequence[int]) -> None:
    """labels.csv: which image has which class."""
    rows = [f"{plan.path(Path(), i)},{classes[i % len(classes)]}" for i in range(plan.count)]
    write_text(run.folder / "labels.csv", "\n".join(["file,class", *rows]) + "\n")


def sample_pipeline(args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run on a pipeline of diffusers, with its own scheduler, in each of the processes."""
    from qncd.app import pipelines

    classes: list[int] = []

    def rows(pipe: Any, samples: int) -> pipelines.Rows | None:
        every = pipelines.class_labels(pipe)
        if every is None:
            pipelines.check_takes(pipe, "batch_size", "number of images alone", "scripts/txt2img.py")
            if args.classes or args.cond:
                raise ValueError(f"{args.ckpt} is unconditional: allowed without --cond and --classes")
            return None
        classes[:] = chosen_classes(named_classes(args.classes), len(every) + 1)
        spread = [{"class_labels": every[i * len(every) // samples % len(every)]} for i in range(samples)]
        return pipelines.Rows(lambda i: {"class_labels": classes[i % len(classes)]}, spread)

    def describe(run: Run, plan: ImagePlan) -> None:
        if classes:
            write_labels(run, plan, classes)

    refused = {}
    if args.vanilla_sample:
        refused["vanilla_sample"] = "a pipeline samples with its scheduler; --scheduler DDPM -c 1000 is DDPM"
    if args.skip_type != "uniform":
        refused["skip_type"] = "a pipeline's scheduler spaces its time steps"
    if args.dpm and args.scheduler:
        raise ValueError(f"--scheduler {args.scheduler}: excludes --dpm, which names another one")
    scheduler = "DPMSolverMultistep" if args.dpm else args.scheduler
    names = {
        "num_inference_steps": ("custom_steps", args.custom_steps),
        "eta": ("eta", args.eta),
        "guidance_scale": ("scale", args.scale),
    }
    request = pipelines.Request(
        names, refused, scheduler, args.n_samples, lambda i: args.seed + i, args.batch_size, args.logdir, rows, describe
    )
    pipelines.sample(request, args, recipe, processes)


def sample(args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run, in each of the processes."""
    from qncd.app import job, latent, quantizing
    from qncd.models.original.conditioning import ClassConditioner, TextConditioner
    from qncd.models.original.ldm import ldm_unet_key_map
    from qncd.sampling.guidance import Conditions

    cli.refuse_pipeline_arguments(args)
    quantizing.check_engine_arguments(args, recipe)
    device = str(processes.device)
    model, config = latent.load_model(args, DEFAULT_CONFIG, device)
    if isinstance(model.conditioner, TextConditioner):
        raise ValueError(f"{model.source} takes prompts: scripts/txt2img.py samples it")
    if model.conditioner is None and (args.cond or args.classes):
        raise ValueError(f"{model.source} is unconditional: allowed without --cond and --classes")
    scale = latent.check_guidance(model, args.scale, latent.recommended_scale(config, GUIDANCE))
    sampler = sampler_config(args, len(model.betas))
    with cli.naming_flags(timesteps="custom_steps"):
        diffusion = latent.build_diffusion(model, sampler, model.latent_shape, args.lane, scale != 1, "full")
    # Latents have more channels and attention than images: a quarter of the side for the same memory.
    recipe = recipe.decided(cli.default_calibration_batch(4 * model.latent_shape[1]), diffusion.step_count) if recipe else None
    classes: list[int] = []
    conditions = calibration_conditions = None
    columns = 8
    if isinstance(model.conditioner, ClassConditioner):
        classes = chosen_classes(named_classes(args.classes), model.conditioner.n_classes)
        columns = len(classes) if len(classes) <= 10 else 8
        if recipe:  # calibration sees every class, whichever ones are to be sampled
            every, samples = chosen_classes(None, model.conditioner.n_classes), recipe.calibration.samples
            spread = [every[i * len(every) // samples % len(every)] for i in range(samples)]
            calibration_conditions = latent.class_conditions(model, spread, scale)

        def conditions(indices: Sequence[int]) -> Conditions:
            return latent.class_conditions(model, [classes[i % len(classes)] for i in indices], scale)

    settings = {
        **latent.model_hashes(model),
        "seed": args.seed,
        "classes": classes,
        "guidance": scale,
        "lane": diffusion.lane,
        "sampler": dataclasses.asdict(sampler),
    }
    side = model.latent_shape[1] * model.first_stage.factor
    needed = 12 * args.n_samples * side * side
    task = job.Task(diffusion, settings["model"], recipe, calibration_conditions, ldm_unet_key_map(config))
    run = processes.first(lambda: job.open_folder(args, task, args.logdir, settings, args.batch_size, needed))
    latent.tell_model(model)
    decode = latent.make_decoder(model, diffusion.lane)
    plan = job.ImagePlan(args.n_samples, lambda i: args.seed + i, conditions, decode, columns)
    if classes and processes.is_first:
        write_labels(run, plan, classes)
    job.SamplingJob(run, plan, args.batch_size, processes).sample_and_finish(args, task)
