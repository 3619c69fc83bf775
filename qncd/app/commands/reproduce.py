"""Repeat a published evaluation: weights and reference, calibration, sampling, figures, and a table beside the published ones.

    qncd reproduce imagenet --widths W8A8 W4A8 --modes qncd qncd+ --out runs/imagenet
    qncd reproduce cifar10 --reference cifar10_train/ --out runs/cifar10
    qncd reproduce coco --annotations captions_val2014.json --reference val2014/ --images 5000 --out runs/coco
    qncd reproduce bedrooms --rehearse --out runs/rehearsal

Published weights and statistics are fetched and checked, or named with the place to put them. What the run will cost is said
before it starts: images, network calls, hours on this device, disk, memory; --cost ends there. The same command goes on with a
run that was cut off. --rehearse does all of it with random weights of full size, 4 steps and 2 images, so that nobody with
weights and a GPU finds a surprise later. OUT/table.md has the rows, with what differs in the protocols of others.
--cali_ckpt W4A8=FILE takes a quantized checkpoint that others have published (Q-Diffusion's .pth).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qncd.app import flags, messages
from qncd.app import parser as cli
from qncd.benchmark.plan import FULL, integer_bits
from qncd.benchmark.protocols import PROTOCOLS, REFERENCES
from qncd.benchmark.reproduction import REHEARSED, Entry, Reproduction, check_room, cost_of, run, table_lines
from qncd.modes import MODES
from qncd.workers import alone

log = logging.getLogger("qncd")
WIDTHS, DEFAULT_MODES = ("W8A8", "W4A8"), ("qncd", "qncd+")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("name", choices=PROTOCOLS, help="; ".join(f"{name}: {p.title}" for name, p in PROTOCOLS.items()))
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--widths", nargs="+", metavar="WxAy", default=list(WIDTHS), help=f"default {' '.join(WIDTHS)}")
    group.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES), help=f"default {' '.join(DEFAULT_MODES)}"
    )
    group.add_argument("--images", type=int, help="images of each row (default: the protocol's)")
    group.add_argument("--cali_ckpt", nargs="+", default=[], metavar="WxAy=FILE", help="quantized checkpoints to take, by width")
    group = parser.add_argument_group("files")
    group.add_argument("--ckpt", type=Path, help="the model's weights (default: the published ones)")
    group.add_argument("--reference", type=Path, help="real images or statistics (default: the published ones)")
    group.add_argument("--annotations", type=Path, help="captions_*.json of MS-COCO, for coco")
    group = parser.add_argument_group("running")
    group.add_argument("--rehearse", action="store_true", help="with random weights, few steps and few images")
    group.add_argument("--cost", action="store_true", help="say what it will cost, and end")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    group.add_argument("--devices", type=int, default=1, help="processes on this machine, one a device (default 1)")
    group.add_argument("--seed", type=cli.seed, default=1234, help="image i has the seed SEED + i (default 1234)")
    group.add_argument("--no-recon", dest="no_recon", action="store_true", help="round weights to nearest where modes use BRECQ")
    return parser


def main(args: argparse.Namespace) -> None:
    messages.show("info")
    cli.check_counts(args, ("images", "devices"))
    protocol, device = PROTOCOLS[args.name], cli.choose_device(args.device)
    flags.check_output_folder("--out", args.out)
    widths = list(dict.fromkeys(_width(text) for text in args.widths))
    entries = (Entry(FULL), *(Entry(width, mode) for width in widths for mode in dict.fromkeys(args.modes)))
    checkpoints = _checkpoints(args.cali_ckpt, widths)
    for name in ("ckpt", "reference", "annotations"):
        if (path := getattr(args, name)) is not None and not path.exists():
            raise FileNotFoundError(f"--{name} {path}: no such file")
    if args.annotations is not None and not protocol.prompts:
        raise ValueError(f"--annotations {args.annotations}: {args.name} takes no captions")
    if args.rehearse and args.ckpt is not None:
        raise ValueError("--rehearse has random weights: it excludes --ckpt")
    reference = args.reference if args.rehearse else _reference(args, protocol.reference, protocol.reference_hint)
    if protocol.prompts and args.annotations is None and not args.rehearse:
        raise ValueError("--annotations is missing: captions_val2014.json (annotations_trainval2014.zip of cocodataset.org)")

    from qncd.models.configs import CONFIGS
    from qncd.models.loading import load_config

    config_path = CONFIGS / protocol.config
    config = load_config(config_path)
    weights = _weights(args, config, config_path)
    images = args.images or (REHEARSED["images"] if args.rehearse else protocol.images)
    if images < 2:
        raise ValueError(f"--images {images}: allowed are 2 or more (FID's covariance needs them)")
    calibration = ["--no-recon"] if args.no_recon or args.rehearse else []
    if args.rehearse:
        calibration += ["--cali_n", str(REHEARSED["cali_n"]), "--cali_st", str(REHEARSED["cali_st"])]
    common = ("--device", device, "--devices", str(args.devices), "--seed", str(args.seed))
    prompts = args.out / "prompts.txt" if protocol.prompts else None
    plan = Reproduction(
        args.name, args.out, weights, reference, prompts, images, entries, checkpoints, common, tuple(calibration), args.rehearse
    )
    seconds, parameters = alone(time_of_a_call, config, device)
    cost = cost_of(plan, seconds, parameters)
    log.info("%s: %s", protocol.title, cost)
    check_room(cost, args.out, device)
    if args.cost:
        return

    from qncd.io.runs import open_run

    settings = {
        "reproduce": args.name, "images": images, "seed": args.seed, "rehearsal": args.rehearse, "weights": list(weights),
        "reference": str(reference), "calibration": calibration, "annotations": str(args.annotations),
    }  # fmt: skip
    with open_run(args.out, settings, {"widths": widths, "modes": args.modes, "device": device}, cost.disk) as record:
        if args.rehearse:
            alone(write_random_weights, config, args.out / "rehearsal" / "model.ckpt")
        if plan.prompts is not None:
            _write_prompts(args, plan.prompts, images)
        run(plan, record)
    print("\n".join(table_lines(plan)))


def _width(text: str) -> str:
    """A width of --widths, as W4A8. Raises ValueError for anything else."""
    weights, acts = integer_bits(text)
    return f"W{weights}A{acts}"


def _checkpoints(texts: list[str], widths: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        width, equals, path = text.partition("=")
        if not equals or _width(width) not in widths:
            raise ValueError(f"--cali_ckpt {text}: expected WIDTH=FILE with a width of --widths ({' '.join(widths)})")
        if not Path(path).is_file():
            raise FileNotFoundError(f"--cali_ckpt {text}: no such file")
        found[_width(width)] = Path(path)
    return found


def _reference(args: argparse.Namespace, published: str | None, hint: str) -> Path:
    """Real images or their statistics: what the flag names, or what is published."""
    from qncd.models.files.registry import fetch

    if args.reference is not None:
        return Path(args.reference)
    if published is None:
        raise ValueError(f"--reference is missing: {hint}; none is published for {args.name}")
    try:
        return fetch(published, REFERENCES)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("--ckpt PATH", "--reference PATH")) from None


def _weights(args: argparse.Namespace, config: dict[str, Any], config_path: Path) -> tuple[str, ...]:
    """The arguments that name the model's weights; published ones are fetched and checked now."""
    from qncd.models import latent, loading
    from qncd.models.schema import COMPVIS, layout_of

    if args.rehearse:
        return ("--config", str(config_path), "--ckpt", str(args.out / "rehearsal" / "model.ckpt"))
    if args.ckpt is not None:
        return ("--config", str(config_path), "--ckpt", str(args.ckpt))
    (latent if layout_of(config) is COMPVIS else loading).default_weights(config, use_pretrained=True, sha256=None)
    return ("--config", str(config_path), "--use_pretrained")


def _networks(config: Mapping[str, Any]) -> Any:
    """The denoiser with fresh weights."""
    from qncd.models.original.ddim import build_ddim_unet
    from qncd.models.original.ldm import build_ldm_unet
    from qncd.models.schema import COMPVIS, layout_of

    return build_ldm_unet(config) if layout_of(config) is COMPVIS else build_ddim_unet(config)


def time_of_a_call(config: Mapping[str, Any], device: str) -> tuple[float, int]:
    """Seconds of a call of the denoiser for one input on this device, and the number of its parameters."""
    import torch

    from qncd.models.network import network_of
    from qncd.models.original.compvis import build_conditioner
    from qncd.models.original.conditioning import TextConditioner

    torch.manual_seed(0)
    module = _networks(config).eval().requires_grad_(False).to(device)
    network, batch = network_of(module), 1 if torch.device(device).type == "cpu" else 8
    side, channels = network.config["sample_size"], network.config["in_channels"]
    inputs = {}
    if network.condition is not None:
        with torch.device("meta"):
            conditioner = build_conditioner(config)
        tokens = conditioner.length if isinstance(conditioner, TextConditioner) else 1
        inputs = {network.condition: torch.zeros(batch, tokens, network.config["cross_attention_dim"], device=device)}
    x, t = torch.randn(batch, channels, side, side, device=device), torch.full((batch,), 500, device=device)
    taken = []
    with torch.no_grad():
        for _ in range(2):  # the first one also prepares kernels
            start = time.perf_counter()
            float(network.predict(x, t, inputs).sum())
            taken.append(time.perf_counter() - start)
    return min(taken) / batch, sum(parameter.numel() for parameter in module.parameters())


def write_random_weights(config: Mapping[str, Any], path: Path) -> None:
    """A checkpoint of full size with random weights, in the original layout and half precision."""
    import torch

    from qncd.io.files import whole_file
    from qncd.models.original.autoencoders import FirstStage, build_first_stage
    from qncd.models.original.compvis import build_conditioner, original_state_dict
    from qncd.models.original.ddim import to_ddim_state_dict
    from qncd.models.schema import COMPVIS, layout_of

    if path.is_file():
        return
    torch.manual_seed(0)
    network = _networks(config)
    if layout_of(config) is COMPVIS:
        state = original_state_dict(config, network, FirstStage(build_first_stage(config)), build_conditioner(config))
        content: dict[str, Any] = {"state_dict": {key: value.half() for key, value in state.items()}}
    else:
        content = {key: value.half() for key, value in to_ddim_state_dict(network.state_dict(), config).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        torch.save(content, part)


def _write_prompts(args: argparse.Namespace, path: Path, images: int) -> None:
    """The captions, drawn as `qncd prompts` draws them; in a rehearsal without annotations two of our own."""
    from qncd.io.files import write_text

    if path.is_file():
        return
    if args.annotations is None:
        write_text(path, "\n".join(f"a photograph of {number} birds" for number in range(2, 2 + images)) + "\n")
        return
    from qncd.app.commands import prompts

    words = ["--annotations", str(args.annotations), "--out", str(path), "--n", str(images)]
    prompts.main(prompts.make_parser().parse_args(words))
