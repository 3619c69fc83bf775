"""Engines that run an exported network, called as the UNet itself is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.export.onnx_model import FILE, read_onnx
from qncd.export.openvino_graph import read_network
from qncd.export.packages import check_backend, require
from qncd.quant.convert import UNet

Arrays = dict[str, np.ndarray]
Session = Callable[[Arrays], np.ndarray]  # named inputs -> noise


@dataclass(frozen=True)
class EngineOutput:
    """What a UNet of diffusers returns: `sample` (N, C, H, W)."""

    sample: Tensor


class EngineUNet:
    """A network on an engine, in place of the UNet that it was exported from.

    Attributes:
        config: of that UNet.
        device: on which inputs come and outputs go; the engine itself works on the CPU.
        one_step_a_call: inputs of several time steps go to the engine step by step.
    """

    def __init__(self, unet: UNet, session: Session, backend: str, one_step_a_call: bool = False) -> None:
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
        self.session, self.backend, self.one_step_a_call = session, backend, one_step_a_call

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> EngineOutput:
        """(N, C, H, W), (N,) or a number, the network's condition -> `.sample` (N, C, H, W)."""
        steps = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        inputs = {"sample": sample.float(), "timestep": steps.long()}
        inputs |= {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states.float()}
        inputs |= {} if class_labels is None else {"class_labels": class_labels.long()}
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        times = np.unique(arrays["timestep"]) if self.one_step_a_call else np.empty(1)
        if len(times) == 1:
            return EngineOutput(torch.from_numpy(self.session(arrays)).to(self.device))
        order = [np.flatnonzero(arrays["timestep"] == time) for time in times]
        parts = [self.session({name: value[rows] for name, value in arrays.items()}) for rows in order]
        noise = np.concatenate(parts)[np.argsort(np.concatenate(order))]
        return EngineOutput(torch.from_numpy(noise).to(self.device))


def onnxruntime_session(folder: Path, threads: int, tensorrt: bool = False) -> Session:
    """ONNX Runtime on DIR/model.onnx: the CPU's integer kernels, or TensorRT, which takes QDQ as it is."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    if tensorrt:
        providers = [
            p for p in ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
            if p in runtime.get_available_providers()
        ]  # fmt: skip
        session = runtime.InferenceSession(str(folder / FILE), options, providers=providers)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            path = integer_model(folder, Path(scratch))
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["noise"], inputs)[0]


def integer_model(folder: Path, scratch: Path) -> Path:
    """DIR/model.onnx rewritten for ONNX Runtime's integer kernels, as a file in `scratch`."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from qncd.export.integer_ops import to_integer_kernels_
    from qncd.export.onnx_model import save_onnx

    model, _ = read_onnx(folder)
    to_integer_kernels_(model)
    RemoveUnusedNodesPass()(model)
    return save_onnx(model, scratch)


def openvino_options(threads: int, precision: str = "fp32") -> dict[str, Any]:
    """What OpenVINO's CPU plugin is told. Without a precision it would take bfloat16 where the CPU has it."""
    return {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
    }  # fmt: skip


def openvino_session(folder: Path, threads: int, precision: str = "fp32") -> Session:
    """OpenVINO on DIR/model.onnx, compiled anew for each shape of the inputs: fixed shapes run faster, and lanes have one.

    `precision` is that of what is not quantized: "fp32" or "bf16".
    """
    core = require("openvino").Core()
    options = openvino_options(threads, precision)
    compiled: dict[tuple[tuple[str, tuple[int, ...]], ...], Any] = {}

    def run(inputs: Arrays) -> np.ndarray:
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        if shapes not in compiled:
            model = read_network(folder / FILE, dict(shapes), precision)
            compiled[shapes] = core.compile_model(model, "CPU", options)
        return np.array(compiled[shapes](inputs)[0])  # a copy: the engine uses its buffer again

    return run


def open_engine(unet: UNet, folder: Path, backend: str, threads: int | None = None, precision: str = "fp32") -> EngineUNet:
    """DIR/model.onnx on an engine, to be called instead of `unet`, from which it was exported.

    Args:
        backend: "onnxruntime", "openvino" or "tensorrt".
        threads: default: torch's.
        precision: of what is not quantized, "fp32", or with OpenVINO "bf16".

    Raises:
        ValueError: the backend's package or the CPU's bfloat16 is not there, or the engine refuses the model.
        FileNotFoundError: there is no such model.
    """
    check_backend(backend, precision)
    _, info = read_onnx(folder)
    threads = threads or torch.get_num_threads()
    try:
        if backend == "openvino":
            session = openvino_session(folder, threads, precision)
        else:
            session = onnxruntime_session(folder, threads, backend == "tensorrt")
    except Exception as error:  # engines have exceptions of their own, without a common base
        raise ValueError(f"{folder / FILE}: {backend} refuses it: {' '.join(str(error).split())[:300]}") from error
    return EngineUNet(unet, session, backend, info.one_step_a_call)
