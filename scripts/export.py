#!/usr/bin/env python3
"""Export a quantized network as an ONNX model that computes in integers.

    python scripts/export.py --config configs/fashion_mnist.yml --cali_ckpt out/w8a8.safetensors --out out/onnx

The quantized checkpoint is what the sampling scripts write with --ptq --cali_ckpt. OUT/model.onnx is in QDQ form: int8
weights (INT4 at 4 bits and fewer), uint8 activations with the calibrated scales and zero points, embedding and time step
inside, any batch size. ONNX Runtime and OpenVINO run it, and the sampling scripts do with --backend and --onnx OUT. Without
--cali_ckpt the full-precision network is exported.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import export as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
