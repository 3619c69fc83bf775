"""The packages that exporting and the engines need, or one clear line saying how to install them."""

from __future__ import annotations

import importlib
import os
from typing import Any


def require(package: str, extra: str = "export") -> Any:
    """The module `package`. Raises ValueError naming the extra that brings it where it is not installed.

    ONNX Runtime's telemetry is off unless the environment says otherwise: it writes to the user's home and temporary folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # is read once, when the package is imported
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the package {package} is not there ({error}): install it with pip install -e '.[{extra}]'") from None
