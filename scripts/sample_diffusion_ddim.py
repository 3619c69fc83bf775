#!/usr/bin/env python3
"""Sample a DDIM model, in full precision or quantized after training (--ptq), and write the images.

    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --timesteps 50 -l out/fp
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --timesteps 50 -l out/w4a8 \\
        --ptq --weight_bit 4 --quant_mode qncd+ --compare_fp

The output folder holds images/ (named by index and seed), contact_sheet.png and run.json; the same command line goes
on with a run that was cut off.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import sample_ddim as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
