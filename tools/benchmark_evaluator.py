#!/usr/bin/env python3
"""Time and memory of the evaluator against torch-fidelity and pytorch-fid, on the same images and random weights.

    python tools/benchmark_evaluator.py --json evaluator_speed.json

Each measurement is a process of its own, so that its peak memory is its own; the programs take turns. Ratios are of medians
within this run; below 1 means that the evaluator needs less. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("qncd", "torch-fidelity", "pytorch-fid")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--small", type=int, default=1000, help="images of 32x32 on each side (default: %(default)s)")
    parser.add_argument("--large", type=int, default=200, help="images of 512x512 on each side (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--dimension", type=int, default=2048, help="of the Frechet distance alone (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--worker", nargs=4, metavar=("PROGRAM", "REAL", "SYNTH", "WEIGHTS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_images(folder: Path, count: int, size: int, seed: int) -> None:
    """PNG files of blurred noise, which compress about as pictures do."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (size // 4, size // 4, 3), np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")


def make_weights(path: Path) -> None:
    """Random weights of Inception that keep its activations in range, under the names of the published file."""
    import torch
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)


def worker(program: str, real: str, synth: str, weights: str, threads: int) -> None:
    """One program once, from images to FID; prints seconds, peak memory in MB and the figure as JSON."""
    import resource

    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    if program == "qncd":
        from qncd.metrics.networks.features import InceptionFeatures
        from qncd.metrics.report.conventions import CONVENTIONS
        from qncd.metrics.report.evaluate import Evaluator, Settings
        from qncd.metrics.report.sources import open_source

        extractor = InceptionFeatures(Path(weights), convention=CONVENTIONS["torch-fidelity"])
        result = Evaluator(open_source(real), extractor, Settings(("fid",))).judge(open_source(synth))
        figure = result.scores[0].value if result is not None else None
    elif program == "torch-fidelity":
        import torch_fidelity

        figure = torch_fidelity.calculate_metrics(
            input1=synth, input2=real, fid=True, cuda=False, cache=False, verbose=False, batch_size=50,
            feature_extractor_weights_path=weights,
        )["frechet_inception_distance"]  # fmt: skip
    else:
        import scipy.linalg
        from pytorch_fid import fid_score, inception

        inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        root = scipy.linalg.sqrtm  # since scipy 1.17 without the argument that pytorch-fid gives it
        scipy.linalg.sqrtm = lambda matrix, disp=True: root(matrix) if disp else (root(matrix), 0.0)
        figure = float(
            fid_score.calculate_fid_given_paths([real, synth], 50, "cpu", 2048, min(8, os.cpu_count() or 1))
        )  # its default
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "fid": figure}))


def measure(program: str, folders: list[Path], weights: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads), "--worker", program, *map(str, folders), str(weights)]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{program}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def end_to_end(title: str, folders: list[Path], weights: Path, runs: int, threads: int) -> dict[str, object]:
    """Every program `runs` times, in turn."""
    found: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    for _ in range(runs):
        for program in PROGRAMS:
            found[program].append(measure(program, folders, weights, threads))
            print(f"{title}, {program}: {found[program][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    median = {
        program: {key: statistics.median(run[key] for run in results) for key in ("seconds", "peak_mb", "fid")}
        for program, results in found.items()
    }
    fastest = min(median[program]["seconds"] for program in PROGRAMS[1:])
    return {
        "median": median,
        "seconds_over_fastest": median["qncd"]["seconds"] / fastest,
        "peak_over_least": median["qncd"]["peak_mb"] / min(median[program]["peak_mb"] for program in PROGRAMS[1:]),
    }


def frechet_alone(dimension: int, runs: int) -> dict[str, float]:
    """The distance of two regular covariances against scipy's square root of a general matrix."""
    import numpy as np
    import scipy.linalg

    from qncd.metrics.statistics.moments import FeatureStatistics, frechet_distance

    rng = np.random.default_rng(0)
    scale = np.exp(-np.arange(dimension) / (dimension / 6))
    sides = []
    for _ in range(2):
        rows = rng.normal(size=(dimension + dimension // 2, dimension)) * scale
        sides.append(FeatureStatistics(rows.mean(0), np.cov(rows, rowvar=False), len(rows)))
    a, b = sides
    ours, theirs, values = [], [], []
    for _ in range(runs):
        start = time.perf_counter()
        value = frechet_distance(a, b)
        middle = time.perf_counter()
        root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
        theirs.append(time.perf_counter() - middle)
        ours.append(middle - start)
        difference = a.mu - b.mu
        expected = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root).real
        values.append(abs(value - expected) / expected)
    return {
        "dimension": dimension,
        "seconds": statistics.median(ours),
        "seconds_sqrtm": statistics.median(theirs),
        "speedup": statistics.median(theirs) / statistics.median(ours),
        "relative_error": max(values),
    }


def run(args: argparse.Namespace) -> None:
    for name, least in (("small", 0), ("large", 0), ("runs", 1), ("dimension", 2), ("threads", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: has to be at least {least}")
    if args.json is not None:
        flags.check_file("--json", args.json, replace=True)
    if args.worker:
        worker(*args.worker, threads=args.threads)
        return
    report: dict[str, object] = {"threads": args.threads, "runs": args.runs, "small": args.small, "large": args.large}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        make_weights(weights)
        for title, count, size in (("32x32", args.small, 32), ("512x512", args.large, 512)):
            if count < 2:
                continue
            folders = [Path(folder) / title / side for side in ("real", "synth")]
            for seed, path in enumerate(folders):
                make_images(path, count, size, seed)
            report[title] = end_to_end(title, folders, weights, args.runs, args.threads)
            if title == "32x32" and count >= 8:  # memory: the same images four times over against a quarter of them
                few = [path.with_name(f"{path.name}_few") for path in folders]
                for path, quarter in zip(folders, few, strict=True):
                    quarter.mkdir()
                    for image in sorted(path.iterdir())[: count // 4]:
                        (quarter / image.name).hardlink_to(image)
                peaks = [measure("qncd", pair, weights, args.threads)["peak_mb"] for pair in (few, folders)]
                report["memory"] = {"images": [count // 4, count], "peak_mb": peaks, "growth": peaks[1] / peaks[0]}
    report["frechet"] = frechet_alone(args.dimension, args.runs)
    text = json.dumps(report, indent=2)
    print(text)
    if args.json is not None:
        write_text(args.json, text + "\n")


def main(argv: list[str] | None = None) -> None:
    cli.run_main(run, parse_args(argv))


if __name__ == "__main__":
    main()
