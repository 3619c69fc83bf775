"""SECURITY.md names a test behind each promise, and each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("|") and not line.startswith(("| Files", "|---"))]


def test_there_are_promises() -> None:
    assert len(ROWS) >= 10
    assert [heading for heading in re.findall(r"^## (.+)$", TEXT, re.MULTILINE)] == ["Promised", "Not promised", "Reporting"]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_test_holds_the_promise(row: str) -> None:
    found = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
    assert found, row
    tree = ast.parse((ROOT / found[1]).read_text(encoding="utf-8"))
    assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row
