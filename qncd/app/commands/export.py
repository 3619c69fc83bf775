"""Export a quantized network as an ONNX model that computes in integers.

    qncd export --config configs/fashion_mnist.yml --cali_ckpt out/w8a8.safetensors --out out/onnx

The quantized checkpoint is what `qncd quantize` writes. OUT/model.onnx is in QDQ form: int8 weights (INT4 at 4 bits and
fewer), uint8 activations with the calibrated scales and zero points, embedding and time step inside, any batch size. ONNX
Runtime and OpenVINO run it, and `qncd sample` does with --backend and --onnx OUT. Without --cali_ckpt the full-precision
network is exported.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qncd.app import flags, messages
from qncd.app import parser as cli

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("qncd")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path, help="yaml of the model, of DDIM or in CompVis' layout; of a single file of SDXL, a folder"
    )
    group.add_argument("--ckpt", help="weights, as the sampling scripts take them (default: what the config names)")
    cli.add_published_arguments(group, "take the published weights for the config's data set")
    parser.add_argument("--cali_ckpt", type=Path, help="quantized checkpoint (default: export in full precision)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for model.onnx")
    return parser


def load_unet(args: argparse.Namespace) -> nn.Module:
    """The full-precision network that --config, --ckpt and --use_pretrained name. Raises ValueError where they name none."""
    from qncd.app import latent
    from qncd.app.pipelines import is_pipeline, pipeline_config
    from qncd.models.configs import names_pipeline
    from qncd.models.latent import load_latent_model
    from qncd.models.loading import load_config, load_ddim
    from qncd.models.pipelines import from_config, load_pipeline
    from qncd.sampling.pipeline import denoiser_of

    if args.config is None and args.ckpt is None:
        raise ValueError("which model? Name it with --config, --ckpt or both")
    if (args.config is None or names_pipeline(args.config)) and is_pipeline(args.ckpt, args.config):
        return denoiser_of(load_pipeline(args.ckpt, config=args.config))[1]
    if (named := pipeline_config(args.config)) is not None:
        return denoiser_of(from_config(named, args.ckpt, args.use_pretrained))[1]
    config = load_config(args.config) if args.config else None
    if config is not None and "target" not in config["model"]:
        return load_ddim(config, args.ckpt, args.use_pretrained, sha256=args.sha256)
    found, ckpt = latent.find_model(args.config, args.ckpt, Path())
    return load_latent_model(found, ckpt, args.use_pretrained, args.sha256).unet


def main(args: argparse.Namespace) -> None:
    flags.check_output_folder("--out", args.out)
    if args.cali_ckpt is not None and not args.cali_ckpt.is_file():
        raise FileNotFoundError(f"--cali_ckpt {args.cali_ckpt}: no such quantized checkpoint")
    from qncd.engines.engine import export
    from qncd.engines.packages import require
    from qncd.models.loading import state_dict_hash
    from qncd.models.network import network_of
    from qncd.ptq.checkpoint import load_quantized_

    messages.show("info")
    for package in ("onnx", "onnxscript"):
        require(package)
    unet = load_unet(args)
    network = network_of(unet)
    base_hash, quant, settings = state_dict_hash(unet), None, {}
    full = sum(parameter.numel() * 4 for parameter in unet.parameters())
    if args.cali_ckpt:
        info = load_quantized_(network, args.cali_ckpt, base_hash)
        quant, settings = info.config, info.settings
    path = export(network, args.out, quant, base_hash, settings)
    size = sum(part.stat().st_size for part in args.out.glob(f"{path.name}*"))
    label = quant.label if quant else "full precision"
    log.info("%s: %s, %.1f MB, %.3f of the float32 weights", path, label, size / 1e6, size / full)
