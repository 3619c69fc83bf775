"""The calibrated network itself in integers on a GPU, by kernels written in Triton; there is no exported file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

from qncd.engines.engine import open_engine
from qncd.engines.network import EngineNetwork
from qncd.models.network import Network

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Triton:
    """int8 kernels on a GPU, or in Triton's interpreter."""

    name = "triton"
    file = False
    tokens = True
    precisions = tuple(DTYPES)

    def check(self, precision: str) -> None:
        """Raise ValueError where Triton or a GPU that it compiles for is not there; its interpreter will do."""
        if importlib.util.find_spec("triton") is None:
            raise ValueError("backend triton: the package triton is not there; PyTorch for CUDA on Linux brings it")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend triton: there is no CUDA device")

    def open(self, network: Network, folder: Path | None, *, precision: str, threads: int | None) -> EngineNetwork:
        """The network on its own device; as `qncd.engines.engine.Engine.open`."""
        if network.device.type != "cuda" and torch.cuda.is_available():
            raise ValueError(f"backend triton on --device {network.device}: allowed is cuda")
        from qncd.engines.triton.network import IntegerNetwork

        integers = IntegerNetwork(network, DTYPES[precision])
        return EngineNetwork(network, integers, None, integers.settings, integers.one_step_a_call)


def open_triton(network: Network | nn.Module, precision: str = "fp32") -> EngineNetwork:
    """A calibrated network on its own device in integers, to be called instead of the module, which stays as it is.

    Args:
        precision: of what is not quantized, "fp32" or "fp16".

    Raises:
        ValueError: there is no GPU, or a layer has no integer kernel.
    """
    return open_engine(network, None, Triton.name, precision)
