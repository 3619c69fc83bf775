"""The module that a saved pipeline's model_index.json names for its scheduler.

diffusers loads classes of modules alone that are imported already, so `import qncd` imports this one, which loads nothing until
it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_ROOM = "qncd.corrected_scheduler"


def __getattr__(name: str) -> Any:
    if name not in ("CorrectedScheduler", "SchedulerMixin"):  # the class, and what diffusers sees that it is a scheduler by
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM), name)
