"""The mutation check on a made-up package: planted faults are found, survivors are reported, and the rate is right."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from script_runs import load_script

TOOL = Path(__file__).resolve().parents[2] / "tools" / "mutate.py"

PRICES = '''\
"""Prices -1 + 1."""

RATE: float = 3


def price(pieces: int, each: int | None = None) -> int:
    """At 10 pieces and more, one is free."""
    if pieces >= 10:
        pieces -= 1
    return pieces * RATE
'''

TESTS = """\
from qncd.shop.prices import price


def test_price():
    assert price(2) == 6
    assert price(20) == 57
"""


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    return load_script(TOOL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package of one module and its tests, which do not say what ten pieces cost."""
    files = {
        "qncd/__init__.py": "", "qncd/shop/__init__.py": "", "qncd/shop/prices.py": PRICES,
        "tests/shop/test_prices.py": TESTS, "tests/shop/test_others.py": "def test_nothing():\n    pass\n",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "checkout"


def run(checkout: Path, *more: str) -> list[str]:
    words = [sys.executable, str(TOOL), "--root", str(checkout), "--package", "shop", "--warm", *more]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they cost more than the tests
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_faults_are_found_survivors_reported_and_the_rest_goes_on(checkout: Path, tmp_path: Path) -> None:
    lines = run(checkout, "--json", str(tmp_path / "state.json"))
    verdicts = {line.split(" (tests")[0] for line in lines}
    where = "qncd/shop/prices.py"
    assert f"killed {where}:10 arithmetic: pieces * RATE -> (pieces / RATE)" in verdicts
    assert f"killed {where}:9 dropped: pieces -= 1 -> pass" in verdicts
    assert f"killed {where}:3 constant: 3 -> 4" in verdicts  # runs on import: no test reaches it, so all run
    assert {line for line in verdicts if line.startswith("SURVIVED")} == {
        f"SURVIVED {where}:8 comparison: pieces >= 10 -> (pieces > 10)",
        f"SURVIVED {where}:8 constant: 10 -> 11",
    }
    killed = sum(line.startswith("killed") for line in lines)
    assert lines[-1] == f"shop: {killed} of {killed + 2} killed, {100 * killed / (killed + 2):.1f} %; 0 equivalent"
    assert (checkout / where).read_text(encoding="utf-8") == PRICES
    assert not any("test_others" in line for line in lines)  # does not import the module

    # A second call knows what the first has found; a test that is added is tried on the survivors.
    path = tmp_path / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for key, found in state["mutants"].items():
        found["by"] = f"kept {key}"
    path.write_text(json.dumps(state), encoding="utf-8")
    (checkout / "tests/shop/test_prices.py").write_text(TESTS + "    assert price(10) == 27\n", encoding="utf-8")
    lines = run(checkout, "--json", str(path))
    assert sum("(kept" in line for line in lines) == killed
    assert lines[-1] == f"shop: {killed + 2} of {killed + 2} killed, 100.0 %; 0 equivalent"


def test_equivalent_faults_do_not_count(checkout: Path) -> None:
    (checkout / "tools").mkdir()
    row = {
        "file": "qncd/shop/prices.py",
        "rule": "comparison",
        "line": "if pieces >= 10:",
        "after": "(pieces > 10)",
        "reason": "why",
    }
    (checkout / "tools/mutate_equivalent.json").write_text(json.dumps([row]), encoding="utf-8")
    lines = run(checkout)
    assert "equivalent qncd/shop/prices.py:8 comparison: pieces >= 10 -> (pieces > 10) (why)" in lines
    killed = sum(line.startswith("killed") for line in lines)
    assert lines[-1].startswith(f"shop: {killed} of {killed + 1} killed") and lines[-1].endswith("; 1 equivalent")


def test_a_draw_depends_on_the_seed_alone(mutate: ModuleType, checkout: Path) -> None:
    mutants = mutate.find_mutants(checkout, "qncd/shop/prices.py")
    draws = [list(mutate.sampled(mutants, 4, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0][0][1]) == 4 and list(mutate.sampled(mutants, None, 0)) == [("shop", mutants)]


SOURCE = '''\
"""A docstring with 1 + 1."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SEEN = 1


@wrap(frozen=True)
class Box:
    size: "int" = 2

    def take(self, rows: list[int] | None, at: int) -> float:
        """Another, 2 < 3."""
        if at < 0 or not rows:
            raise ValueError(f"at {at + 1}: allowed is {0}")
        warnings.warn("less than " + str(at - 1), stacklevel=2)
        self.rows = rows[at : at + 2]
        for index in range(at, len(rows), 3):
            rows.append(-index)
        assert at == 1
        return 0.5 if at in rows else -1
'''


def test_the_rules(mutate: ModuleType) -> None:
    mutants = mutate.Finder("qncd/box.py", SOURCE).run()
    found = Counter((mutant.rule, mutant.before, mutant.after) for mutant in mutants)
    assert found == Counter(
        [
            ("constant", "2", "3"), ("sign", "2", "(-2)"),  # the size
            ("branches", "at < 0 or not rows", "(not (at < 0 or not rows))"),
            ("boolean", "at < 0 or not rows", "(at < 0 and (not rows))"),
            ("comparison", "at < 0", "(at <= 0)"), ("constant", "0", "1"), ("boolean", "not rows", "rows"),
            ("dropped", "self.rows = rows[at : at + 2]", "pass"), ("off by one", "at", "(at + 1)"),
            ("off by one", "at + 2", "(at + 2 - 1)"),
            ("arithmetic", "at + 2", "(at - 2)"), ("constant", "2", "3"), ("sign", "2", "(-2)"),
            ("off by one", "at", "(at + 1)"), ("off by one", "len(rows)", "(len(rows) - 1)"),
            ("constant", "3", "4"), ("sign", "3", "(-3)"),
            ("dropped", "rows.append(-index)", "pass"), ("sign", "-index", "index"),
            ("return", "return 0.5 if at in rows else -1", "return None"),
            ("branches", "0.5 if at in rows else -1", "(-1 if at in rows else 0.5)"),
            ("comparison", "at in rows", "(at not in rows)"),
            ("constant", "0.5", "1.0"), ("sign", "0.5", "(-0.5)"), ("sign", "-1", "1"),
        ]
    )  # fmt: skip
    for mutant in mutants:
        source = SOURCE.encode()
        ast.parse(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])


def test_the_tests_of_a_module(mutate: ModuleType, checkout: Path) -> None:
    (checkout / "tests/shop/test_mirror.py").write_text("from qncd.shop import prices\n", encoding="utf-8")
    assert mutate.mirroring_tests(checkout, "qncd/shop/prices.py") == ["tests/shop/test_prices.py", "tests/shop/test_mirror.py"]
    every = [f"tests/shop/test_{name}.py" for name in ("mirror", "others", "prices")]
    assert mutate.mirroring_tests(checkout, "qncd/shop/unknown.py") == every  # nothing imports it: something may call it
