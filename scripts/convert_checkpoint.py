#!/usr/bin/env python3
"""Convert an original checkpoint (DDIM, latent-diffusion, Stable Diffusion v1) to a folder that diffusers loads.

    python scripts/convert_checkpoint.py --config configs/sd-v1-inference.yaml --ckpt sd-v1-4.ckpt --out models/sd-v1-4

The folder appears whole or not at all. An existing one is replaced only if this command made it. Weights become float32.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import convert as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
