#!/usr/bin/env python3
"""FID, sFID, inception score and paired PSNR of synthetic images against real ones.

    python evaluator.py REAL SYNTH
    python evaluator.py fashion_mnist samples/ --features fashion_mnist
    python evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz --device cuda --json scores.json

REAL and SYNTH are folders of images (any depth), ADM's .npz files of images (arr_0) or statistics (mu, sigma), or the name
fashion_mnist: the statistics of its training images, in the box. Folders with the same file names also give PSNR and MSE.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qncd.cli import run_main

# The names of qncd.metrics.features.EXTRACTORS, repeated because that module takes seconds to import; a test compares them.
FEATURES = ("inception", "fashion_mnist")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", metavar="REAL", help="reference images or statistics")
    parser.add_argument("synth", metavar="SYNTH", help="images to judge")
    parser.add_argument("--features", choices=FEATURES, default="inception", help="network (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="weights of the network (default: torch hub's cache, then a download)")
    parser.add_argument("--batch_size", type=int, default=50, help="images in the network at once (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--is_splits", type=int, default=10, help="splits of the inception score (default: %(default)s)")
    parser.add_argument("--precision_recall", action="store_true", help="also precision and recall with 3 neighbours")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON too; - prints it instead of the text")
    parser.add_argument("--save_statistics", type=Path, metavar="FILE", help="save REAL's statistics (.npz) to use as REAL later")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    for name in ("batch_size", "is_splits"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: has to be at least 1")
    return args


def _check_output(path: Path, option: str) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: not a file in a folder that exists")


def _show_progress(label: str, done: int, total: int) -> None:
    print(f"\r{label}: {done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    if args.json not in (None, "-"):
        _check_output(Path(args.json), "--json")
    if args.save_statistics is not None:
        _check_output(args.save_statistics, "--save_statistics")
    import torch

    from qncd.metrics.evaluate import check_sources, evaluate
    from qncd.metrics.features import EXTRACTORS
    from qncd.metrics.sources import open_source

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    real, synth = open_source(args.real), open_source(args.synth, prefer_images=True)
    check_sources(real, synth, args.features)
    result = evaluate(
        real,
        synth,
        EXTRACTORS[args.features](args.weights, device),
        batch_size=args.batch_size,
        is_splits=args.is_splits,
        with_precision_recall=args.precision_recall,
        save_statistics=args.save_statistics,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    text = json.dumps({"real": args.real, "synth": args.synth, **result.to_json()}, indent=2)
    if args.json == "-":
        print(text)
        return
    print("\n".join(result.lines()))
    if args.json is not None:
        Path(args.json).write_text(text + "\n")


def main(argv: list[str] | None = None) -> None:
    run_main(run, parse_args(argv))


if __name__ == "__main__":
    main()
