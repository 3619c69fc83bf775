"""The packages that exporting and the engines need, or one clear line saying how to install them."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install -e '.[export]'"
BACKENDS = ("torch", "onnxruntime", "openvino", "tensorrt")  # tensorrt: through ONNX Runtime's provider
PRECISIONS = ("fp32", "bf16")  # of what an engine computes beside the integers


def require(package: str) -> Any:
    """The module `package`. Raises ValueError naming the extra that brings it where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the package {package} is not there ({error}): install it with {INSTALL}") from None


def cpu_has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU. Raises ValueError where OpenVINO is not installed."""
    return "BF16" in require("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def check_backend(name: str, precision: str = "fp32") -> None:
    """Raise ValueError where the packages of a backend, or those that make its model, or the precision are not there."""
    if precision not in PRECISIONS:
        raise ValueError(f"engine precision {precision!r}: allowed are {', '.join(PRECISIONS)}")
    if precision != "fp32" and name != "openvino":
        raise ValueError(f"engine precision {precision}: allowed with backend {name} is fp32; openvino has {precision}")
    if name == "torch":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: allowed are {', '.join(BACKENDS)}")
    for package in ("onnx", "onnxscript"):
        require(package)
    engine = require("openvino" if name == "openvino" else "onnxruntime")
    if precision == "bf16" and not cpu_has_bf16():
        raise ValueError("engine precision bf16: this CPU has no bfloat16 instructions (AVX512-BF16 or AMX); fp32 is allowed")
    if name == "tensorrt" and "TensorrtExecutionProvider" not in engine.get_available_providers():
        found = ", ".join(engine.get_available_providers())
        raise ValueError(f"backend tensorrt: this ONNX Runtime has no TensorrtExecutionProvider, only {found}")
