"""Progress with the time left: a bar on a terminal and in a notebook, a line now and then where the output goes elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

LINE_SECONDS = 30.0  # between two lines


class Update(Protocol):
    """How far something is."""

    def __call__(self, done: int, total: int, left: float | None = None) -> None:
        """`done` of `total`; `left` seconds, where the caller knows better than by counting."""


Monitor = Callable[[str, str], AbstractContextManager[Update]]  # title and unit -> where progress is told


@contextmanager
def silent(title: str, unit: str) -> Iterator[Update]:
    """A monitor that tells nobody."""
    yield _nothing


class progress_bar:
    """`with progress_bar("sampling", "image") as update:`: update(done, total) shows rate and time left on stderr.

    Where the things counted differ in what they cost, update(done, total, seconds_left) says itself how long it will take.
    """

    def __init__(self, title: str, unit: str, quiet: bool = False) -> None:
        self.shown: Any = None if quiet else _Bar(title, unit) if _is_watched() else _Lines(title, unit)

    def __enter__(self) -> Update:
        return _nothing if self.shown is None else self.shown.update

    def __exit__(self, *_: object) -> None:
        if self.shown is not None:
            self.shown.close()


def _is_watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook."""
    shell = sys.modules.get("IPython")
    kernel = shell.get_ipython() if shell is not None else None
    return sys.stderr.isatty() or hasattr(kernel, "kernel")


def _nothing(done: int, total: int, left: float | None = None) -> None:
    pass


class _Bar:
    """tqdm's, which in a notebook is a widget."""

    def __init__(self, title: str, unit: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without widgets
            from tqdm.auto import tqdm

        self.bar = tqdm(desc=title, unit=f" {unit}s", total=0, mininterval=0.5)

    def update(self, done: int, total: int, left: float | None = None) -> None:
        self.bar.total = total
        if left is not None:
            remaining = self.bar.format_interval(left)
            self.bar.bar_format = f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}}{{unit}} [{{elapsed}}<{remaining}]"
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()


class _Lines:
    """A line every LINE_SECONDS, and one at the end."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self.start = self.last = time.monotonic()
        self.done = 0

    def update(self, done: int, total: int, left: float | None = None) -> None:
        now, self.done = time.monotonic(), done
        if now - self.last < LINE_SECONDS or done >= total:
            return
        self.last = now
        if left is None and done:
            left = (now - self.start) * (total - done) / done
        remaining = "" if left is None else f", {_clock(left)} left"
        print(f"{self.title}: {done} of {total} {self.unit}s{remaining}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.done:
            print(
                f"{self.title}: {self.done} {self.unit}s in {_clock(time.monotonic() - self.start)}", file=sys.stderr, flush=True
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
