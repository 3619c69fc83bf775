#!/usr/bin/env python3
"""Figures of synthetic images against real ones, each printed with the convention that it belongs to.

    python evaluator.py REAL SYNTH
    python evaluator.py fashion_mnist samples/ --features fashion_mnist
    python evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz --device cuda --json scores.json
    python evaluator.py coco/ out/images --convention pytorch-fid --metrics fid clip_score
    python evaluator.py out/fp out/images --compare other/images --bootstrap 1000

REAL and SYNTH are folders of images (any depth), ADM's .npz files of images (arr_0), statistics (mu, sigma) of ADM or
pytorch-fid, or the name of a data set: with --features fashion_mnist, the name fashion_mnist means the bundled statistics
of its training images. REAL may be - where only CLIP metrics are wanted. Folders with the same file names also give
PSNR, SSIM and MSE. Without --metrics, those that the convention's own package reports are computed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import evaluate as command
from qncd.app.parser import run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run_main(command.main, parse_args(argv))


if __name__ == "__main__":
    main()
