#!/usr/bin/env python3
"""Measure what quantization costs, as ratios against full precision, side by side in one run.

    python scripts/benchmark_speed.py --json speed.json

Uses the CIFAR-10-size UNet (35.7 M parameters, random weights, batch 4) and the model in the box (batch 64). Times are
medians over alternating runs; memory is the growth of the peak resident set over the bare process, one process a figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qncd import cli

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION_BATCH = 32


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=9, help="alternating runs of each side (default 9)")
    parser.add_argument("--calibration_samples", type=int, default=256)
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def _cifar_unet() -> Any:
    import torch

    from qncd.models.ddim import build_ddim_unet
    from qncd.models.loading import load_config

    torch.manual_seed(0)
    return build_ddim_unet(load_config(ROOT / "configs" / "cifar10.yml")).eval().requires_grad_(False)


def _box_unet() -> Any:
    from qncd.models.loading import load_config, load_ddim

    return load_ddim(load_config(ROOT / "configs" / "fashion_mnist.yml"))


def _inputs(unet: Any, count: int) -> Any:
    import torch

    from qncd.ptq.calibration import CalibrationSet

    generator = torch.Generator().manual_seed(1)
    shape = (count, unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"])
    times = torch.randint(0, 1000, (count,), generator=generator)
    return CalibrationSet(torch.randn(shape, generator=generator), times)


def _quantized(unet: Any, bits: int = 8) -> Any:
    """W`bits`A8 with every part of the method that a step pays for: smoothing, split, attention."""
    from qncd.config import QuantConfig
    from qncd.ptq.calibration import calibrate_
    from qncd.ptq.smoothing import smooth_, smoothing_factors
    from qncd.quant.convert import quantize_

    config = QuantConfig(weight_bits=bits, weight_range="max", act_range="max")
    factors = smoothing_factors(unet, range(0, 1000, 10))
    quantize_(unet, config)
    smooth_(unet, factors)
    calibrate_(unet, _inputs(unet, 8), 8)
    return unet, config


def _ratio(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median of the ratios of alternating runs first/second, and both median times in seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(-1, rounds):  # one warm-up
        for side, function in enumerate((first, second)):
            start = time.perf_counter()
            function()
            if round_ >= 0:
                times[side].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return ratio, statistics.median(times[0]), statistics.median(times[1])


def step_cost(make: Callable[[], Any], batch: int, rounds: int) -> tuple[float, float, float]:
    """A fake-quantized W8A8 step over a full-precision one."""
    import torch

    from qncd.ptq.calibration import call_unet

    plain, (quantized, _) = make(), _quantized(make())
    data = _inputs(plain, batch)
    with torch.no_grad():
        return _ratio(lambda: call_unet(quantized, data.x, data.t), lambda: call_unet(plain, data.x, data.t), rounds)


def calibration_run(kind: str, samples: int, threads: int | None, queue: Any) -> None:
    """In a process of its own: a full-precision pass ("fp") or a calibration; puts seconds and MiB of peak growth."""
    import torch

    from qncd.config import QuantConfig
    from qncd.ptq.calibration import calibrate_, call_unet, correct_biases_
    from qncd.quant.convert import quantize_

    if threads:
        torch.set_num_threads(threads)
    unet = _cifar_unet()
    data = _inputs(unet, samples)
    with torch.no_grad():
        call_unet(unet, data.x[:1], data.t[:1])  # kernels are chosen on first use
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "fp":
        start = time.perf_counter()
        with torch.no_grad():
            for x, t, _ in data.batches(CALIBRATION_BATCH):
                call_unet(unet, x, t)
        seconds = time.perf_counter() - start
    else:
        quantize_(unet, QuantConfig(weight_bits=8, act_bits=8, weight_range="mse", act_range="mse"))
        seconds = calibrate_(unet, data, CALIBRATION_BATCH, correct=correct_biases_)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.numel() * p.element_size() for p in unet.parameters()) / 1024
    # The weights belong to both sides; what was there before them (the interpreter, libraries) to neither.
    queue.put((seconds, (peak - bare + weights) / 1024))


def calibration_cost(samples: int, threads: int | None) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of peak growth of a full-precision pass and of calibrating on the same samples."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for kind in ("fp", "calibration"):
        queue = context.Queue()
        process = context.Process(target=calibration_run, args=(kind, samples, threads, queue))
        process.start()
        results[kind] = queue.get()
        process.join()
    return results


def checkpoint_size(bits: int) -> float:
    """Bytes of the quantized checkpoint over bytes of the same weights in float32 safetensors."""
    from safetensors.torch import save_file

    from qncd.ptq.checkpoint import save_quantized

    with tempfile.TemporaryDirectory() as folder:
        full, small = Path(folder) / "fp32.safetensors", Path(folder) / "quantized.safetensors"
        unet = _cifar_unet()
        save_file(unet.state_dict(), full)
        unet, config = _quantized(unet, bits)
        save_quantized(unet, small, config, "", None, {})
        return small.stat().st_size / full.stat().st_size


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("rounds", "calibration_samples", "threads"))
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, float | int | str] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
    }
    for key, make, batch in (("fake_quant_over_fp", _cifar_unet, 4), ("fake_quant_over_fp_box", _box_unet, 64)):
        ratio, quantized, plain = step_cost(make, batch, args.rounds)
        figures[key] = ratio
        print(f"{key} {ratio:.3f}   ({quantized * 1e3:.0f} ms against {plain * 1e3:.0f} ms, batch {batch})", flush=True)
    cost = calibration_cost(args.calibration_samples, args.threads)
    figures["calibration_over_fp_pass"] = cost["calibration"][0] / cost["fp"][0]
    figures["calibration_peak_over_fp"] = cost["calibration"][1] / cost["fp"][1]
    seconds = " against ".join(f"{cost[k][0]:.1f} s" for k in ("calibration", "fp"))
    memory = " against ".join(f"{cost[k][1]:.0f} MiB" for k in ("calibration", "fp"))
    print(f"calibration_over_fp_pass {figures['calibration_over_fp_pass']:.2f}   ({seconds}, {args.calibration_samples} samples)")
    print(f"calibration_peak_over_fp {figures['calibration_peak_over_fp']:.2f}   ({memory})", flush=True)
    for bits in (8, 4):
        figures[f"checkpoint_w{bits}_over_fp32"] = checkpoint_size(bits)
        print(f"checkpoint_w{bits}_over_fp32 {figures[f'checkpoint_w{bits}_over_fp32']:.4f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
