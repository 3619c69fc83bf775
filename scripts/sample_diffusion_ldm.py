#!/usr/bin/env python3
"""Sample a latent diffusion model, class-conditional or not, in full precision or quantized (--ptq).

    python scripts/sample_diffusion_ldm.py -n 40 -e 0 -c 20 -l out/ldm
    python scripts/sample_diffusion_ldm.py -n 40 -e 0 -c 20 -l out/ldm_w4a8 --ptq --weight_bit 4 --quant_mode qncd+ --compare_fp
    python scripts/sample_diffusion_ldm.py -r models/ldm/lsun_beds256/model.ckpt -n 8 -e 1 -c 200 -l out/beds

Without -r and --config it samples the bundled class-conditional model (configs/fashion_mnist_ldm.yaml). The output
folder holds images/ (named by index and seed), labels.csv, contact_sheet.png and run.json; the same command line goes
on with a run that was cut off.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import sample_ldm as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
