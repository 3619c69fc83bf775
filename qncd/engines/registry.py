"""The engines by name. This module imports nothing heavy: the command line lists the names before torch is loaded."""

from __future__ import annotations

TORCH = "torch"  # runs the calibrated network itself, in floating point on the integers' grid: no engine is opened for it

# Name -> module:Class, a `qncd.engines.engine.Engine`. An author adds a line here.
ENGINES: dict[str, str] = {
    "onnxruntime": "qncd.engines.onnxruntime:OnnxRuntime",
    "openvino": "qncd.engines.openvino:OpenVino",
    "triton": "qncd.engines.triton.engine:Triton",
    "tensorrt": "qncd.engines.onnxruntime:TensorRt",
}
PRECISIONS = ("fp32", "fp16", "bf16")  # of what an engine computes beside the integers

# Types of weights in GGUF files, and their bits; f16 is not quantized.
GGUF_TYPES: dict[str, int | None] = {"q8_0": 8, "q4_0": 4, "f16": None}


def engine_names() -> tuple[str, ...]:
    """All that can run a network: torch, and the engines."""
    return (TORCH, *ENGINES)
