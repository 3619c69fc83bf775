"""Progress bars with the time left."""

from __future__ import annotations

from typing import Protocol


class Update(Protocol):
    """How far something is."""

    def __call__(self, done: int, total: int, left: float | None = None) -> None:
        """`done` of `total`; `left` seconds, where the caller knows better than by counting."""


class progress_bar:
    """`with progress_bar("sampling", "image") as update:`: update(done, total) draws rate and time left on stderr.

    Where the things counted differ in what they cost, update(done, total, seconds_left) says itself how long it will take.
    """

    def __init__(self, title: str, unit: str, quiet: bool = False) -> None:
        self.title, self.unit, self.quiet = title, unit, quiet

    def __enter__(self) -> Update:
        from tqdm import tqdm

        self.bar = tqdm(desc=self.title, unit=f" {self.unit}s", disable=self.quiet, total=0, mininterval=0.5)

        def update(done: int, total: int, left: float | None = None) -> None:
            self.bar.total = total
            if left is not None:
                remaining = tqdm.format_interval(left)
                self.bar.bar_format = f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}}{{unit}} [{{elapsed}}<{remaining}]"
            self.bar.update(done - self.bar.n)

        return update

    def __exit__(self, *_: object) -> None:
        self.bar.close()
