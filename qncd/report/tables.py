"""Tables of the report: what a cell shows, and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qncd.metrics.statistics.bootstrap import Interval


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number or text that it is sorted by."""

    text: str
    by: float | str


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by its columns.

    Attributes:
        caption: what it shows.
        columns: their titles.
        rows: cells; the first of each is the row's head.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def text(value: Any) -> Cell:
    """A text as it is."""
    return Cell(str(value), str(value))


def number(value: float | None, style: str = "g", unit: str = "", bounds: Interval | None = None) -> Cell:
    """A number with its unit and its 95 % interval; a dash, last when sorted, where there is none."""
    if value is None or math.isnan(value):
        return Cell("–", "")
    shown = f"{value:{style}}{unit}"
    if bounds is not None:
        shown += f" ({bounds.low:{style}} to {bounds.high:{style}})"
    return Cell(shown, value if math.isfinite(value) else 1e308)


def percent(share: float | None) -> Cell:
    """A share as a percentage with three digits."""
    return number(None if share is None else 100 * share, ".3g", " %")


def flat(values: Any, name: str = "") -> dict[str, str]:
    """Nested settings as texts by dotted names; what is empty stands as a dash."""
    if isinstance(values, dict) and values:
        parts = {f"{name}.{key}" if name else str(key): value for key, value in values.items()}
        return {key: shown for inner, value in parts.items() for key, shown in flat(value, inner).items()}
    if values in (None, {}, []):
        return {name: "–"}
    if isinstance(values, bool):
        return {name: "yes" if values else "no"}
    return {name: ", ".join(map(str, values)) if isinstance(values, list) else str(values)}
