#!/usr/bin/env python3
"""Count the kernels that one call of a bundled transformer starts in integers on Triton, without a GPU: in its interpreter.

    python tools/count_kernels.py --config configs/scenes_mmdit.yaml
    python tools/count_kernels.py --config configs/fashion_mnist_dit.yaml --mode qncd+ --width W4A8

What torch computes between the package's own kernels counts too, but for views and memory. Where a call is small, most of its
time is the start of kernels, recorded as a CUDA graph or not.
"""

from __future__ import annotations

import argparse
import collections
import os
from collections.abc import Sequence
from typing import Any

from qncd.app import parser as cli

INPUTS = {"StableDiffusion3Pipeline": {"prompt": "a large red circle above a small blue square"}}
FREE = ("empty", "empty_strided", "new_empty", "new_empty_strided", "view", "_unsafe_view", "detach", "promote_types")


class Counted:
    """A kernel of Triton that counts how often it is started."""

    def __init__(self, name: str, kernel: Any, counts: collections.Counter[str]) -> None:
        self.name, self.kernel, self.counts = name, kernel, counts

    def __getitem__(self, grid: Any) -> Any:
        from torch.utils._python_dispatch import _disable_current_modes

        def start(*args: Any, **kwargs: Any) -> None:
            self.counts[self.name] += 1
            with _disable_current_modes():  # what the interpreter itself computes
                self.kernel[grid](*args, **kwargs)

        return start


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--config", required=True, help="yaml of a bundled transformer")
    parser.add_argument("--width", default="W8A8", help="as qncd.quantize has it (default W8A8)")
    parser.add_argument("--mode", default="linear", help="as qncd.quantize has it (default linear)")
    return parser.parse_args(argv)


def count(args: argparse.Namespace) -> collections.Counter[str]:
    """Kernels by name."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import qncd
    from qncd.engines.triton import triton_kernels
    from qncd.engines.triton.engine import open_triton
    from qncd.models.network import network_of
    from qncd.sampling.pipeline import denoiser_of

    counts: collections.Counter[str] = collections.Counter()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("aten::")
            views = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
            if not views and name not in FREE:
                counts[name] += 1
            return func(*args, **(kwargs or {}))

    pipe = qncd.load(args.config)
    inputs = INPUTS.get(type(pipe).__name__, {"class_labels": [1]})
    qncd.quantize(pipe, args.width, mode=args.mode, calls=[inputs] * 2, steps=2)
    network, calls = network_of(denoiser_of(pipe)[1]), []
    network.module.register_forward_pre_hook(lambda _, given, named: calls.append(network.bind(given, named)), with_kwargs=True)
    pipe(**inputs, num_inference_steps=2, output_type="latent")
    engine, call = network_of(open_triton(network.module)), calls[0]
    for name in [name for name in vars(triton_kernels) if name.endswith("_kernel")]:
        setattr(triton_kernels, name, Counted(name, getattr(triton_kernels, name), counts))
    with torch.no_grad(), Operations():
        engine.call(call.x, call.t, call.inputs, **call.constants)
    return counts


def main(args: argparse.Namespace) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    counts = count(args)
    own = sum(number for name, number in counts.items() if name.endswith("_kernel"))
    print(f"{sum(counts.values())} kernels, {own} of them the package's own")
    for name, number in counts.most_common():
        print(f"{number:6} {name}")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
