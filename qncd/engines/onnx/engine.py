"""What engines share that run the exported ONNX model: a subclass says how a session of its runtime is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from qncd.engines.network import EngineNetwork, InputSpec, Session
from qncd.engines.onnx.model import FILE, input_specs, read_onnx
from qncd.engines.packages import require
from qncd.models.network import Network

Arrays = dict[str, np.ndarray]
ArraySession = Callable[[Arrays], np.ndarray]  # named inputs -> the network's output


class OnnxEngine(ABC):
    """Runs DIR/model.onnx with arrays on the CPU.

    Attributes:
        packages: that the engine needs beside those which read the model.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    file: bool = True
    tokens: bool = False
    precisions: tuple[str, ...] = ("fp32",)

    @abstractmethod
    def session(self, folder: Path, threads: int, precision: str = "fp32") -> ArraySession:
        """The runtime on DIR/model.onnx, which computes in one of `precisions` what is not quantized.

        What it raises is reported in one line.
        """

    def check(self, precision: str) -> None:
        """Raise ValueError where a package is not there."""
        for package in ("onnx", "onnxscript", *self.packages):
            require(package)

    def refusal(self, folder: Path, error: Exception) -> ValueError:
        """What a runtime says against DIR/model.onnx, in one line."""
        return ValueError(f"{folder / FILE}: {self.name} refuses it: {' '.join(str(error).split())[:300]}")

    def open(self, network: Network, folder: Path | None, *, precision: str, threads: int | None) -> EngineNetwork:
        """The model of a folder in the place of `network`; as `qncd.engines.engine.Engine.open`."""
        if folder is None:
            raise ValueError(f"backend {self.name} needs the folder of an exported model")
        model, info = read_onnx(folder)
        specs: dict[str, InputSpec] = input_specs(model)
        try:
            session = self.session(folder, threads or torch.get_num_threads(), precision)
        except Exception as error:  # the runtimes' exceptions have no common base
            raise self.refusal(folder, error) from error
        return EngineNetwork(network, on_tensors(session), specs, info.call_settings, info.one_step_a_call)


def on_tensors(session: ArraySession) -> Session:
    """A session that takes arrays on the CPU, called with tensors on any device."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: value.cpu().contiguous().numpy() for name, value in inputs.items()}
        return torch.from_numpy(session(arrays)).to(next(iter(inputs.values())).device)

    return run
