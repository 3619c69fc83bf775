#!/usr/bin/env python3
"""Train a bundled transformer on the latents of a bundled autoencoder, and write its pipeline as a folder of diffusers.

    python tools/train_transformer.py --config configs/fashion_mnist_dit.yaml --out runs/fashion_mnist_dit
    python tools/train_transformer.py --config configs/scenes_mmdit.yaml --out runs/scenes_mmdit

The config's model.target says which: diffusers.DiTPipeline, or diffusers.StableDiffusion3Pipeline with its text encoders. The
latents of all images are computed once and kept in `OUT/latents.safetensors`. Run the same line again after an interruption: it
goes on from the last snapshot. Ends by writing `OUT/model`, averaged weights in half precision: for the bundled model, copy it
to `qncd/assets` under the name in the config's `model.weights`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import parser as cli
from qncd.app import training

if TYPE_CHECKING:
    from qncd.models.original.autoencoders import FirstStage
    from qncd.training.transformers import Trainee


def parse_args() -> argparse.Namespace:
    parser = training.make_parser(__doc__ or "", "yaml with the sections model, data and training")
    training.add_data(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer; takes a minute to start")
    return parser.parse_args()


def trainee_of(target: str, first_stage: FirstStage, section: Mapping[str, Any], source: Path) -> Trainee:
    """What the config's model.target names. Raises ValueError where nothing here trains it."""
    from qncd.io.fashion_mnist import CLASS_NAMES
    from qncd.io.scenes import all_scenes, caption_of
    from qncd.training.transformers import dit, mmdit

    if target == "diffusers.DiTPipeline":
        return dit(first_stage, section, CLASS_NAMES)
    if target == "diffusers.StableDiffusion3Pipeline":
        return mmdit(first_stage, section, sorted({word for scene in all_scenes() for word in caption_of(scene).split()}))
    raise ValueError(f"{source}: model.target {target}: allowed are diffusers.DiTPipeline and diffusers.StableDiffusion3Pipeline")


def main(args: argparse.Namespace) -> None:
    training.check(args)
    import pytorch_lightning as pl
    import torch

    from qncd.io.datasets import load_conditioned
    from qncd.models.configs import find_config, read_config
    from qncd.models.latent import load_latent_model
    from qncd.models.loading import load_config
    from qncd.training.diffusion import TrainingSettings, fit, section_at, value_at
    from qncd.training.latents import cached_latents

    config = read_config(args.config)
    section = section_at(config, args.config, "training", "transformer")
    settings = TrainingSettings.from_section(section, args.max_steps)
    source = find_config(str(value_at(config, args.config, "training", "first_stage")))
    first_stage = load_latent_model(load_config(source), None).first_stage
    pl.seed_everything(args.seed, verbose=False)
    trainee = trainee_of(str(value_at(config, args.config, "model", "target")), first_stage, section, args.config)

    dataset = value_at(config, args.config, "data", "dataset")
    array, conditions = load_conditioned(dataset, "train", args.images or section.get("images"), args.data)
    latents = cached_latents(first_stage, torch.from_numpy(array), args.out / "latents.safetensors")
    print(f"{len(latents)} latents, mean {latents.float().mean():.3f}, standard deviation {latents.float().std():.3f}")

    compiled = ("network",) if args.compile else ()
    data = (latents, *trainee.rows(conditions))
    trained = fit(trainee.objective, data, settings, args.out / "run", args.precision, compiled)
    trainee.pipe.register_modules(**{part: getattr(trained, name) for part, name in trainee.parts.items()})
    trainee.pipe.to(torch.float16).save_pretrained(args.out / "model")
    size = sum(file.stat().st_size for file in (args.out / "model").rglob("*") if file.is_file())
    print(f"EMA weights after {settings.steps} steps: {args.out / 'model'}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
