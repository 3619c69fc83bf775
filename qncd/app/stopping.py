"""How a command ends before its time: SIGINT, SIGTERM and SIGHUP end it at once, with one line and nothing half-written.

Files appear whole or not at all, so there is nothing to wait for: what is being written is discarded, the workers are
ended, and the process is gone. Only a batch of images, which takes milliseconds, is written to its end (`undisturbed`).
Raising an exception instead would be at the mercy of every library that catches one, and of imports that break off.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_hint = "nothing is left half-done; the same command line starts again"
_depth = 0
_pending: int | None = None


def install() -> None:
    """Have the signals end this process as the module says; one that the parent had ignored (nohup) stays ignored."""
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install` while the body runs, where signals can be handled: in the main thread."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_how_to_go_on(hint: str) -> None:
    """What the line says behind the signal's name from now on."""
    global _hint
    _hint = hint


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A signal that comes while the body runs ends the process after it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _pending is not None and not _depth:
            end(_pending)


def end(number: int) -> None:
    """End this process as the signal asks."""
    for other in NUMBERS:
        signal.signal(other, signal.SIG_IGN)
    files, workers = (sys.modules.get(name) for name in ("qncd.io.files", "qncd.workers"))
    with contextlib.suppress(Exception):
        if workers is not None:  # else none has been started
            workers.stop_workers()
    with contextlib.suppress(Exception):
        if files is not None:  # else nothing has been written
            files.discard_unfinished()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if _speaks():
        # os.write: the signal may have come in the middle of a print. The line feed ends what a progress bar has drawn.
        start = "\n" if "tqdm" in sys.modules else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{start}stopped by {signal.Signals(number).name}: {_hint}\n".encode())
    os._exit(128 + number)


def _speaks() -> bool:
    """Whether no other process of the same run tells how it ended."""
    from qncd.launchers import WORKER, find_place

    try:
        return WORKER not in os.environ and find_place(os.environ).rank == 0
    except ValueError:  # variables that make no sense: the command would have been refused
        return True


def _on_signal(number: int, _: Any) -> None:
    global _pending
    if _depth:
        _pending = number
    else:
        end(number)
