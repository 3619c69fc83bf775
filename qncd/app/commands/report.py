"""One HTML file about quantized runs: settings, what each layer got, figures, and pictures to flip between.

    qncd report out/w4a8 --out report.html
    qncd report out/w4a8 out/w4a6 out/linear --out report.html
    qncd report runs/quality --out quality.html --pareto pareto.svg

RUN is a folder of `qncd sample` (with --compare_fp it holds the images to compare with), of `qncd benchmark quality`, or one that
`qncd inspect --out` has filled. Several of them stand side by side. The file needs no network and no other file.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from qncd.app import flags, messages
from qncd.app import parser as cli

PICTURES = (".png", ".svg")


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a sampling run, of a quality benchmark or of `qncd inspect`"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the report (default report.html)")
    parser.add_argument(
        "--pareto",
        type=Path,
        metavar="FILE",
        help="also write a benchmark's quality against size and speed, FILE.png or FILE.svg",
    )
    return parser


def command_line(args: argparse.Namespace) -> str:
    """What makes this report again."""
    pareto = ["--pareto", str(args.pareto)] if args.pareto else []
    return shlex.join(["qncd", "report", *map(str, args.runs), "--out", str(args.out), *pareto])


def main(args: argparse.Namespace) -> None:
    messages.show("info")
    flags.check_file("--out", args.out, replace=True)
    if args.pareto is not None:
        if args.pareto.suffix.lower() not in PICTURES:
            raise ValueError(f"--pareto {args.pareto}: allowed are names that end in {' or '.join(PICTURES)}")
        flags.check_file("--pareto", args.pareto, replace=True)

    from qncd.benchmark.plots import pareto_figure, save_figure
    from qncd.report.folders import open_folders
    from qncd.report.page import write_report
    from qncd.report.sections import Report

    runs, benchmarks, models = open_folders(args.runs)
    if args.pareto is not None:
        if len(benchmarks) != 1:
            raise ValueError(f"--pareto {args.pareto}: {len(benchmarks)} of the folders are quality benchmarks: name one")
        figure = pareto_figure(benchmarks[0].rows)
        if figure is None:
            raise ValueError(f"--pareto {args.pareto}: {benchmarks[0].folder} has neither sizes of files nor speeds of engines")
        save_figure(figure, args.pareto)
    write_report(Report(runs, benchmarks, models), args.out, command_line(args))
