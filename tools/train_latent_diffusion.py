#!/usr/bin/env python3
"""Train the UNet of a bundled latent model, with its class embedding or its CLIP text model, and write the model.

    python tools/train_latent_diffusion.py --config configs/scenes.yaml --out runs/scenes

Comes after `train_first_stage.py` with the same --config and --out. The latents of all images are computed once and
kept in `OUT/latents.safetensors`. Run the same line again after an interruption: it goes on from the last snapshot. Ends
by writing the whole model with EMA weights, `OUT/model.safetensors`, in the original's checkpoint layout and half
precision: for the bundled model, copy it to `qncd/assets` under the name in the config's `model.weights`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qncd.app import parser as cli
from qncd.app import training

if TYPE_CHECKING:
    from qncd.models.original.autoencoders import FirstStage


def parse_args() -> argparse.Namespace:
    parser = training.make_parser(__doc__ or "", "CompVis yaml with the sections data and training as well")
    training.add_data(parser)
    parser.add_argument("--first_stage", type=Path, help="diffusers folder of the autoencoder (default: OUT/first_stage)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet; takes minutes to start on a CPU")
    return parser.parse_args()


def load_autoencoder(folder: Path, config: dict) -> FirstStage:
    """The trained first stage with the config's scale_factor, in float32.

    Raises:
        FileNotFoundError: there is none yet.
        ValueError: it is of another kind than the config's, or damaged.
    """
    from qncd.models.files.diffusers_folders import load_component
    from qncd.models.original.autoencoders import FirstStage, build_first_stage, scale_factor

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no autoencoder; run tools/train_first_stage.py with the same --config and --out")
    kind = type(build_first_stage(config)).__name__
    return FirstStage(load_component(folder, (kind,)), scale_factor(config))


def main(args: argparse.Namespace) -> None:
    training.check(args)
    import pytorch_lightning as pl
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    from qncd.io.datasets import load_conditioned
    from qncd.models.files.safetensors_files import write_safetensors
    from qncd.models.loading import load_config
    from qncd.models.original.compvis import build_conditioner, original_state_dict
    from qncd.models.original.conditioning import TextConditioner
    from qncd.models.original.ldm import build_ldm_unet, ldm_betas
    from qncd.sampling.process import Process
    from qncd.training.diffusion import NoisePrediction, TrainingSettings, condition_tensor, fit, section_at, value_at
    from qncd.training.latents import cached_latents

    config = load_config(args.config)
    section = section_at(config, args.config, "training", "diffusion")
    dataset = value_at(config, args.config, "data", "dataset")
    dropout = value_at(config, args.config, "training", "diffusion", "condition_dropout")
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(f"{args.config}: training.diffusion.condition_dropout {dropout!r}: allowed are numbers from 0 to 1")
    settings = TrainingSettings.from_section(section, args.max_steps)
    first_stage = load_autoencoder(args.first_stage or args.out / "first_stage", config)
    pl.seed_everything(args.seed, verbose=False)

    array, conditions = load_conditioned(dataset, "train", args.images or section.get("images"), args.data)
    latents = cached_latents(first_stage, torch.from_numpy(array), args.out / "latents.safetensors")
    print(f"{len(latents)} latents, mean {latents.float().mean():.3f}, standard deviation {latents.float().std():.3f}")

    unet, conditioner = build_ldm_unet(config), build_conditioner(config)
    unet.set_attn_processor(AttnProcessor())  # the same attention, on a CPU twice as fast with small heads as the fused one
    if isinstance(conditioner, TextConditioner):
        conditioner.text_model.set_attn_implementation("eager")
    tokens = condition_tensor(conditioner, conditions)
    objective = NoisePrediction(unet, Process.from_betas(ldm_betas(config)).alphas_cumprod, conditioner, float(dropout))
    compiled = ("unet",) if args.compile else ()
    trained = fit(objective, (latents, tokens), settings, args.out / "diffusion_run", args.precision, compiled)

    parts = (trained.unet, first_stage, trained.conditioner)
    state = {key: value.half().contiguous() for key, value in original_state_dict(config, *parts).items()}
    path = args.out / "model.safetensors"
    write_safetensors(state, path, {"steps": str(settings.steps), "seed": str(args.seed)})
    print(f"EMA weights after {settings.steps} steps: {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
