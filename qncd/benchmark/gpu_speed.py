"""How fast one call of a network is on a GPU: in PyTorch, compiled, and in integers. All take turns in one process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from qncd.benchmark.engine_speed import TIMES, Call, Contest, quantized
from qncd.export.engines import open_triton
from qncd.ptq.calibration import CalibrationSet, call_unet
from qncd.quant.convert import UNet

CALIBRATION_INPUTS = 2


def make_gpu_contest(unet: UNet, x: Tensor, cond: Tensor | None = None) -> Contest:
    """PyTorch in float32 and float16, each as it comes, float16 as a CUDA graph and compiled, and W8A8 in integers.

    Args:
        unet: in full precision, on the GPU; quantized in place.
        x, cond: what a call gets, there; all of it at one time step.
    """
    contest, t = Contest(), torch.full((len(x),), TIMES[1], device=x.device)
    reference: Any = copy.deepcopy(unet)
    half: Any = copy.deepcopy(unet).half().to(memory_format=torch.channels_last)
    half_x, half_cond = x.half().contiguous(memory_format=torch.channels_last), None if cond is None else cond.half()
    contest.calls["torch fp32"] = _finished(lambda: call_unet(reference, x, t, cond))
    contest.calls["torch fp16"] = _finished(lambda: call_unet(half, half_x, t, half_cond))
    contest.calls["torch fp16, CUDA graph"] = _finished(_recorded(lambda: call_unet(half, half_x, t, half_cond)).replay)
    compiled: Any = torch.compile(half, mode="reduce-overhead")
    contest.calls["torch.compile fp16"] = _finished(lambda: call_unet(compiled, half_x, t, half_cond))
    some = None if cond is None else cond[:CALIBRATION_INPUTS]
    steps = torch.tensor(TIMES, device=x.device)[:CALIBRATION_INPUTS]
    quantized(unet, CalibrationSet(x[:CALIBRATION_INPUTS], steps, some))
    for precision in ("fp32", "fp16"):
        engine: Any = open_triton(unet, precision)
        contest.calls[f"triton int8 beside {precision}"] = _finished(functools.partial(call_unet, engine, x, t, cond))
    return contest


def _finished(call: Call) -> Call:
    """The call until the GPU is done with it."""

    def run() -> None:
        with torch.no_grad():
            call()
        torch.cuda.synchronize()

    return run


@torch.no_grad()
def _recorded(call: Call) -> Any:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
