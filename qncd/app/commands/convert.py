"""Convert an original checkpoint (DDIM, latent-diffusion, Stable Diffusion v1) to a folder that diffusers loads, or back.

    qncd convert --config configs/sd-v1-inference.yaml --ckpt sd-v1-4.ckpt --out models/sd-v1-4
    qncd convert --config configs/fashion_mnist.yml --to original --out models/fashion_mnist

With --to original the folder holds the yaml and model.ckpt, the weights under the original code's names: what the code that other
methods have published quantizes.

The folder appears whole or not at all. An existing one is replaced only if this command made it. Weights become float32.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qncd.app import flags
from qncd.app import parser as cli

MARKER = "converted.json"
FORMATS = ("diffusers", "original")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("--config", type=Path, required=True, help="the model's original yaml, e.g. configs/cin256-v2.yaml")
    parser.add_argument("--ckpt", type=Path, help="the original checkpoint (default: what the config names)")
    cli.add_published_arguments(parser, "take the published weights for the config")
    parser.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="layout of what is written (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def main(args: argparse.Namespace) -> None:
    flags.check_output_folder("--out", args.out)
    import torch

    from qncd import __version__
    from qncd.io.files import whole_folder, write_json
    from qncd.models.files.diffusers_folders import check_replaceable
    from qncd.models.latent import load_latent_model, save_latent_model
    from qncd.models.loading import load_config, load_ddim, save_ddim, state_dict_hash
    from qncd.models.original.compvis import original_state_dict
    from qncd.models.original.ddim import to_ddim_state_dict
    from qncd.models.schema import COMPVIS, DDIM, expect_layout, layout_of

    check_replaceable(args.out, MARKER)
    config = load_config(args.config)
    expect_layout(config, args.config, COMPVIS, DDIM)
    unet: Any
    state: Callable[[], Any]
    if layout_of(config) is COMPVIS:
        model = load_latent_model(config, args.ckpt, args.use_pretrained, args.sha256)
        unet, save = model.unet, functools.partial(save_latent_model, model)
        state = lambda: {"state_dict": original_state_dict(config, unet, model.first_stage, model.conditioner)}  # noqa: E731
    else:
        unet = load_ddim(config, args.ckpt, args.use_pretrained, sha256=args.sha256)
        save = functools.partial(save_ddim, unet, config)
        state = lambda: to_ddim_state_dict(unet.state_dict(), config)  # noqa: E731
    record = {
        "command": "scripts/convert_checkpoint.py",
        "qncd": __version__,
        "layout": args.to,
        "config": args.config.name,
        "checkpoint": args.ckpt.name if args.ckpt else None,
        "unet_sha256": state_dict_hash(unet),
    }
    with whole_folder(args.out) as folder:
        if args.to == "original":
            shutil.copy(args.config, folder / args.config.name)
            torch.save(state(), folder / "model.ckpt")
        else:
            save(folder)
        write_json(folder / MARKER, record)
    print(args.out)
