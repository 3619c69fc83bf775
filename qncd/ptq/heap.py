"""Memory that a process holds and does not use, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim_heap() -> None:
    """Give the free pages of the heap back: to be called between layers, whose codes and weights stay.

    The arithmetic of a layer takes several times its memory for a moment. What stays of it comes to lie in between, so that the
    next layer finds no room there and takes new memory: the heap of the C library, which shrinks at its end alone, grew by twice
    SDXL's weights. Does nothing where the C library is not glibc.
    """
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found.argtypes = [ctypes.c_size_t]
    return found
