#!/usr/bin/env python3
"""Measure what quantization costs, as ratios against full precision, side by side in one run.

    python scripts/benchmark_speed.py --json speed.json
    python scripts/benchmark_speed.py --parts engines --profile
    python scripts/benchmark_speed.py --parts jobs stable_diffusion
    python scripts/benchmark_speed.py --parts gpu

Parts: "simulation" is fake quantization in PyTorch, calibration and checkpoints; "engines" is one call of the exported
network on ONNX Runtime and OpenVINO against PyTorch, torch.compile and other toolkits (those of `pip install -e '.[peers]'`
where they are installed); "jobs" is whole command lines, from start to last PNG. They use the CIFAR-10-size UNet (35.7 M
parameters, random weights, batch 4) and the bundled models. "stable_diffusion" is one guided call of Stable Diffusion v1's
UNet (860 M parameters, random weights, 64x64 latents, batch 2): 10 minutes, 20 GB of memory, 5 GB of the temporary folder.
"gpu" is the same two networks (batch 64 and 2) on a CUDA device, in PyTorch and in integers.
Times are medians over alternating runs; memory is the growth of the peak resident set over the bare process, one process a
figure.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import benchmark_speed as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
