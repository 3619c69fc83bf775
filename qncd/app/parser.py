"""Command-line arguments, each group defined once, and the one way in which scripts fail.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qncd.app import messages, stopping
from qncd.app.flags import add_recipe_arguments
from qncd.app.flags import seed as seed
from qncd.app.short_help import PrintAll, short_help, table_of_modes
from qncd.engines.registry import PRECISIONS, TORCH, engine_names
from qncd.progress import progress_bar as progress_bar  # scripts know it as cli.progress_bar
from qncd.recipe import ACT_ITERATIONS as ACT_ITERATIONS
from qncd.recipe import OptionError, SamplerConfig
from qncd.steps import SAMPLE_TYPES, SKIP_TYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

PIPELINE_FLAGS = ("scheduler", "argument", "image", "mask_image", "lora", "embedding", "ip_adapter", "ip_adapter_image")
DDIM_STEPS = 100  # of the published command lines
VERBOSITY = ("debug", "info", "warning", "critical")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


class ShortHelpParser(OneLineParser):
    """One whose `--help` shows the common flags, and whose `--help-all` shows all."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_argument("--help-all", action=PrintAll, help="show every flag and exit")

    def format_help(self) -> str:
        return short_help(self, self._actions)


def make_sampling_parser(description: str) -> argparse.ArgumentParser:
    """A parser for the many flags of a sampling command, with the options that every script has."""
    return make_parser(description, ShortHelpParser)


def make_parser(description: str, kind: type[OneLineParser] = OneLineParser) -> argparse.ArgumentParser:
    """A parser with the options that every script has. No abbreviations: a typo must not act as another flag."""
    parser = kind(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a command's main: whatever is wrong with its input, a disk or the memory is one line on stderr, exit status 2.

    SIGINT, SIGTERM and SIGHUP end it as `qncd.app.stopping` says.
    """
    messages.show("warning")
    try:
        with stopping.installed():
            main(args)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: error: {_in_one_line(error)}", file=sys.stderr)
        sys.exit(2)


# Errors that are raised for bad input, by this package or by the system. Others come from a library that met something it
# did not expect, or are faults of this package: the line says so.
_EXPECTED = (ValueError, OSError, FloatingPointError)


def _in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, _EXPECTED):
        return message or type(error).__name__
    if is_out_of_memory(error):
        return f"out of memory ({message[:200] or type(error).__name__})"
    return f"unexpected {type(error).__name__}{message and ': '}{message[:400]} (--debug shows where)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or an engine says that memory was short."""
    text = str(error).lower()
    told = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "failed to allocate memory",
        "bad_alloc",
        "bad allocation",
    )
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in text for words in told))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --ckpt, --use_pretrained, --device."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path,
        help="yaml of the model, e.g. configs/fashion_mnist.yml; needed unless --ckpt is a pipeline, whose sampler it replaces",
    )  # fmt: skip
    group.add_argument(
        "--ckpt", help="weights: a local checkpoint, a diffusers folder or a hub id (default: what the config names)"
    )
    add_published_arguments(group, "take the published weights for the config's data set")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def add_latent_model_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """--config, --ckpt (also under other names), --use_pretrained, --device of a latent model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path,
        help="yaml in CompVis' layout (default: beside the checkpoint, else the bundled model); of a single file of SDXL, Stable "
        "Diffusion 2 or inpainting, a diffusers folder or a hub id of such a model (default: the id that diffusers has for it)",
    )  # fmt: skip
    group.add_argument(
        *names, "--ckpt", dest="ckpt",
        help="weights: a checkpoint file, a folder with model.ckpt and config.yaml, a diffusers folder or a hub id",
    )  # fmt: skip
    add_published_arguments(group, "take the published weights that --config names")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


class Once(argparse.Action):
    """Stores a value, and refuses a second one in its place."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice: --from_file takes several, one a line")
        setattr(namespace, self.dest, values)


def sha256_digest(text: str) -> str:
    """The type of --sha256."""
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text}: expected 64 hexadecimal digits")
    return text.lower()


def add_published_arguments(group: argparse._ActionsContainer, use_pretrained: str) -> None:
    """--use_pretrained with this help, and --sha256."""
    group.add_argument("--use_pretrained", action="store_true", help=use_pretrained)
    group.add_argument(
        "--sha256", type=sha256_digest, metavar="HEX", help="refuse another file than this one, of --ckpt or --use_pretrained"
    )


def add_lane_argument(group: argparse._ArgumentGroup) -> None:
    """--lane."""
    group.add_argument("--lane", type=int, help="images in each network call, always exactly (default: by the size of the input)")


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """--compare_fp, --savez, --sequence, --verbose, --quiet."""
    group.add_argument("--compare_fp", action="store_true", help="also sample the full-precision model with the same seeds")
    group.add_argument("--savez", action="store_true", help="also write samples.npz, as ADM's evaluator takes it")
    group.add_argument(
        "--sequence", action="store_true", help="also write sequence.png: the first images on their way from noise"
    )
    told = group.add_mutually_exclusive_group()
    told.add_argument(
        "--verbose",
        nargs="?",
        choices=VERBOSITY,
        const="debug",
        default="info",
        help="how much is told (default info; alone: debug)",
    )
    told.add_argument(
        "--quiet", dest="verbose", action="store_const", const="warning", help="warnings alone, no progress: --verbose warning"
    )


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that pipelines of diffusers have beside those of the original models."""
    group = parser.add_argument_group(
        "pipelines of diffusers (folders with model_index.json, hub ids, single files of SDXL and others)"
    )
    group.add_argument("--scheduler", metavar="NAME", help="such as DDIM, EulerDiscrete, DPMSolverMultistep (default: its own)")
    group.add_argument(
        "--argument", metavar="NAME=VALUE", action="append", default=[],
        help="any argument of the pipeline's call, e.g. guidance_rescale=0.7, strength=0.5, negative_prompt=blurry; repeatable",
    )  # fmt: skip
    group.add_argument("--image", type=Path, help="image that it begins with, or that a ControlNet follows; a folder: in turn")
    group.add_argument("--mask_image", type=Path, help="white where an inpainting pipeline paints; a folder: in turn")
    group.add_argument(
        "--lora", metavar="FILE[=WEIGHT]", action="append", default=[],
        help="merge a LoRA into the weights before they are quantized (default weight 1), or put it beside weights that are "
        "quantized already; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--embedding",
        metavar="FILE",
        action="append",
        default=[],
        help="textual inversion: its token may be in prompts; repeatable",
    )
    group.add_argument(
        "--ip_adapter", metavar="FILE[=SCALE]",
        help="IP-Adapter (default scale 1); its image encoder is the pipeline's, else the folder image_encoder beside the file",
    )  # fmt: skip
    group.add_argument("--ip_adapter_image", type=Path, help="image that guides an IP-Adapter; a folder: all of them together")


def refuse_pipeline_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError where a flag of `add_pipeline_arguments` is given and the model is no pipeline of diffusers."""
    for name in PIPELINE_FLAGS:
        if value := getattr(args, name):
            shown = value[0] if isinstance(value, list) else value
            raise ValueError(f"--{name} {shown}: allowed with a diffusers folder, a hub id or a single file of SDXL as --ckpt")


def default_calibration_batch(size: int) -> int:
    """Calibration inputs at a time by the side of what the network sees."""
    return 32 if size <= 64 else 2


def default_lane(size: int) -> int:
    """Images in each network call by the side of what the network sees: 16 up to 64 pixels, else 4."""
    return 16 if size <= 64 else 4


def add_step_arguments(group: argparse._ArgumentGroup, timesteps: int, unless: str = "") -> None:
    """--sample_type, --skip_type, --timesteps (with its default; None where that holds not for all, as `unless` says), --eta."""
    group.add_argument("--sample_type", choices=SAMPLE_TYPES, default="generalized", help="generalized is DDIM")
    group.add_argument("--skip_type", choices=SKIP_TYPES, default="uniform", help="spacing of the time steps")
    default = None if unless else timesteps
    group.add_argument("--timesteps", type=int, default=default, help=f"number of steps (default {timesteps}{unless})")
    group.add_argument("--eta", type=float, default=0.0, help="0: deterministic DDIM; 1: as much noise as DDPM")


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler of `add_step_arguments`. Raises ValueError for values out of range."""
    steps = DDIM_STEPS if args.timesteps is None else args.timesteps
    with naming_flags(eta="eta", timesteps="timesteps"):
        return SamplerConfig(args.sample_type, args.skip_type, steps, args.eta)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--sample_type, --skip_type, --timesteps, --eta and what says which images to make."""
    group = parser.add_argument_group("sampling")
    add_step_arguments(group, DDIM_STEPS, "; of a pipeline, its own")
    group.add_argument("--seed", type=seed, default=1234, help="image i has the seed SEED + i (default 1234)")
    group.add_argument("--max_images", type=int, default=64, help="images to make (default 64)")
    group.add_argument("--batch_size", type=int, help="images at a time (default: the config's); changes no image")
    add_lane_argument(group)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """--devices, --num_nodes."""
    group = parser.add_argument_group("several devices (Lightning Fabric; they share reconstruction and sampling)")
    group.add_argument("--devices", type=int, default=1, help="processes on this machine, one a device (default 1)")
    group.add_argument(
        "--num_nodes",
        type=int,
        default=1,
        help="machines with --devices each, a folder shared (default 1); "
        "on each, run the same command with MASTER_ADDR, MASTER_PORT and NODE_RANK set; torchrun and srun need neither flag",
    )


def add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    """--cond, --cali_data_path, --cali_ckpt, --resume and --resume_w."""
    group.add_argument(
        "--cond", action="store_true", help="conditional calibration: refused for an unconditional model, always on for another"
    )
    group.add_argument(
        "--cali_data_path", type=Path, help="calibration set, Q-Diffusion's .pt layout: read, or sampled and saved here"
    )
    group.add_argument("--cali_ckpt", type=Path, help="quantized checkpoint: loaded if it exists, else made and saved here")
    group.add_argument("--resume", action="store_true", help="refuse to calibrate: --cali_ckpt must exist")
    group.add_argument(
        "--resume_w",
        action="store_true",
        help="take the weights of --cali_ckpt, calibrate activations anew, save beside the images",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--backend, --engine_precision and --onnx."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend", choices=engine_names(), default=TORCH,
        help="engine of the network (default torch: floating point on the integers' grid); the others compute in integers, "
        "triton on a GPU",
    )  # fmt: skip
    group.add_argument(
        "--engine_precision", choices=PRECISIONS, default="fp32",
        help="what an engine computes in beside the integers: triton has fp16, openvino bf16; both are faster on large networks, "
        "and farther from torch's images",
    )  # fmt: skip
    group.add_argument(
        "--onnx",
        type=Path,
        metavar="DIR",
        help="take the network from here, as scripts/export.py wrote it (default: export it)",
    )


def add_ptq_arguments(parser: argparse.ArgumentParser) -> None:
    """Quantization, reconstruction, noise correction, calibration and engine: the same in every sampling script."""
    parser.epilog = table_of_modes()
    groups = add_recipe_arguments(parser)
    add_checkpoint_arguments(groups["calibration"])
    add_process_arguments(parser)
    add_engine_arguments(parser)


def choose_device(name: str | None) -> str:
    """The device of --device, by default cuda where there is one. Raises ValueError for one that is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).tolist()  # of a device that holds values
    except (RuntimeError, AssertionError):
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *_others()]
        raise ValueError(f"--device {name}: no such device here; there is {', '.join(there)}") from None
    return name


def _others() -> list[str]:
    """Accelerators of other makers that torch finds."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return [] if found is None or found.type == "cuda" else [found.type]


@contextlib.contextmanager
def naming_flags(**flags: str) -> Iterator[None]:
    """Within it, what is wrong with an option is said of its flag.

    Args:
        flags: by the options' names, without dashes.
    """
    try:
        yield
    except OptionError as error:
        if error.name not in flags:
            raise
        raise ValueError(f"--{flags[error.name]}{str(error).removeprefix(error.name)}") from None


def check_scale(scale: float | None) -> None:
    """Raise ValueError for a guidance scale, where there is one, that cannot be."""
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"--scale {scale}: allowed are finite numbers from 0 on")


def check_counts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError where a flag that counts something is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: allowed are whole numbers, 1 or more")
