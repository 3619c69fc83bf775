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

from qncd.engines.onnx.model import FILE, read_onnx
from qncd.engines.openvino_graph import read_network
from qncd.engines.packages import check_backend, require
from qncd.quant.convert import UNet

Arrays = dict[str, np.ndarray]
ArraySession = Callable[[Arrays], np.ndarray]  # named inputs -> noise
Session = Callable[[dict[str, Tensor]], Tensor]  # the same on the UNet's device


@dataclass(frozen=True)
class EngineOutput:
    """What a UNet of diffusers returns: `sample` (N, C, H, W)."""

    sample: Tensor


class EngineUNet:
    """A network on an engine, in place of the UNet that it was exported from.

    Attributes:
        config: of that UNet.
        device: on which inputs come and outputs go.
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
        inputs = {"sample": sample.float(), "timestep": steps.long().to(sample.device)}
        inputs |= {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states.float()}
        inputs |= {} if class_labels is None else {"class_labels": class_labels.long()}
        inputs = {name: value.detach() for name, value in inputs.items()}
        times = steps.unique().tolist() if self.one_step_a_call else []
        if len(times) <= 1:
            return EngineOutput(self.session(inputs))
        order = [(inputs["timestep"] == time).nonzero().flatten() for time in times]
        parts = [self.session({name: value[rows] for name, value in inputs.items()}) for rows in order]
        return EngineOutput(torch.cat(parts)[torch.cat(order).argsort()])


def on_tensors(session: ArraySession) -> Session:
    """An engine that takes arrays on the CPU, called with tensors on any device."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: value.cpu().contiguous().numpy() for name, value in inputs.items()}
        return torch.from_numpy(session(arrays)).to(inputs["sample"].device)

    return run


def onnxruntime_session(folder: Path, threads: int, tensorrt: bool = False) -> ArraySession:
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

    from qncd.engines.onnx.integer_kernels import to_integer_kernels_
    from qncd.engines.onnx.model import save_onnx

    model, _ = read_onnx(folder)
    to_integer_kernels_(model)
    RemoveUnusedNodesPass()(model)
    return save_onnx(model, scratch)


def openvino_options(threads: int, precision: str = "f32") -> dict[str, Any]:
    """What OpenVINO's CPU plugin is told. Without a precision it would take bfloat16 where the CPU has it."""
    return {
        "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads
    }  # fmt: skip


def openvino_session(folder: Path, threads: int) -> ArraySession:
    """OpenVINO on DIR/model.onnx, compiled anew for each shape of the inputs: fixed shapes run faster, and lanes have one."""
    core = require("openvino").Core()
    options = openvino_options(threads)
    compiled: dict[tuple[tuple[str, tuple[int, ...]], ...], Any] = {}

    def run(inputs: Arrays) -> np.ndarray:
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        if shapes not in compiled:
            model = read_network(folder / FILE, dict(shapes))
            compiled[shapes] = core.compile_model(model, "CPU", options)
        return np.array(compiled[shapes](inputs)[0])  # a copy: the engine uses its buffer again

    return run


def open_engine(unet: UNet, folder: Path, backend: str, threads: int | None = None) -> EngineUNet:
    """DIR/model.onnx on an engine, to be called instead of `unet`, from which it was exported.

    Args:
        backend: "onnxruntime", "openvino" or "tensorrt".
        threads: default: torch's.

    Raises:
        ValueError: the backend's package is not there, or the engine refuses the model.
        FileNotFoundError: there is no such model.
    """
    check_backend(backend)
    _, info = read_onnx(folder)
    threads = threads or torch.get_num_threads()
    try:
        if backend == "openvino":
            session = openvino_session(folder, threads)
        else:
            session = onnxruntime_session(folder, threads, backend == "tensorrt")
    except Exception as error:  # engines have exceptions of their own, without a common base
        raise ValueError(f"{folder / FILE}: {backend} refuses it: {' '.join(str(error).split())[:300]}") from error
    return EngineUNet(unet, on_tensors(session), backend, info.one_step_a_call)


def open_triton(unet: UNet, precision: str = "fp32") -> EngineUNet:
    """A calibrated UNet on its own device in integers, to be called instead of `unet`, which stays as it is.

    Args:
        precision: of what is not quantized, "fp32" or "fp16".

    Raises:
        ValueError: there is no GPU, or a layer has no integer kernel.
    """
    check_backend("triton", precision)
    if unet.device.type != "cuda" and torch.cuda.is_available():
        raise ValueError(f"backend triton on --device {unet.device}: allowed is cuda")
    from qncd.engines.triton.network import IntegerNetwork

    network = IntegerNetwork(unet, {"fp32": torch.float32, "fp16": torch.float16}[precision])
    return EngineUNet(unet, network, "triton", network.one_step_a_call)
