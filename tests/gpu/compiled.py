"""Compile every kernel that a call of a small network starts, for a GPU that need not be there.

    python compiled.py TARGET KIND ...

TARGET is a compute capability, such as 90. Nothing is computed: what the kernels leave is whatever was in memory. A process of
its own, for Triton is imported without its interpreter.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

import torch
from quantized_networks import called_pipeline
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qncd.engines.triton.network import IntegerNetwork


class Absent:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main(target: int, *kinds: str) -> None:
    counts: collections.Counter[str] = collections.Counter()
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        return kernel

    JITFunction.run = compiled
    driver.set_active(Absent(target))
    for kind in kinds:
        counts.clear()
        _, network, call = called_pipeline(kind, "W8A8", "linear")
        shared = {name: value for name, value in call.constants.items() if isinstance(value, torch.Tensor)}
        given = network.trimmed({network.sample_name: call.x, network.time_name: call.t, **call.inputs, **shared})
        for dtype in (torch.float32, torch.float16):
            IntegerNetwork(network, dtype)(given)
        if kind == kinds[0]:
            _, network, _ = called_pipeline(kind, "W8A8", "linear", act_granularity="token", quantize_attention=False)
            IntegerNetwork(network)(given)
        print(kind, *sorted(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
