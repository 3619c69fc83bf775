#!/usr/bin/env python3
"""Show that a model of full size is quantized, saved, loaded and sampled within twice the memory of its float32 weights.

    python tools/check_full_size.py --json full_size.json

Takes Stable Diffusion v1's UNet (860 M parameters) with random weights at 512x512, guidance included: 2 PLMS steps, a tiny
calibration set along its own trajectory, smoothing, bias correction and the noise table. Quantizing and using the checkpoint
are one process each. The ratio is the peak resident set, interpreter and libraries included, over the bytes of the weights;
above 2 the exit status is 1. A quantized network keeps int8 codes beside the float32 weights, a quarter of their bytes more.
Some 40 network calls: 15 minutes of one CPU core, and 1 GB in the temporary folder. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import regular_file, scratch_folder, write_json
from qncd.models.configs import CONFIGS, find_config
from qncd.recipe import (
    WEIGHT_RANGES,
    CalibrationConfig,
    CorrectionConfig,
    QuantConfig,
    Recipe,
    SamplerConfig,
    SmoothingConfig,
)
from qncd.workers import alone

if TYPE_CHECKING:
    from qncd.models.network import Network
    from qncd.sampling.diffusion import Diffusion
    from qncd.sampling.guidance import Conditions

LIMIT = 2.0  # times the float32 weights
CONTEXT = "encoder_hidden_states"  # what a network that takes text is conditioned on
GB = 1e9
TIMESTEPS = 1000  # of the models' schedules


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--config", type=Path, default=CONFIGS / "sd-v1-inference.yaml", help="yaml of a latent model")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels (default 512)")
    parser.add_argument("--steps", type=int, default=2, help="PLMS steps (default 2)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance (default 7.5; 1: none, half the inputs a call)")
    parser.add_argument("--weight_bit", type=int, default=8, help="2 to 8 (default 8)")
    parser.add_argument("--act_bit", type=int, default=8, help="2 to 8 (default 8)")
    parser.add_argument("--weight_range", choices=WEIGHT_RANGES, default="mse", help="default mse; max saves minutes")
    parser.add_argument("--cali_n", type=int, default=4, help="calibration trajectories (default 4; the noise table needs 4)")
    parser.add_argument("--cali_st", type=int, default=1, help="calibration time steps (default 1)")
    parser.add_argument("--no-sample_reverse", dest="no_sample_reverse", action="store_true", help="no noise correction")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def memory(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(field + ":"))


class Phases:
    """Seconds and peak memory of each phase of this process, printed as they end."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at what is resident now
        start, cpu = time.perf_counter(), time.process_time()
        yield
        seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, memory("VmHWM")
        self.rows[name] = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}
        print(f"{name:<38} {seconds:7.1f} s ({cpu:.1f} of CPU), peak {peak / GB:.2f} GB", flush=True)


def state_of(network: Network) -> list[str]:
    """A digest of each tensor of the model. 0 is added, for rounding leaves zeros a sign that integer codes do not have."""
    from qncd.models.loading import state_dict_hash

    return [state_dict_hash({name: tensor + 0}) for name, tensor in sorted(network.module.state_dict().items())]


def build(args: argparse.Namespace) -> Diffusion:
    """The diffusion with a UNet of fresh weights, the same ones each time; its activations stay near 1."""
    import torch

    from qncd.app.latent import latent_lane
    from qncd.models.loading import load_config
    from qncd.models.network import network_of
    from qncd.models.original.ldm import build_ldm_unet, ldm_betas
    from qncd.sampling.diffusion import Diffusion
    from qncd.sampling.process import Process

    config = load_config(args.config)
    torch.manual_seed(0)
    network = network_of(build_ldm_unet(config).eval().requires_grad_(False))
    if network.condition != CONTEXT:
        raise ValueError(f"--config {args.config}: the model takes no text; allowed are models with cross-attention")
    try:
        factor = 2 ** (len(config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)
    except (KeyError, TypeError):
        raise ValueError(f"--config {args.config}: no first_stage_config.params.ddconfig.ch_mult") from None
    if args.size % (8 * factor):
        raise ValueError(f"--size {args.size}: allowed are multiples of {8 * factor}")
    side = args.size // factor
    shape = (network.config["in_channels"], side, side)
    process = Process.from_betas(ldm_betas(config))
    return Diffusion(network, process, sampler_of(args), shape, latent_lane(side, args.scale != 1))


def sampler_of(args: argparse.Namespace) -> SamplerConfig:
    """PLMS. Raises ValueError for more steps than there are time steps."""
    if args.steps > TIMESTEPS:
        raise ValueError(f"--steps {args.steps}: allowed are 1 to {TIMESTEPS}")
    return SamplerConfig("plms", "uniform", args.steps, 0.0, "ldm")


def contexts(args: argparse.Namespace, diffusion: Diffusion) -> Conditions:
    """A random text context for each calibration trajectory, and one for no text."""
    import torch

    from qncd.sampling.guidance import Conditions

    shape = (args.cali_n + 1, 77, diffusion.network.config["cross_attention_dim"])
    cond, uncond = torch.randn(shape, generator=torch.Generator().manual_seed(1)).split([args.cali_n, 1])
    return Conditions({CONTEXT: cond}, {CONTEXT: uncond} if args.scale != 1 else None, args.scale)


def recipe_of(args: argparse.Namespace, lane: int) -> Recipe:
    """Smoothing, bias correction, and noise correction with an interval that makes an estimate in the first step."""
    return Recipe(
        quant=QuantConfig(args.weight_bit, args.act_bit, weight_range=args.weight_range),
        smoothing=SmoothingConfig(),
        correction=None if args.no_sample_reverse else CorrectionConfig(interval=2),
        calibration=CalibrationConfig(args.cali_n, args.cali_st, lane),
    )


def quantize_and_save(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """For a separate process: from random weights to the quantized checkpoint. Returns the figures."""
    from qncd.models.loading import state_dict_hash
    from qncd.ptq.checkpoint import save_quantized
    from qncd.ptq.pipeline import quantize_network, sample_calibration
    from qncd.ptq.runs import DiffusionRuns

    phase, baseline = Phases(), memory("VmRSS")
    with phase("random weights, their SHA-256"):
        diffusion = build(args)
        network = diffusion.network
        base_hash = state_dict_hash(network.module)
    weights = sum(p.numel() * 4 for p in network.module.parameters())
    recipe = recipe_of(args, diffusion.lane)
    runs = DiffusionRuns(diffusion, recipe.calibration, contexts(args, diffusion))
    with phase("calibration set and noise table" if recipe.correction else "calibration set"):
        data, record = sample_calibration(runs, recipe, base_hash)
    with phase(f"quantize to {recipe.quant.label}"):
        outcome = quantize_network(runs, recipe, data, record)
    with phase("save"):
        settings = {"sampler": dataclasses.asdict(diffusion.config)}
        save_quantized(network, path, recipe.quant, base_hash, settings, outcome.record)
    return {"baseline_bytes": baseline, "fp32_bytes": weights, "phases": phase.rows, "state": state_of(network)}


def load_and_sample(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """For a separate process: a fresh base model takes the checkpoint and samples one image. Returns the figures."""
    from qncd.models.loading import state_dict_hash
    from qncd.ptq.checkpoint import load_quantized_
    from qncd.sampling.correctors.registry import corrector_of, kind_of

    phase = Phases()
    with phase("load into a fresh base model"):
        diffusion = build(args)
        info = load_quantized_(diffusion.network, path, state_dict_hash(diffusion.network.module))
    recipe = recipe_of(args, diffusion.lane)
    kind = kind_of(recipe)
    corrector = corrector_of(recipe, info.records[kind.prefix] if kind else None)
    with phase(f"{args.steps} PLMS steps, {args.size}x{args.size}, quantized"):
        diffusion.sample([0], corrector, conditions=contexts(args, diffusion)[:1])  # raises where it is not finite
    return {"phases": phase.rows, "state": state_of(diffusion.network)}


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("size", "steps", "cali_n", "cali_st"))
    if not math.isfinite(args.scale):
        raise ValueError(f"--scale {args.scale}: allowed are finite numbers")
    sampler_of(args)
    recipe_of(args, 1)
    regular_file(find_config(args.config))
    if args.json:
        flags.check_file("--json", args.json, replace=True)
    with scratch_folder() as folder:
        path = folder / "quantized.safetensors"
        first = alone(quantize_and_save, args, path)
        size = path.stat().st_size
        second = alone(load_and_sample, args, path)
    weights, phases = first["fp32_bytes"], first["phases"] | second["phases"]
    if first["state"] != second["state"]:
        raise ValueError("the loaded model is not the one that was saved")
    print(f"float32 weights {weights / GB:.2f} GB; interpreter and libraries alone {first['baseline_bytes'] / GB:.2f} GB")
    for name, row in phases.items():
        row["peak_over_fp32"] = row["peak_bytes"] / weights
        print(f"{name:<38} {row['peak_over_fp32']:7.2f} x the weights")
    worst = max(row["peak_over_fp32"] for row in phases.values())
    print(f"checkpoint {size / GB:.3f} GB, {size / weights:.3f} x the weights; the loaded model holds the saved one's numbers")
    print(f"largest peak {worst:.2f} x the weights, allowed are {LIMIT:g}: {'ok' if worst <= LIMIT else 'TOO MUCH'}")
    if args.json:
        figures = {"size": args.size, "steps": args.steps, "fp32_bytes": weights, "baseline_bytes": first["baseline_bytes"],
                   "checkpoint_over_fp32": size / weights, "largest_peak_over_fp32": worst, "phases": phases}  # fmt: skip
        write_json(args.json, figures)
    if worst > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
