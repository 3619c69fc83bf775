#!/usr/bin/env python3
"""Sample a DDIM model, in full precision or quantized after training (--ptq), and write the images.

    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --timesteps 50 -l out/fp
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --timesteps 50 -l out/w4a8 \\
        --ptq --weight_bit 4 --compare_fp

The output folder holds images/ (named by index and seed), contact_sheet.png and run.json; the same command line goes
on with a run that was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qncd.app import flags
from qncd.app import parser as cli

if TYPE_CHECKING:
    from qncd.distributed import Processes

log = logging.getLogger("qncd")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    cli.add_model_arguments(parser)
    cli.add_sampling_arguments(parser)
    cli.add_ptq_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", type=Path, required=True, help="output folder")
    cli.add_output_arguments(group)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from qncd.app import jobs

    processes = jobs.start_job(args)
    with processes.quiet_failure():
        sample(args, processes)


def sample(args: argparse.Namespace, processes: Processes) -> None:
    """The run, in each of the processes."""
    from qncd.app import jobs, preparation
    from qncd.io.runs import open_run
    from qncd.models.loading import load_config, load_ddim, state_dict_hash
    from qncd.models.original.ddim import ddim_key_table
    from qncd.ptq.pipeline import Diffusion
    from qncd.sampling.schedule import betas_of

    cli.check_counts(args, ("max_images", "batch_size", "lane", "cali_n", "cali_st", "cali_batch_size"))
    sampler, wanted = cli.sampler_config(args), flags.recipe_of(args)
    preparation.check_quantization_arguments(args)
    if args.cond:
        raise ValueError("--cond: the models of this script are unconditional; allowed without it")
    model_config = load_config(args.config)
    betas = betas_of(model_config)
    device = str(processes.device)
    unet = load_ddim(model_config, args.ckpt, args.use_pretrained).to(device)
    size, channels = int(model_config["data"]["image_size"]), int(model_config["model"]["in_channels"])
    wanted = wanted.with_batch_size(cli.default_calibration_batch(size)) if wanted else None
    diffusion = Diffusion(unet, betas, sampler, (channels, size, size), args.lane or cli.default_lane(size))
    log.debug("%d steps: %s", len(diffusion.steps), [s.t for s in diffusion.steps])
    base_hash = state_dict_hash(unet)
    batch_size = args.batch_size or int(model_config.get("sampling", {}).get("batch_size", 64))
    settings = {
        "model": base_hash,
        "seed": args.seed,
        "lane": diffusion.lane,
        "sampler": dataclasses.asdict(sampler),
        **preparation.run_settings(wanted, args, batch_size),
    }
    # Twice the size of raw images: PNG files are smaller, an npz and a comparison may come on top.
    needed = 4 * args.max_images * channels * size * size
    run = processes.first(lambda: open_run(args.logdir, settings, jobs.environment(args, device, batch_size), needed))
    job = jobs.SamplingJob(run, jobs.ImagePlan(args.max_images, lambda i: args.seed + i), batch_size, processes)
    job.sample_and_finish(args, wanted, diffusion, base_hash, key_table=ddim_key_table(model_config))


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
