"""Arguments that the training tools share."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from qncd.app import flags
from qncd.app import parser as cli


def make_parser(description: str, config: str) -> argparse.ArgumentParser:
    """A parser with what all of them take; `config` is the help of --config."""
    parser = cli.make_parser(description)
    parser.add_argument("--config", type=Path, required=True, help=config)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is kept on the way and the final weights")
    parser.add_argument("--seed", type=functools.partial(cli.seed, high=2**32 - 1), default=0)
    parser.add_argument("--max_steps", type=int, help="training steps instead of the config's n_iters")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data, and --images, which takes the first ones only."""
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST idx files (default: where Debian puts them)")
    parser.add_argument("--images", type=int, help="train on the first N images only")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for a count that is none, or an output folder that cannot be written."""
    cli.check_counts(args, ("max_steps", "images"))
    flags.check_output_folder("--out", args.out)
