#!/usr/bin/env python3
"""Train the bundled DDIM model on Fashion-MNIST (Lightning, EMA, resumable).

    python tools/train_ddim.py --config configs/fashion_mnist.yml --out runs/fashion_mnist

Run the same line again after an interruption: it goes on from the last snapshot. Ends by writing the EMA weights
as a diffusers folder, `OUT/unet`, in half precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qncd.app import parser as cli
from qncd.app import training


def parse_args() -> argparse.Namespace:
    parser = training.make_parser(__doc__ or "", "yaml with model, diffusion, training, optim sections")
    training.add_data(parser)
    parser.add_argument(
        "--init", type=Path, help="diffusers folder with weights to start from instead of fresh ones (fine-tuning)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: 1.5x on a CPU, minutes to start")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    training.check(args)
    import pytorch_lightning as pl
    import torch

    from qncd.io.fashion_mnist import load_fashion_mnist
    from qncd.io.files import reading
    from qncd.models.loading import load_config, load_unet_folder
    from qncd.models.original.ddim import build_ddim_unet
    from qncd.sampling.process import Process
    from qncd.sampling.schedule import betas_of
    from qncd.training.diffusion import NoisePrediction, TrainingSettings, fit, section_at, value_at

    config = load_config(args.config)
    sections = [section_at(config, args.config, name) for name in ("training", "optim")]
    section = {**sections[0], **sections[1], "ema_rate": value_at(config, args.config, "model", "ema_rate")}
    settings = TrainingSettings.from_section(section, args.max_steps)
    pl.seed_everything(args.seed, verbose=False)

    unet = build_ddim_unet(config)
    if args.init:
        with reading(args.init, "a folder of this network"):
            unet.load_state_dict(load_unet_folder(args.init).state_dict())
    images, _ = load_fashion_mnist("train", args.data)
    objective = NoisePrediction(unet, Process.from_betas(betas_of(config)).alphas_cumprod)
    compiled = ("unet",) if args.compile else ()
    trained = fit(objective, (torch.from_numpy(images[: args.images]),), settings, args.out, args.precision, compiled)
    trained.get_submodule("unet").half().save_pretrained(args.out / "unet")
    print(f"EMA weights after {settings.steps} steps: {args.out / 'unet'}")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
