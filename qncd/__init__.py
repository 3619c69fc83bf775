"""QNCD: quantize diffusion models after training, correct their quantization noise, and measure what is left."""

from __future__ import annotations

import importlib
from typing import Any

from qncd import corrected as corrected
from qncd.registration import register

__version__ = "0.1.0"

# Public name -> module that defines it; imported on first use, so that `import qncd` stays quick.
_PUBLIC = {
    "load": "qncd.api",
    "quantize": "qncd.api",
    "save": "qncd.saving",
    "load_quantized": "qncd.saving",
    "pack_weights": "qncd.saving",
    "unpack_weights": "qncd.saving",
    "export": "qncd.api",
    "export_gguf": "qncd.api",
    "open_engine": "qncd.api",
    "Report": "qncd.api",
    "Recipe": "qncd.recipe",
    "QuantConfig": "qncd.recipe",
    "SmoothingConfig": "qncd.recipe",
    "ReconstructionConfig": "qncd.recipe",
    "CorrectionConfig": "qncd.recipe",
    "CalibrationConfig": "qncd.recipe",
    "CalibrationSet": "qncd.ptq.data",
    "QNCDConfig": "qncd.diffusers_quantizer",
    "Network": "qncd.models.network",
    "network_of": "qncd.models.network",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qncd' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


register()
