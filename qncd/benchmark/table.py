"""The table of a quality benchmark: its columns, and what they show of a row of `quality.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qncd.benchmark.plan import FULL, title_of

# Figures of a row: how the table calls and shows them.
FIGURES = {
    "weight_bits": ("bits of weights", ".2f"), "act_bits": ("of activations", ".2f"), "megabytes": ("checkpoint, MB", ".2f"),
    "fid": ("FID", ".3f"), "fid_difference": ("FID − FID of FP", "+.3f"), "sfid": ("sFID", ".3f"),
    "psnr": ("PSNR to FP, dB", ".2f"), "psnr_of_mean": ("PSNR of the mean error", ".2f"),
    "psnr_p5": ("5th percentile of PSNR", ".2f"), "poor": ("images under 20 dB, %", ".1f"), "lpips": ("LPIPS to FP", ".4f"),
    "noise_error": ("noise-prediction error", ".3g"),
    "class_accuracy": ("class accuracy, %", ".1f"), "caption_accuracy": ("captions right, %", ".1f"),
}  # fmt: skip
ONCE = ("weight_bits", "act_bits", "megabytes")  # the mean says enough
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A figure, or the images per second on an engine.

    Attributes:
        title: its head.
        style: of its numbers.
        key: in the row.
        engine: whose images per second these are.
    """

    title: str
    style: str
    key: str
    engine: str | None = None

    def of(self, row: dict[str, Any]) -> dict[str, float] | None:
        """Mean and extremes over the seeds, None where there is no such figure."""
        found = row.get(self.key)
        return found if self.engine is None else (found or {}).get(self.engine)

    def show(self, row: dict[str, Any]) -> str:
        """The mean, and the extremes where they say more."""
        value = self.of(row)
        if value is None:
            return MISSING
        mean = format(value["mean"], self.style)
        if row["seeds"] < 2 or self.key in ONCE or self.engine is not None:
            return mean
        return f"{mean} ({value['min']:{self.style}} to {value['max']:{self.style}})"


def shown_columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """Those that at least one row fills."""
    columns = [Column(title, style, key) for key, (title, style) in FIGURES.items()]
    engines = dict.fromkeys(name for row in rows for name in row.get("images_per_second") or {})
    columns += [Column(f"images/s on {name}", ".2f", "images_per_second", name) for name in engines]
    return [column for column in columns if any(column.of(row) for row in rows)]


def heads(row: dict[str, Any]) -> tuple[str, str]:
    """Width and mode as the table calls them."""
    return ("FP32", "full precision") if row["mode"] == FULL else (row["width"], title_of(row["mode"]))


def seeds(row: dict[str, Any]) -> str:
    """How many there are."""
    return MISSING if row["mode"] == FULL else str(row["seeds"])


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown."""
    columns = shown_columns(rows)
    titles = ["width", "mode", *(column.title for column in columns), "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return [*lines, *(f"| {' | '.join([*heads(row), *(c.show(row) for c in columns), seeds(row)])} |" for row in rows)]
