"""The packages that exporting and the engines need, or one clear line saying how to install them."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install -e '.[export]'"


def require(package: str) -> Any:
    """The module `package`. Raises ValueError naming the extra that brings it where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the package {package} is not there ({error}): install it with {INSTALL}") from None
