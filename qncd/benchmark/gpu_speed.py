"""How fast one call of a network is on a GPU: in PyTorch, compiled, and in integers. All take turns in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from qncd.benchmark.engine_speed import TIMES, Call, Contest, quantized, torch_call
from qncd.engines.triton.engine import open_triton
from qncd.engines.triton.network import recorded
from qncd.ptq.calibration import CalibrationSet
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
    in_half = torch_call(half, half_x, t, half_cond)
    contest.calls["torch fp32"] = _finished(torch_call(reference, x, t, cond))
    contest.calls["torch fp16"] = _finished(in_half)
    contest.calls["torch fp16, CUDA graph"] = _finished(recorded(in_half)[0].replay)
    compiled = torch.compile(half, mode="reduce-overhead")
    contest.calls["torch.compile fp16"] = _finished(torch_call(compiled, half_x, t, half_cond))
    some = None if cond is None else cond[:CALIBRATION_INPUTS]
    steps = torch.tensor(TIMES, device=x.device)[:CALIBRATION_INPUTS]
    quantized(unet, CalibrationSet(x[:CALIBRATION_INPUTS], steps, some))
    for precision in ("fp32", "fp16"):
        engine = open_triton(unet, precision)
        contest.calls[f"triton int8 beside {precision}"] = _finished(torch_call(engine, x, t, cond))
    return contest


def _finished(call: Call) -> Call:
    """The call until the GPU is done with it."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
