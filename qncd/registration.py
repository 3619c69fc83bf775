"""`import qncd` makes its quantized networks known to diffusers, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "qncd"  # quant_method of a network's quantization_config
_OURS = "qncd.diffusers_quantizer"
_TABLES = "diffusers.quantizers.auto"  # the module with diffusers' tables of quantizers


class _AfterImport(importlib.abc.MetaPathFinder):
    """Fills diffusers' tables as soon as they are there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        original = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            _fill(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the quantizer known: at once where diffusers' tables are imported, else when they are."""
    if _TABLES in sys.modules:
        _fill(sys.modules[_TABLES])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _fill(tables: Any) -> None:
    ours = importlib.import_module(_OURS)
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ours.QNCDConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = ours.QNCDQuantizer
