"""Convert an original checkpoint (DDIM, latent-diffusion, Stable Diffusion v1) to a folder that diffusers loads.

    qncd convert --config configs/sd-v1-inference.yaml --ckpt sd-v1-4.ckpt --out models/sd-v1-4

The folder appears whole or not at all. An existing one is replaced only if this command made it. Weights become float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qncd.app import parser as cli

MARKER = "converted.json"


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("--config", type=Path, required=True, help="the model's original yaml, e.g. configs/cin256-v2.yaml")
    parser.add_argument("--ckpt", type=Path, help="the original checkpoint (default: what the config names)")
    parser.add_argument("--use_pretrained", action="store_true", help="take the published weights for the config")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def main(args: argparse.Namespace) -> None:
    import json

    from qncd import __version__
    from qncd.models.files.diffusers_folders import whole_folder
    from qncd.models.latent import load_latent_model, save_latent_model
    from qncd.models.loading import load_config, load_ddim, save_ddim, state_dict_hash

    config = load_config(args.config)
    with whole_folder(args.out, MARKER) as folder:
        if "params" in config["model"]:
            model = load_latent_model(config, args.ckpt, args.use_pretrained)
            save_latent_model(model, folder)
            unet = model.unet
        else:
            unet = load_ddim(config, args.ckpt, args.use_pretrained)
            save_ddim(unet, config, folder)
        record = {
            "command": "scripts/convert_checkpoint.py",
            "qncd": __version__,
            "config": args.config.name,
            "checkpoint": args.ckpt.name if args.ckpt else None,
            "unet_sha256": state_dict_hash(unet),
        }
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(args.out)
