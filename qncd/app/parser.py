"""Command-line arguments, each group defined once, and the one way in which scripts fail.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qncd.engines.registry import PRECISIONS, TORCH, engine_names
from qncd.modes import QUANT_MODES
from qncd.progress import progress_bar as progress_bar  # scripts know it as cli.progress_bar
from qncd.recipe import (
    CACHES,
    SAMPLE_TYPES,
    SKIP_TYPES,
    STATISTICS,
    TARGETS,
    CorrectionConfig,
    ReconstructionConfig,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

ACT_ITERATIONS = 500  # of --recon_act, where --cali_iters_a does not say
VERBOSITY = ("debug", "info", "warning", "critical")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has. No abbreviations: a typo must not act as another flag."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a script's main: bad input and a full disk end as one line on stderr and exit status 2."""
    try:
        main(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command line goes on from here", file=sys.stderr)
        sys.exit(130)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --ckpt, --use_pretrained, --device."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, required=True, help="yaml of the model, e.g. configs/fashion_mnist.yml")
    group.add_argument(
        "--ckpt", help="weights: a local checkpoint, a diffusers folder or a hub id (default: what the config names)"
    )
    group.add_argument("--use_pretrained", action="store_true", help="take the published weights for the config's data set")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def add_latent_model_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """--config, --ckpt (also under other names), --use_pretrained, --device of a latent model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path, help="yaml in CompVis' layout (default: beside the checkpoint, else the model in the box)"
    )
    group.add_argument(
        *names, "--ckpt", dest="ckpt",
        help="weights: a CompVis checkpoint, a folder with model.ckpt and config.yaml, a diffusers folder or a hub id",
    )  # fmt: skip
    group.add_argument("--use_pretrained", action="store_true", help="take the published weights that --config names")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def add_lane_argument(group: argparse._ArgumentGroup) -> None:
    """--lane."""
    group.add_argument("--lane", type=int, help="images in each network call, always exactly (default: by the size of the input)")


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """--compare_fp, --savez, --sequence, --verbose."""
    group.add_argument("--compare_fp", action="store_true", help="also sample the full-precision model with the same seeds")
    group.add_argument("--savez", action="store_true", help="also write samples.npz, as ADM's evaluator takes it")
    group.add_argument(
        "--sequence", action="store_true", help="also write sequence.png: the first images on their way from noise"
    )
    group.add_argument(
        "--verbose",
        nargs="?",
        choices=VERBOSITY,
        const="debug",
        default="info",
        help="how much is told (default info; alone: debug)",
    )


def default_calibration_batch(size: int) -> int:
    """Calibration inputs at a time by the side of what the network sees."""
    return 32 if size <= 64 else 2


def default_lane(size: int) -> int:
    """Images in each network call by the side of what the network sees: 16 up to 64 pixels, else 4."""
    return 16 if size <= 64 else 4


def add_step_arguments(group: argparse._ArgumentGroup, timesteps: int) -> None:
    """--sample_type, --skip_type, --timesteps (with its default) and --eta."""
    group.add_argument("--sample_type", choices=SAMPLE_TYPES, default="generalized", help="generalized is DDIM")
    group.add_argument("--skip_type", choices=SKIP_TYPES, default="uniform", help="spacing of the time steps")
    group.add_argument("--timesteps", type=int, default=timesteps, help=f"number of steps (default {timesteps})")
    group.add_argument("--eta", type=float, default=0.0, help="0: deterministic DDIM; 1: as much noise as DDPM")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--sample_type, --skip_type, --timesteps, --eta and what says which images to make."""
    group = parser.add_argument_group("sampling")
    add_step_arguments(group, 100)
    group.add_argument("--seed", type=int, default=1234, help="image i has the seed SEED + i (default 1234)")
    group.add_argument("--max_images", type=int, default=64, help="images to make (default 64)")
    group.add_argument("--batch_size", type=int, help="images at a time (default: the config's); changes no image")
    add_lane_argument(group)


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The original's post-training quantization flags."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize the network (without it: full precision)")
    modes = "; ".join(f"{name}: {mode.summary}" for name, mode in QUANT_MODES.items())
    group.add_argument("--quant_mode", choices=QUANT_MODES, default="qncd", help=f"{modes} (default qncd)")
    group.add_argument("--weight_bit", type=int, default=8, help="2 to 8 (default 8)")
    group.add_argument("--quant_act", action="store_true", help="quantize activations in --quant_mode linear too")
    group.add_argument("--act_bit", type=int, default=8, help="2 to 8 (default 8)")
    group.add_argument("--sm_abit", type=int, default=8, help="bits of the softmax output, 2 to 16 (default 8)")
    group.add_argument("--a_sym", action="store_true", help="symmetric activation codes, no zero point")
    group.add_argument("--a_min_max", action="store_true", help="activation ranges by their extremes: --act_range max")
    group.add_argument("--running_stat", action="store_true", help="activation ranges by moving averages (momentum 0.95)")
    group.add_argument("--rs_sm_only", action="store_true", help="moving averages for the softmax output only")
    group.add_argument("--emb_float", action="store_true", help="leave the time embedding and its projections in floating point")
    group.add_argument(
        "--act_range",
        choices=("max", "mse"),
        help="activation ranges: extremes (default at 8 bits, and in linear) or least L2.4 error (default below)",
    )
    group.add_argument("--split", action=argparse.BooleanOptionalAction, help="quantize the halves of skip concatenations apart")
    group.add_argument(
        "--scale_split_static", action=argparse.BooleanOptionalAction,
        help="intra noise: smooth features by the embedding (on in --quant_mode qncd; --no-scale_split_static for ablation)",
    )  # fmt: skip
    group.add_argument(
        "--bias_correction",
        action=argparse.BooleanOptionalAction,
        help="take each layer's mean rounding error out of its bias (on in qncd and qncd+, though not in the paper)",
    )
    group.add_argument(
        "--gptq", action=argparse.BooleanOptionalAction,
        help="round weights in sequence, errors made up for by those to come, against full-precision outputs (on in qncd+)",
    )  # fmt: skip
    group.add_argument(
        "--smooth_search", action=argparse.BooleanOptionalAction,
        help="with --gptq: smooth each layer's input as strongly as leaves its output the least error (on in qncd+ at "
        "4-bit activations)",
    )  # fmt: skip
    group.add_argument(
        "--allocate_bits", action=argparse.BooleanOptionalAction,
        help="activations with widths of their own, up to 8 bits, --act_bit in the mean over all multiplications: those that "
        "leave the sample the least error (on in qncd+ below 8 bits)",
    )  # fmt: skip
    group.add_argument(
        "--stepwise_act", action=argparse.BooleanOptionalAction,
        help="a range for each of the sampler's time steps at every activation (on in qncd+)",
    )  # fmt: skip
    group.add_argument(
        "--tracking", action=argparse.BooleanOptionalAction,
        help="correct each prediction by a filter fitted on calibration runs to lead back to the full-precision trajectory "
        "(on in qncd+; in the place of --sample_reverse; ptqd and d2dpm have corrections of their own)",
    )  # fmt: skip
    group.add_argument("--weight_only", action="store_true", help="leave activations in floating point whatever the mode")


def add_reconstruction_arguments(parser: argparse.ArgumentParser) -> None:
    """BRECQ: --recon and how."""
    defaults = ReconstructionConfig()
    group = parser.add_argument_group("reconstruction (BRECQ)")
    group.add_argument(
        "--recon", action=argparse.BooleanOptionalAction,
        help="learn the rounding of the weights block by block: minutes to hours (on in qdiff, ptqd, tfmq and d2dpm)",
    )  # fmt: skip
    group.add_argument("--cali_iters", type=int, help=f"iterations a block (default {defaults.iterations}; the papers: 20000)")
    group.add_argument("--recon_lr", type=float, help=f"Adam's learning rate (default {defaults.lr:g}; the papers: 0.001)")
    group.add_argument("--recon_inputs", type=int, help=f"calibration inputs used (default {defaults.inputs})")
    group.add_argument(
        "--recon_memory", type=float, help=f"GB of activations in memory (default {defaults.memory_gb:g}), the rest in files"
    )
    group.add_argument(
        "--recon_cache", choices=CACHES,
        help=f"how activations are kept (default {defaults.cache}); bf16 where one is too large for fp16",
    )  # fmt: skip
    group.add_argument(
        "--recon_act", action="store_true", help="after the weights, learn the activation scales too, block by block (LSQ)"
    )
    group.add_argument(
        "--cali_iters_a", type=int,
        help=f"iterations a block for the activation scales (default {ACT_ITERATIONS}; the papers: 5000)",
    )  # fmt: skip
    group.add_argument("--cali_lr", type=float, help=f"their relative learning rate (default {defaults.act_lr:g})")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """--devices, --num_nodes."""
    group = parser.add_argument_group("several devices (Lightning Fabric; they share reconstruction and sampling)")
    group.add_argument("--devices", type=int, default=1, help="processes on this machine, one a device (default 1)")
    group.add_argument(
        "--num_nodes",
        type=int,
        default=1,
        help="machines with --devices each, a folder shared (default 1); "
        "on each, run the same command with MASTER_ADDR, MASTER_PORT and NODE_RANK set",
    )


def add_correction_arguments(parser: argparse.ArgumentParser) -> None:
    """Inter noise: --sample_reverse and how it estimates."""
    defaults = CorrectionConfig()
    group = parser.add_argument_group("noise correction (inter noise)")
    group.add_argument(
        "--sample_reverse", type=int, nargs="?", const=0, metavar="N",
        help="estimate the quantization noise while sampling, every N steps (on in --quant_mode qncd)",
    )  # fmt: skip
    group.add_argument("--no-sample_reverse", dest="no_sample_reverse", action="store_true", help="no correction, for ablation")
    group.add_argument("--reverse_interval", type=int, help=f"the same N, as its own flag (default {defaults.interval})")
    group.add_argument(
        "--reverse_target", choices=TARGETS, help=f"what the estimate is compared with (default {defaults.target})"
    )
    group.add_argument("--reverse_statistics", choices=STATISTICS, help=f"one mean for what (default {defaults.statistics})")
    group.add_argument(
        "--reverse_control", action=argparse.BooleanOptionalAction, default=True,
        help="correct relative to the full-precision model's own estimates (--no-reverse_control: as published)",
    )  # fmt: skip


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """The original's calibration flags."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--cali_n", type=int, default=64, help="inputs at each calibration time step (default 64)")
    group.add_argument("--cali_st", type=int, default=10, help="calibration time steps (default 10)")
    group.add_argument("--cali_batch_size", type=int, help="inputs at a time (default 32; 2 for large inputs)")
    group.add_argument("--cali_seed", type=int, default=0, help="of the calibration images' own seeds (default 0)")
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
        help="what runs the network: torch in floating point on the integers' grid (default), the others in integers; "
        "triton on a GPU",
    )  # fmt: skip
    group.add_argument(
        "--engine_precision", choices=PRECISIONS, default="fp32",
        help="of what triton computes beside the integers; fp16 is faster, and farther from torch's images",
    )  # fmt: skip
    group.add_argument(
        "--onnx",
        type=Path,
        metavar="DIR",
        help="take the network from here, as scripts/export.py wrote it (default: export it)",
    )


def add_ptq_arguments(parser: argparse.ArgumentParser) -> None:
    """Quantization, reconstruction, noise correction, calibration and engine: the same in every sampling script."""
    add_quantization_arguments(parser)
    add_reconstruction_arguments(parser)
    add_correction_arguments(parser)
    add_calibration_arguments(parser)
    add_process_arguments(parser)
    add_engine_arguments(parser)


def choose_device(name: str | None) -> str:
    """The device of --device, by default cuda where there is one. Raises ValueError for one that is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def check_counts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError where a flag that counts something is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: allowed are whole numbers, 1 or more")
