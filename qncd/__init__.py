"""QNCD: quantize diffusion models after training, correct their quantization noise, and measure what is left."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; imported on first use, so that `import qncd` stays quick.
_PUBLIC = {
    "Recipe": "qncd.recipe",
    "QuantConfig": "qncd.recipe",
    "SmoothingConfig": "qncd.recipe",
    "CorrectionConfig": "qncd.recipe",
    "quantize_": "qncd.quant.convert",
    "calibrate_": "qncd.ptq.calibration",
    "CalibrationSet": "qncd.ptq.calibration",
    "smooth_": "qncd.ptq.stages.smoothing",
    "save_quantized": "qncd.ptq.checkpoint",
    "load_quantized_": "qncd.ptq.checkpoint",
    "sample_ddim": "qncd.sampling.samplers",
    "RuntimeNoiseCorrector": "qncd.sampling.correctors.runtime",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qncd' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
