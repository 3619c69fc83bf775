"""Sample a DDIM model (pixels, unconditional), in full precision or quantized after training (--ptq), and write the images.

    qncd sample --config configs/fashion_mnist.yml --timesteps 50 -l out/fp
    qncd sample --config configs/fashion_mnist.yml --timesteps 50 -l out/w4a8 \\
        --ptq --weight_bit 4 --quant_mode qncd+ --compare_fp

The output folder holds images/ (named by index and seed), contact_sheet.png and run.json; the same command line goes
on with a run that was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags
from qncd.app import parser as cli

if TYPE_CHECKING:
    from qncd.distributed import Processes
    from qncd.recipe import Recipe

log = logging.getLogger("qncd")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_sampling_parser(description)
    cli.add_model_arguments(parser)
    cli.add_sampling_arguments(parser)
    cli.add_pipeline_arguments(parser)
    cli.add_ptq_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", type=Path, required=True, help="output folder")
    cli.add_output_arguments(group)
    return parser


def check(args: argparse.Namespace) -> Recipe | None:
    """The recipe that is asked for. Raises ValueError for faulty arguments, before anything is loaded."""
    cli.check_counts(args, ("batch_size", "lane", "cali_n", "cali_st", "cali_batch_size"))
    cli.sampler_config(args)
    recipe = flags.recipe_of(args)
    flags.check_files(args)
    if args.config is None and args.ckpt is None:
        raise ValueError("which model? Name its yaml with --config, or a pipeline of diffusers with --ckpt")
    if args.cond:
        raise ValueError("--cond: the models of this script are unconditional; allowed without it")
    return recipe


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("max_images",))
    run(args)


def run(args: argparse.Namespace) -> None:
    """The same for 0 images too: the network is quantized and nothing is sampled."""
    recipe = check(args)
    from qncd.app.job import in_processes
    from qncd.app.pipelines import is_pipeline

    in_processes(args, recipe, sample_pipeline if args.config is None and is_pipeline(args.ckpt) else sample)


def sample_pipeline(args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run on a pipeline of diffusers, with its own scheduler, in each of the processes."""
    from qncd.app import pipelines

    def rows(pipe: Any, samples: int) -> None:
        pipelines.check_takes(
            pipe, "batch_size", "number of images alone", "scripts/txt2img.py or scripts/sample_diffusion_ldm.py"
        )

    names = {"num_inference_steps": ("timesteps", args.timesteps), "eta": ("eta", args.eta or None)}
    refused = {}
    if args.sample_type != "generalized":
        refused["sample_type"] = "a pipeline samples with its scheduler; name another with --scheduler"
    if args.skip_type != "uniform":
        refused["skip_type"] = "a pipeline's scheduler spaces its time steps; give --config for DDIM's own sampler"
    request = pipelines.Request(
        names, refused, args.scheduler, args.max_images, lambda i: args.seed + i,
        args.batch_size or 64, args.logdir, rows,
    )  # fmt: skip
    pipelines.sample(request, args, recipe, processes)


def sample(args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run, in each of the processes."""
    from qncd.app import job, quantizing
    from qncd.models.loading import load_config, load_ddim, state_dict_hash
    from qncd.models.network import network_of
    from qncd.models.original.ddim import ddim_key_table
    from qncd.models.schema import DDIM, expect_layout
    from qncd.sampling.diffusion import Diffusion
    from qncd.sampling.process import Process
    from qncd.sampling.schedule import betas_of

    cli.refuse_pipeline_arguments(args)
    if args.config is None:
        raise ValueError(
            f"--ckpt {args.ckpt}: no pipeline of diffusers (no model_index.json in it): its yaml is needed, --config"
        )
    quantizing.check_engine_arguments(args, recipe)
    sampler = cli.sampler_config(args)
    model_config = load_config(args.config)
    expect_layout(model_config, args.config, DDIM)
    betas = betas_of(model_config)
    device = str(processes.device)
    unet = load_ddim(model_config, args.ckpt, args.use_pretrained, args.sample_type, args.sha256)
    unet = unet.to(device)  # type: ignore[arg-type]
    size, channels = int(model_config["data"]["image_size"]), int(model_config["model"]["in_channels"])
    lane, process = args.lane or cli.default_lane(size), Process.from_betas(betas)
    diffusion = Diffusion(network_of(unet), process, sampler, (channels, size, size), lane)
    with cli.naming_flags(timesteps="timesteps"):
        log.debug("%d steps: %s", diffusion.step_count, diffusion.times)
    recipe = recipe.decided(cli.default_calibration_batch(size), diffusion.step_count) if recipe else None
    base_hash = state_dict_hash(unet)
    batch_size = args.batch_size or int(model_config.get("sampling", {}).get("batch_size", 64))
    settings = {
        "model": base_hash,
        "seed": args.seed,
        "lane": diffusion.lane,
        "sampler": dataclasses.asdict(sampler),
    }
    # Twice the size of raw images: PNG files are smaller, an npz and a comparison may come on top.
    needed = 4 * args.max_images * channels * size * size
    task = job.Task(diffusion, base_hash, recipe, key_table=ddim_key_table(model_config))
    run = processes.first(lambda: job.open_folder(args, task, args.logdir, settings, batch_size, needed))
    plan = job.ImagePlan(args.max_images, lambda i: args.seed + i)
    job.SamplingJob(run, plan, batch_size, processes).sample_and_finish(args, task)
