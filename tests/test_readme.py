"""The README and the other pages: commands parse, Python compiles, links resolve, and the README is short."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import qncd
from qncd.app import console

ROOT = Path(__file__).resolve().parents[1]
README_BYTES = 12_288
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPT = r"python (?:(?:scripts|tools)/\w+|evaluator)\.py"
CONSOLE = rf"qncd (?:{'|'.join(console.COMMANDS)})"


def commands() -> list[str]:
    """Command lines of scripts and tools, wherever they stand, and lines of code blocks that call the console command."""
    found = []
    for path in [*PAGES, *sorted((ROOT / "configs").iterdir())]:
        text = re.sub(r"\\\n[# ]*", " ", path.read_text(encoding="utf-8"))
        for match in re.finditer(rf"{SCRIPT}[^\n`|]*|^{CONSOLE} [^\n`|]*", text, re.MULTILINE):
            found += [part.strip() for part in match[0].split("&&") if re.match(rf"{SCRIPT}|{CONSOLE}", part.strip())]
    return sorted(set(found))


def links() -> list[tuple[str, str]]:
    """(page, target) of every link and picture that is not a URL."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        found += [(str(page.relative_to(ROOT)), target) for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return sorted(set(found))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page: lower case, punctuation dropped, spaces as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def python_blocks() -> list[str]:
    return [
        block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    ]


def test_the_readme_is_short_and_installs_and_tests() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= README_BYTES
    (tests,) = re.findall(r"^stage tests (python .+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert "pip install -c constraints.txt -e '.[test]'" in text and f"```bash\n{tests}\n```" in text
    assert len(commands()) >= 30


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[0] == "qncd":
        console.parse(words[1:])
    else:
        words = words[1:]
        script = ROOT / words[0]
        assert script.is_file(), words[0]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(script), run_name="parsed")["parse_args"]()
    for word in words[1:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize(("page", "target"), links())
def test_link_resolves(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), target
    if anchor:
        assert anchor in anchors(file), target


def test_python_in_documents_is_python_and_uses_what_there_is() -> None:
    blocks = python_blocks()
    assert blocks
    names = set()
    for block in blocks:
        names |= {
            node.attr for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qncd"
        }  # fmt: skip
    assert names <= set(qncd.__all__)
