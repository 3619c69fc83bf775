"""ONNX Runtime: its integer kernels on the CPU, or TensorRT through its provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qncd.engines.onnx.engine import ArraySession, OnnxEngine
from qncd.engines.onnx.model import FILE, read_onnx, save_onnx
from qncd.engines.packages import require
from qncd.io.files import scratch_folder

CPU = "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


class OnnxRuntime(OnnxEngine):
    """The model rewritten for the CPU's integer kernels."""

    name = "onnxruntime"
    packages = ("onnxruntime",)

    def session(self, folder: Path, threads: int, precision: str = "fp32") -> ArraySession:
        """DIR/model.onnx, rewritten."""
        with scratch_folder() as scratch:
            return open_session(_integer_model(folder, scratch), threads, [CPU])


class TensorRt(OnnxRuntime):
    """TensorRT takes the QDQ form as it is; what it has no kernels for runs on the other providers."""

    name = "tensorrt"

    def check(self, precision: str) -> None:
        """Raise ValueError where a package or the provider is not there."""
        super().check(precision)
        found = require("onnxruntime").get_available_providers()
        if TENSORRT not in found:
            raise ValueError(f"backend tensorrt: this ONNX Runtime has no {TENSORRT}, only {', '.join(found)}")

    def session(self, folder: Path, threads: int, precision: str = "fp32") -> ArraySession:
        """DIR/model.onnx as it is."""
        found = require("onnxruntime").get_available_providers()
        return open_session(folder / FILE, threads, [p for p in (TENSORRT, "CUDAExecutionProvider", CPU) if p in found])


def open_session(path: Path, threads: int, providers: Sequence[str] = (CPU,)) -> ArraySession:
    """ONNX Runtime on a model's file as it is."""
    runtime: Any = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(str(path), options, providers=list(providers))
    return lambda inputs: session.run(None, inputs)[0]


def _integer_model(folder: Path, scratch: Path) -> Path:
    """DIR/model.onnx rewritten for ONNX Runtime's integer kernels, as a file in `scratch`."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from qncd.engines.onnx.integer_kernels import to_integer_kernels_

    model, _ = read_onnx(folder)
    to_integer_kernels_(model)
    RemoveUnusedNodesPass()(model)
    return save_onnx(model, scratch)
