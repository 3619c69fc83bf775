"""Documents, docstrings, comments and help texts avoid phrases that read like a translation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "configs",
    "docs",
    "evaluator.py",
    "examples",
    "qncd",
    "scripts",
    "tools",
)
SUFFIXES = {".ipynb", ".md", ".py", ".rst", ".yaml", ".yml"}
FORBIDDEN = {  # phrase -> what to write instead
    "in the box": "bundled",
    "of their own": "mixed precision, separate or individual",
    "a width is none": "say what is wrong with the width",
}


def texts() -> dict[Path, str]:
    files = [file for place in PLACES for file in [ROOT / place, *(ROOT / place).rglob("*")]]
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files if file.suffix in SUFFIXES}


def places(text: str, phrase: str) -> list[int]:
    """Lines where a phrase begins, in any case, also where it goes on in the next line, comment or string literal."""
    pattern = r"[\s#\"']+".join(map(re.escape, phrase.split()))
    return [text.count("\n", 0, match.start()) + 1 for match in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE)]


@pytest.mark.parametrize("phrase", FORBIDDEN)
def test_no_text_has_the_phrase(phrase: str) -> None:
    found = [f"{file}:{line}" for file, text in texts().items() for line in places(text, phrase)]
    assert not found, f"{phrase!r} (write: {FORBIDDEN[phrase]}) in {', '.join(found)}"


def test_phrases_are_found_across_lines() -> None:
    text = '# the model in\n# the box\nx = "widths of " "their own"\n'
    assert places(text, "in the box") == [1] and places(text, "of their own") == [3]
    assert len(texts()) > 50
