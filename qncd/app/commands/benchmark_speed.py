"""Measure what quantization costs, as ratios against full precision, side by side in one run.

    qncd benchmark speed --json speed.json
    qncd benchmark speed --parts engines --profile
    qncd benchmark speed --parts jobs stable_diffusion
    qncd benchmark speed --parts gpu

Parts: "simulation" is fake quantization in PyTorch, calibration and checkpoints; "engines" is one call of the exported
network on ONNX Runtime and OpenVINO against PyTorch, torch.compile and other toolkits (those of `pip install -e '.[peers]'`
where they are installed); "jobs" is whole command lines, from start to last PNG. They use the CIFAR-10-size UNet (35.7 M
parameters, random weights, batch 4) and the bundled models. "stable_diffusion" is one guided call of Stable Diffusion v1's
UNet (860 M parameters, random weights, 64x64 latents, batch 2): 10 minutes, 20 GB of memory, 5 GB of the temporary folder;
"transformer" is the same of DiT-XL/2 (675 M parameters, 32x32 latents).
"gpu" is the same two networks (batch 64 and 2) on a CUDA device, in PyTorch and in integers.
Times are medians over alternating runs; memory is the growth of the peak resident set over the bare process, one process a
figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import write_json

LARGE = ("stable_diffusion", "transformer")
PARTS = ("simulation", "engines", "jobs", *LARGE, "gpu")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("--rounds", type=int, default=9, help="alternating runs of each side (default 9)")
    parser.add_argument("--calibration_samples", type=int, default=256)
    parser.add_argument("--job_rounds", type=int, default=3, help="the same of whole jobs (default 3)")
    parser.add_argument(
        "--job_images",
        type=int,
        default=32,
        help="images of a whole job (default 32); its start takes the same time for any number",
    )
    parser.add_argument("--large_rounds", type=int, default=3, help=f"the same of {' and '.join(LARGE)} (default 3)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2], help=f"default {' '.join(PARTS[:2])}")
    parser.add_argument("--profile", action="store_true", help="what OpenVINO spends an int8 call on, by kind of operator")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("rounds", "job_rounds", "large_rounds", "job_images", "calibration_samples", "threads"))
    if args.json:
        flags.check_file("--json", args.json, replace=True)
    import torch

    from qncd.benchmark import speed

    if set(args.parts) - {"simulation", "gpu"}:
        from qncd.engines.engine import check_engine

        for engine in ("onnxruntime", "openvino"):
            check_engine(engine)
    if "gpu" in args.parts and not torch.cuda.is_available():
        raise ValueError("--parts gpu: there is no CUDA device; allowed here are " + ", ".join(PARTS[:-1]))
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
    }
    if "simulation" in args.parts:
        figures |= speed.measure_simulation(args.rounds, args.calibration_samples, args.threads)
    if "engines" in args.parts:
        figures |= speed.measure_engines(args.rounds, torch.get_num_threads(), args.profile)
    if "jobs" in args.parts:
        figures |= speed.measure_jobs(args.job_rounds, args.job_images)
    for kind in LARGE:
        if kind in args.parts:
            from qncd.benchmark.large_speed import measure_large

            found = measure_large(kind, args.large_rounds, torch.get_num_threads())
            speed.print_figures(found)
            figures |= found
    if "gpu" in args.parts:
        figures |= speed.measure_gpu(args.rounds)
    if args.json:
        write_json(args.json, figures)
