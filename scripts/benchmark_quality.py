#!/usr/bin/env python3
"""Measure what quantization costs a bundled model, and what each part of QNCD gives back.

    python scripts/benchmark_quality.py --out runs/quality
    python scripts/benchmark_quality.py --out runs/quality --widths W4A8 --modes linear qncd --seeds 1
    python scripts/benchmark_quality.py --config configs/scenes.yaml --sample_type plms --out runs/quality_scenes

Rows: full precision, and every mode at every width, each with several calibration seeds. Finished cells are kept in
OUT/cells: the same command goes on with a run that was cut off. Results: OUT/quality.md, quality.json and quality.png.
Other toolkits (modelopt-int8, modelopt-smoothquant, nncf, quanto, torchao) are modes too, with `pip install -e '.[peers]'`;
widths that one cannot do are left out.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import benchmark_quality as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
