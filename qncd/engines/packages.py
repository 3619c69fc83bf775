"""The packages that exporting and the engines need, or one clear line saying how to install them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

INSTALL = "pip install -e '.[export]'"
BACKENDS = ("torch", "onnxruntime", "openvino", "triton", "tensorrt")  # tensorrt: through ONNX Runtime's provider
PRECISIONS = ("fp32", "fp16")  # of what an engine computes beside the integers


def require(package: str) -> Any:
    """The module `package`. Raises ValueError naming the extra that brings it where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the package {package} is not there ({error}): install it with {INSTALL}") from None


def check_backend(name: str, precision: str = "fp32") -> None:
    """Raise ValueError where the packages of a backend, or those that make its model, or the precision are not there."""
    if precision not in PRECISIONS:
        raise ValueError(f"engine precision {precision!r}: allowed are {', '.join(PRECISIONS)}")
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: allowed are {', '.join(BACKENDS)}")
    if precision != "fp32" and name != "triton":
        raise ValueError(f"engine precision {precision}: allowed with backend {name} is fp32; triton has {precision}")
    if name == "torch":
        return
    if name == "triton":
        check_gpu()
        return
    for package in ("onnx", "onnxscript"):
        require(package)
    engine = require("openvino" if name == "openvino" else "onnxruntime")
    if name == "tensorrt" and "TensorrtExecutionProvider" not in engine.get_available_providers():
        found = ", ".join(engine.get_available_providers())
        raise ValueError(f"backend tensorrt: this ONNX Runtime has no TensorrtExecutionProvider, only {found}")


def check_gpu() -> None:
    """Raise ValueError where Triton or a GPU that it compiles for is not there; its interpreter will do."""
    import torch

    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend triton: the package triton is not there; PyTorch for CUDA on Linux brings it")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend triton: there is no CUDA device; allowed here are torch, onnxruntime, openvino")
