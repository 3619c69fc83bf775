"""OpenVINO's CPU plugin, on the model as `qncd.engines.openvino_graph` rewrites it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qncd.engines.onnx.engine import Arrays, ArraySession, OnnxEngine
from qncd.engines.onnx.model import FILE
from qncd.engines.openvino_graph import openvino_core, read_network

HINTS = {"fp32": "f32", "bf16": "bf16"}  # of OpenVINO, by the names of precisions


class OpenVino(OnnxEngine):
    """The model compiled anew for each shape of the inputs: fixed shapes run faster, and lanes have one."""

    name = "openvino"
    packages = ("openvino",)
    precisions = tuple(HINTS)

    def check(self, precision: str) -> None:
        """Raise ValueError where a package is not there, or the CPU lacks the precision."""
        super().check(precision)
        can = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision.upper() not in can:
            raise ValueError(
                f"engine precision {precision}: OpenVINO computes in it on CPUs with AMX or AVX512-BF16, this has neither"
            )

    def session(self, folder: Path, threads: int, precision: str = "fp32") -> ArraySession:
        """DIR/model.onnx."""
        options = openvino_options(threads, HINTS[precision])
        compiled: dict[tuple[tuple[str, tuple[int, ...]], ...], Any] = {}

        def run(inputs: Arrays) -> np.ndarray:
            shapes = tuple((name, value.shape) for name, value in inputs.items())
            if shapes not in compiled:
                try:
                    model = read_network(folder / FILE, dict(shapes))
                    compiled[shapes] = openvino_core().compile_model(model, "CPU", options)
                except RuntimeError as error:
                    raise self.refusal(folder, error) from error
            return np.array(compiled[shapes](inputs)[0])  # a copy: the engine uses its buffer again

        return run


def openvino_options(threads: int, precision: str = "f32") -> dict[str, Any]:
    """What OpenVINO's CPU plugin is told. Without a precision it would take bfloat16 where the CPU has it."""
    return {
        "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads
    }  # fmt: skip
