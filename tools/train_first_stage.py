#!/usr/bin/env python3
"""Train the autoencoder (first stage) of a bundled latent model: VQ or KL, as its config says.

    python tools/train_first_stage.py --config configs/scenes.yaml --out runs/scenes

Run the same line again after an interruption: it goes on from the last snapshot. Ends by writing the EMA weights as a
diffusers folder, `OUT/first_stage`, and printing the error of the reconstructions of images that it has not seen and
the `scale_factor` for the config, 1 / std of the latents. Next: `train_latent_diffusion.py`.
"""

from __future__ import annotations

import argparse

from qncd.app import parser as cli
from qncd.app import training


def parse_args() -> argparse.Namespace:
    parser = training.make_parser(__doc__ or "", "CompVis yaml with the sections data and training as well")
    training.add_data(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    training.check(args)
    import pytorch_lightning as pl
    import torch

    from qncd.io.datasets import load_conditioned
    from qncd.models.loading import load_config
    from qncd.models.original.autoencoders import build_first_stage
    from qncd.training.diffusion import Reconstruction, TrainingSettings, fit, images_to_float, section_at, value_at

    config = load_config(args.config)
    section = section_at(config, args.config, "training", "first_stage")
    dataset = value_at(config, args.config, "data", "dataset")
    settings = TrainingSettings.from_section(section, args.max_steps)
    pl.seed_everything(args.seed, verbose=False)

    images, _ = load_conditioned(dataset, "train", args.images or section.get("images"), args.data)
    objective = Reconstruction(
        build_first_stage(config),
        **{name: section[name] for name in ("kl_weight", "codebook_from") if name in section},
    )
    trained = fit(objective, (torch.from_numpy(images),), settings, args.out / "first_stage_run", args.precision)
    autoencoder = trained.autoencoder.half().float()  # what is measured is what is shipped

    unseen, _ = load_conditioned(dataset, "test", 512, args.data)
    absolute, squared, latents = [], [], []
    with torch.no_grad():
        for batch in map(images_to_float, torch.from_numpy(unseen).split(64)):
            encoded = autoencoder.encode(batch)
            latents.append(encoded.latents if "latents" in encoded else encoded.latent_dist.mode())
            error = (autoencoder.decode(latents[-1]).sample.clamp(-1, 1) - batch) / 2
            absolute.append(error.abs().mean())
            squared.append(error.square().mean())
    autoencoder.half().save_pretrained(args.out / "first_stage")
    psnr = -10 * torch.stack(squared).mean().log10()
    print(f"EMA weights after {settings.steps} steps: {args.out / 'first_stage'}")
    print(f"{len(unseen)} unseen images: mean absolute error {torch.stack(absolute).mean():.4f} of 1, PSNR {psnr:.2f} dB")
    print(f"scale_factor: {1 / torch.cat(latents).std():.4f}")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
