"""The packages that exporting and the engines need, or one clear line saying how to install them."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install -e '.[export]'"
BACKENDS = ("torch", "onnxruntime", "openvino", "tensorrt")  # tensorrt: through ONNX Runtime's provider


def require(package: str) -> Any:
    """The module `package`. Raises ValueError naming the extra that brings it where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the package {package} is not there ({error}): install it with {INSTALL}") from None


def check_backend(name: str) -> None:
    """Raise ValueError where the packages of a backend, or those that make its model, are not there."""
    if name == "torch":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: allowed are {', '.join(BACKENDS)}")
    for package in ("onnx", "onnxscript"):
        require(package)
    engine = require("openvino" if name == "openvino" else "onnxruntime")
    if name == "tensorrt" and "TensorrtExecutionProvider" not in engine.get_available_providers():
        found = ", ".join(engine.get_available_providers())
        raise ValueError(f"backend tensorrt: this ONNX Runtime has no TensorrtExecutionProvider, only {found}")
