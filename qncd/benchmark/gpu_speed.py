"""How fast one call of a network is on a GPU: in PyTorch, compiled, and in integers. All take turns in one process."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from qncd.benchmark.engine_speed import TIMES, Call, Contest, quantized, torch_call
from qncd.benchmark.peers import around
from qncd.engines.triton.engine import open_triton
from qncd.engines.triton.network import recorded
from qncd.models.calls import Inputs
from qncd.models.network import Network, network_of
from qncd.ptq.context import copied
from qncd.ptq.data import CalibrationSet

CALIBRATION_INPUTS = 2


def make_gpu_contest(network: Network, x: Tensor, inputs: Inputs | None = None) -> Contest:
    """PyTorch in float32 and float16, each as it comes, float16 as a CUDA graph and compiled, and W8A8 in integers.

    Args:
        network: in full precision, on the GPU; quantized in place.
        x, inputs: what a call gets, there; all of it at one time step.
    """
    inputs = inputs or {}
    contest, t = Contest(), torch.full((len(x),), TIMES[1], device=x.device)
    reference, module = copied(network), copy.deepcopy(network.module)
    half: Any = module.half().to(memory_format=torch.channels_last)
    half_x = x.half().contiguous(memory_format=torch.channels_last)
    half_inputs = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    in_half = torch_call(around(network, half), half_x, t, half_inputs)
    contest.calls["torch fp32"] = _finished(torch_call(reference, x, t, inputs))
    contest.calls["torch fp16"] = _finished(in_half)
    contest.calls["torch fp16, CUDA graph"] = _finished(recorded(in_half)[0].replay)
    compiled = around(network, cast(nn.Module, torch.compile(half, mode="reduce-overhead")))
    contest.calls["torch.compile fp16"] = _finished(torch_call(compiled, half_x, t, half_inputs))
    some = {name: value[:CALIBRATION_INPUTS] for name, value in inputs.items()}
    steps = torch.tensor(TIMES, device=x.device)[:CALIBRATION_INPUTS]
    quantized(network, CalibrationSet(x[:CALIBRATION_INPUTS], steps, some))
    for precision in ("fp32", "fp16"):
        engine = network_of(open_triton(network, precision))
        contest.calls[f"triton int8 beside {precision}"] = _finished(torch_call(engine, x, t, inputs))
    return contest


def _finished(call: Call) -> Call:
    """The call until the GPU is done with it."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
