"""Export a quantized network as an ONNX model that computes in integers, or as a GGUF file.

    qncd export --config configs/fashion_mnist.yml --cali_ckpt out/w8a8.safetensors --out out/onnx

The quantized checkpoint is what `qncd quantize` writes. OUT/model.onnx is in QDQ form: int8 weights (INT4 at 4 bits and
fewer), uint8 activations with the calibrated scales and zero points, embedding and time step inside, any batch size. ONNX
Runtime and OpenVINO run it, and `qncd sample` does with --backend and --onnx OUT. Without --cali_ckpt the full-precision
network is exported.

    qncd quantize --ckpt models/sd15 --from_file prompts.txt --weight_bit 4 --weight_grid gguf --weight_only --quant_mode qncd+ \
        --cali_ckpt out/q4_0.safetensors
    qncd export --ckpt models/sd15 --cali_ckpt out/q4_0.safetensors --out out/sd15-q4_0.gguf

FILE.gguf holds the UNet of Stable Diffusion 1, 2 or XL, or the transformer of SD3, FLUX or Qwen-Image, for
stable-diffusion.cpp, ComfyUI-GGUF and diffusers. Without --cali_ckpt its weights are rounded to the nearest of --type.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags, messages
from qncd.app import parser as cli
from qncd.engines.registry import GGUF_TYPES

if TYPE_CHECKING:
    from torch import nn

    from qncd.models.network import Network
    from qncd.recipe import QuantConfig

GGUF_SUFFIX = ".gguf"
log = logging.getLogger("qncd")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path, help="yaml of the model, of DDIM or in CompVis' layout; of a single file of SDXL, a folder"
    )
    group.add_argument("--ckpt", help="weights, as the sampling scripts take them (default: what the config names)")
    cli.add_published_arguments(group, "take the published weights for the config's data set")
    parser.add_argument(
        "--cali_ckpt", type=Path, help="quantized checkpoint (default: export --ckpt as it is, in full precision or quantized)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for model.onnx, or the file FILE.gguf")
    parser.add_argument("--type", choices=GGUF_TYPES, help="of FILE.gguf (default: that of the weights in --cali_ckpt)")
    return parser


def load_unet(args: argparse.Namespace) -> nn.Module:
    """The full-precision network that --config, --ckpt and --use_pretrained name. Raises ValueError where they name none."""
    from qncd.app import latent
    from qncd.app.pipelines import is_pipeline, opened, pipeline_config
    from qncd.models.configs import names_pipeline
    from qncd.models.latent import load_latent_model
    from qncd.models.loading import load_config, load_ddim
    from qncd.sampling.pipeline import denoiser_of

    if args.config is None and args.ckpt is None:
        raise ValueError("which model? Name it with --config, --ckpt or both")
    named, original = pipeline_config(args.config), args.config is not None and not names_pipeline(args.config)
    if named is not None or (not original and is_pipeline(args.ckpt, args.config)):
        return denoiser_of(opened(args, named is not None))[1]
    config = load_config(args.config) if args.config else None
    if config is not None and "target" not in config["model"]:
        return load_ddim(config, args.ckpt, args.use_pretrained, sha256=args.sha256)
    found, ckpt = latent.find_model(args.config, args.ckpt, Path())
    return load_latent_model(found, ckpt, args.use_pretrained, args.sha256).unet


def gguf_type(kind: str | None, quant: QuantConfig | None, source: str) -> str:
    """The type to write: what is asked for, or that of the weights, which `source` names. Raises ValueError where they differ."""
    from qncd.engines.gguf import type_of

    if quant is None:
        if kind is None:
            raise ValueError(f"weights in full precision are rounded to nearest: which --type? {', '.join(GGUF_TYPES)}")
        return kind
    try:
        found = type_of(quant)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if kind not in (None, found):
        raise ValueError(f"--type {kind}: the weights of {source} are {found}")
    return found


def export_gguf(network: Network, path: Path, kind: str, base_hash: str, records: Mapping[str, Any] | None) -> None:
    """Write FILE.gguf.

    Args:
        records: what corrections know, of a quantized network; None: it is in full precision, and is rounded first.

    Raises:
        ValueError: no reader of GGUF knows such a network.
    """
    from qncd.engines.gguf import names_of, write_gguf
    from qncd.ptq.stages.prepare import quantize_
    from qncd.ptq.stages.ranges import round_
    from qncd.recipe import GGUF, QuantConfig

    names_of(network.module)  # before the long work
    bits = GGUF_TYPES[kind]
    if records is None and bits is not None:
        round_(quantize_(network, QuantConfig(bits, None, bias_correction=False, weight_grid=GGUF)))
    write_gguf(network, path, kind, base_hash)
    for name in records or ():
        log.warning("not in the file: %s, which corrects predictions while sampling: no reader of GGUF does", name)


def main(args: argparse.Namespace) -> None:
    to_gguf = args.out.suffix == GGUF_SUFFIX
    if to_gguf:
        flags.check_file("--out", args.out, replace=True)
    else:
        flags.check_output_folder("--out", args.out)
        if args.type is not None:
            raise ValueError(f"--type {args.type} is about FILE.gguf: --out {args.out} is a folder for an ONNX model")
    if args.cali_ckpt is not None and not args.cali_ckpt.is_file():
        raise FileNotFoundError(f"--cali_ckpt {args.cali_ckpt}: no such quantized checkpoint")
    from qncd.engines.engine import export
    from qncd.engines.packages import require
    from qncd.models.loading import state_dict_hash
    from qncd.models.network import network_of
    from qncd.ptq.checkpoint import load_quantized_, peek_quantized
    from qncd.quant.inspection import quant_layers
    from qncd.sampling.correctors.registry import kind_of

    messages.show("info")
    for package, extra in (("gguf", "gguf"),) if to_gguf else (("onnx", "export"), ("onnxscript", "export")):
        require(package, extra)
    source = f"--cali_ckpt {args.cali_ckpt}" if args.cali_ckpt else f"--ckpt {args.ckpt}"
    info = peek_quantized(args.cali_ckpt) if args.cali_ckpt else None
    if to_gguf and info is not None:
        gguf_type(args.type, info.config, source)  # before anything is loaded
    unet = load_unet(args)
    network, state = network_of(unet), getattr(unet, "_qncd", None)
    if info is not None and state is not None:
        raise ValueError(f"{source}: {args.ckpt} is quantized already")
    base_hash, quant, settings, records = state_dict_hash(unet), None, {}, None
    shapes = [p.shape for p in unet.parameters()] + [layer.weight_shape for layer in quant_layers(unet).values() if layer.packed]
    full = 4 * sum(shape.numel() for shape in shapes)
    if info is not None:
        load_quantized_(network, args.cali_ckpt, base_hash)
        quant, settings, records = info.config, info.settings, info.records
    elif state is not None:
        base_hash, quant, settings = state.base_hash, state.recipe.quant, state.settings
        kind = kind_of(state.recipe)
        records = {} if kind is None else {kind.prefix: state.record}
    if to_gguf:
        path, label = args.out, gguf_type(args.type, quant, source)
        export_gguf(network, path, label, base_hash, records)
    else:
        path, label = export(network, args.out, quant, base_hash, settings), quant.label if quant else "full precision"
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    log.info("%s: %s, %.1f MB, %.3f of the float32 weights", path, label, size / 1e6, size / full)
