#!/usr/bin/env python3
"""Plant small faults in the package, one at a time, and see whether the tests that mirror the changed file notice.

    python tools/mutate.py qncd/quant/affine.py                                  # every fault in one file
    python tools/mutate.py --since main                                          # in the files that a change touches
    python tools/mutate.py --package quant ptq --sample 25 --seed 0 --json out.json

Faults are made by rule: comparison, arithmetic and boolean operators, numbers, signs, truth values, the ends of slices and
ranges, dropped statements, returned values and swapped branches. Annotations, docstrings, raised errors, assertions, log
messages and decorators are left alone. The work tree is never written to: the checkout is copied to a temporary folder.

The tests of qncd/a/b.py are tests/a/test_b.py and every other test file below tests/a that imports qncd.a.b; where nothing
does, all files below tests/a. They run once without a fault, which tells how long each takes and which lines it reaches. For a
fault, those that reach its line run, file by file and the quickest first, until one fails; where none reaches it (what runs while
a module is imported, or in another process), all run.
Faults that change nothing that can be observed are listed in tools/mutate_equivalent.json, with a reason, and do not count.
With --json, a call goes on where an earlier one was cut off, and repeats only survivors whose tests have changed since.

Needs os.fork, that is Linux or macOS: torch and diffusers are imported once, and every fault gets a fork of that process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import inspect
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "qncd"
WARM = (
    "numpy",
    "scipy.linalg",
    "PIL.Image",
    "torch",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
)
NOT_COPIED = (".git", ".venv", "venv", "runs", "outputs", "build", "dist", "__pycache__", ".*_cache", "*.egg-info")
EQUIVALENT = "tools/mutate_equivalent.json"
SHOWN = 70  # characters of a piece of code in a line of the report

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
SILENT_CALLS = {"print", "warn", "debug", "info", "warning", "error", "exception", "isinstance", "TypeVar", "NewType"}
SILENT_KEYWORDS = {"strict", "stacklevel"}  # checks of what cannot happen, and where a warning points


@dataclass(frozen=True)
class Mutant:
    """One fault: the bytes from `start` to `end` of a file are replaced by `after`."""

    file: str
    line: int
    first_line: int  # of the statement that holds it
    last_line: int
    rule: str
    before: str
    after: str
    start: int
    end: int

    @property
    def key(self) -> str:
        return f"{self.file}:{self.start}:{self.end}:{self.rule}:{self.after}"

    @property
    def package(self) -> str:
        return package_of(self.file)

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        before, after = (text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..." for text in (before, after))
        return f"{self.file}:{self.line} {self.rule}: {before} -> {after}"


def package_of(file: str) -> str:
    """The folder below the package that a file lies in; the package itself for its own files."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else parts[0]


class Finder:
    """All faults of one file, in the order of its lines."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source = file, source.encode()
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.statement: ast.stmt | None = None

    def run(self) -> list[Mutant]:
        self.visit(ast.parse(self.source))
        return sorted(self.found, key=lambda mutant: (mutant.start, mutant.end, mutant.rule, mutant.after))

    def add(self, node: Any, rule: str, new: ast.AST | str) -> None:
        """The fault that puts `new` in the place of `node`."""
        assert self.statement is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        after = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
        if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Name | ast.Call | ast.Attribute):
            after = f"({after})"
        before = self.source[start:end].decode()
        self.found.append(Mutant(self.file, node.lineno, self.statement.lineno, node.end_lineno, rule, before, after, start, end))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Call) and _name(node.func) in SILENT_CALLS:
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.stmt):
            outer, self.statement = self.statement, node
            self.change_statement(node)
            self.visit_children(node)
            self.statement = outer
            return
        if isinstance(node, ast.expr):
            self.change_expression(node)
        self.visit_children(node)

    def visit_children(self, node: ast.AST) -> None:
        left_out = {"annotation", "returns", "decorator_list", "type_params"}
        for name, value in ast.iter_fields(node):
            if name in left_out or (isinstance(node, ast.keyword) and node.arg in SILENT_KEYWORDS):
                continue
            if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
                continue  # -1 is one number
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def change_statement(self, node: ast.stmt) -> None:
        calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value.func) not in SILENT_CALLS
        stores = isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
        if calls or stores or isinstance(node, ast.AugAssign):
            self.add(node, "dropped", "pass")
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            new = copy.deepcopy(node)
            new.op = ARITHMETIC[type(node.op)]()
            self.add(node, "arithmetic", new)
        if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            self.add(node, "return", "return None")
        if isinstance(node, ast.If | ast.While):
            self.add(node.test, "branches", ast.UnaryOp(ast.Not(), node.test))

    def change_expression(self, node: ast.expr) -> None:
        if isinstance(node, ast.Compare):
            for index, operator in enumerate(node.ops):
                new = copy.deepcopy(node)
                new.ops[index] = COMPARISONS[type(operator)]()
                self.add(node, "comparison", new)
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text_or_type(node):
            new_operation = copy.deepcopy(node)
            new_operation.op = ARITHMETIC[type(node.op)]()
            self.add(node, "arithmetic", new_operation)
        elif isinstance(node, ast.BoolOp):
            new_boolean = copy.deepcopy(node)
            new_boolean.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            self.add(node, "boolean", new_boolean)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.add(node, "boolean", node.operand)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self.add(node, "sign", node.operand)
        elif isinstance(node, ast.IfExp):
            self.add(node, "branches", ast.IfExp(node.test, node.orelse, node.body))
        elif isinstance(node, ast.Constant):
            self.change_constant(node)
        elif isinstance(node, ast.Call) and _name(node.func) == "range":
            self.change_ends(node.args[:1] if len(node.args) > 1 else [], node.args[:2][-1:])
        elif isinstance(node, ast.Slice):
            self.change_ends([node.lower] if node.lower else [], [node.upper] if node.upper else [])

    def change_ends(self, lower: Iterable[ast.expr], upper: Iterable[ast.expr]) -> None:
        for ends, operator in ((lower, ast.Add()), (upper, ast.Sub())):
            for end in ends:
                if not isinstance(end, ast.Constant | ast.UnaryOp):
                    self.add(end, "off by one", ast.BinOp(end, operator, ast.Constant(1)))

    def change_constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(node, "constant", ast.Constant(not value))
        elif isinstance(value, int):
            self.add(node, "constant", ast.Constant(value + 1))
        elif isinstance(value, float):
            self.add(node, "constant", ast.Constant(value * 2 if value else 1.0))
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            self.add(node, "sign", ast.UnaryOp(ast.USub(), ast.Constant(value)))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text_or_type(node: ast.BinOp) -> bool:
    """Joined strings, and unions of types such as `int | None`."""
    for side in (node.left, node.right):
        if isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str | None)):
            return True
        name = _name(side.value if isinstance(side, ast.Subscript) else side)
        if isinstance(node.op, ast.BitOr) and (name[:1].isupper() or name in {"int", "float", "str", "list", "tuple", "dict"}):
            return True
    return False


def find_mutants(root: Path, file: str) -> list[Mutant]:
    return Finder(file, (root / file).read_text(encoding="utf-8")).run()


def mirroring_tests(root: Path, file: str) -> list[str]:
    """Test files of a module: the one at the mirrored path, and those below its first folder that import it; or all there."""
    parts = Path(file).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    module, folder = ".".join(parts), root / "tests" / Path(*parts[1:-1][:1])
    mirror = root.joinpath("tests", *parts[1:-1], f"test_{parts[-1]}.py")
    imports = (module, f"from {'.'.join(parts[:-1])} import {parts[-1]}")
    every = sorted(folder.rglob("test_*.py"))
    found = [path for path in every if any(text in path.read_text("utf-8") for text in imports)] or every
    found = [mirror] * mirror.is_file() + [path for path in found if path != mirror]
    return [path.relative_to(root).as_posix() for path in found]


# Running tests in a fork of this process.


class Baseline:
    """A plugin for a run without a fault: seconds of each test, and the lines of the package that it reaches."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}{os.sep}"
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []
        self.lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))  # by test, or test file, and file
        self.current: str | None = None

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if self.current is None or not code.co_filename.startswith(self.folder) or not code.co_flags & inspect.CO_OPTIMIZED:
            return None  # no function of the package
        lines = self.lines[self.current][code.co_filename.removeprefix(self.folder)]

        def add(frame: Any, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return add

        return add

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.current = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        self.current = item.nodeid.partition("::")[0]  # a fixture may be of several tests

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> None:
        self.current = item.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def result(self) -> Any:
        lines = {name: {file: sorted(found) for file, found in files.items()} for name, files in self.lines.items()}
        return {"seconds": {k: round(v, 3) for k, v in self.seconds.items()}, "lines": lines, "failed": self.failed}


class Selected:
    """A plugin that runs chosen tests, the quickest first, and tells the first that fails."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.failed = seconds, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.seconds), key=lambda item: self.seconds[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def result(self) -> Any:
        return self.failed


def run_forked(root: Path, arguments: Sequence[str], plugin: Any, timeout: float | None = None) -> tuple[int | None, Any]:
    """pytest's exit status, None where it took too long, and the plugin's result, from a fork of this process."""
    answer, said = root.parent / "answer.json", root.parent / "said.txt"
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 70
        try:
            with said.open("wb") as file:
                for descriptor in (1, 2):
                    os.dup2(file.fileno(), descriptor)
            os.chdir(root)
            sys.path.insert(0, str(root))
            status = int(pytest.main(["-q", "-p", "no:cacheprovider", f"--basetemp={root.parent / 'tmp'}", *arguments], [plugin]))
            answer.write_text(json.dumps(plugin.result()), encoding="utf-8")
        finally:
            os._exit(status)
    deadline = time.monotonic() + (timeout or float("inf"))
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the tests have started
            result = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
            return os.waitstatus_to_exitcode(code), result
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, None
        time.sleep(0.01)


class Checker:
    """Plants faults in a copy of a checkout; what it has found is kept in `state`."""

    def __init__(self, root: Path, temporary: Path, state: dict[str, Any], save: Callable[[], None], timeout: float) -> None:
        self.copy, self.state, self.save, self.timeout = temporary / "copy", state, save, timeout
        shutil.copytree(root, self.copy, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
        modules = [*(self.copy / PACKAGE).rglob("*.py"), *self.copy.rglob("conftest.py")]
        self.code = digest(sorted(modules))

    def measure(self, files: Iterable[str]) -> None:
        """Run test files without a fault, where that was not done for the same text."""
        baseline = self.state.setdefault("baseline", {})
        for file in files:
            text = f"{self.code} {digest([self.copy / file])}"
            if baseline.get(file, {}).get("digest") == text:
                continue
            start = time.monotonic()
            _, result = run_forked(self.copy, ["-m", "not slow", file], Baseline(self.copy))
            if result is None:
                raise SystemExit(f"{file}: the tests cannot be run; see\n{(self.copy.parent / 'said.txt').read_text()[-2000:]}")
            for name in result["failed"]:
                print(f"{name} fails without a fault: it is left out", flush=True)
            baseline[file] = {"digest": text, **result}
            print(f"{file}: {len(result['seconds'])} tests, {time.monotonic() - start:.0f} s", flush=True)
            self.save()

    def chosen(self, mutant: Mutant, file: str) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a file's tests that reach a fault, and of all of them."""
        self.measure([file])
        record = self.state["baseline"][file]
        lines = set(range(mutant.first_line, mutant.last_line + 1))
        every = {test: seconds for test, seconds in record["seconds"].items() if test not in record["failed"]}
        reached = {name for name, files in record["lines"].items() if lines & set(files.get(mutant.file, ()))}
        return {test: seconds for test, seconds in every.items() if {test, file} & reached}, every

    def check(self, mutant: Mutant) -> dict[str, Any]:
        """Whether the tests notice a fault, by which test; from an earlier call where that still holds."""
        files = mirroring_tests(self.copy, mutant.file)
        texts = {"source": digest([self.copy / mutant.file]), "tests": digest([self.copy / file for file in files])}
        known = self.state.setdefault("mutants", {}).get(mutant.key)
        if known and known["source"] == texts["source"] and (known["killed"] or known["tests"] == texts["tests"]):
            return dict(known)
        by = next(filter(None, (self.killer(mutant, tests) for tests in self.tests_of(mutant, files))), "")
        result = {**texts, "killed": bool(by), "by": by, "mutant": str(mutant)}
        self.state["mutants"][mutant.key] = result
        self.save()
        return result

    def tests_of(self, mutant: Mutant, files: Sequence[str]) -> Iterator[dict[str, float]]:
        """The tests to try, file by file: those that reach the fault, or all where none does."""
        reached = False
        for file in files:
            tests, _ = self.chosen(mutant, file)
            reached |= bool(tests)
            yield tests
        for file in files if not reached else ():
            yield self.chosen(mutant, file)[1]

    def killer(self, mutant: Mutant, tests: dict[str, float]) -> str:
        """The test of one file that fails, or what else went wrong; nothing where all pass."""
        if not tests:
            return ""
        file = next(iter(tests)).partition("::")[0]
        limit = self.timeout + 4 * sum(tests.values())
        path = self.copy / mutant.file
        original = path.read_bytes()
        path.write_bytes(original[: mutant.start] + mutant.after.encode() + original[mutant.end :])
        try:
            status, failed = run_forked(self.copy, ["-x", "-m", "not slow", file], Selected(tests), limit)
        finally:
            path.write_bytes(original)
        if status in (0, 5):
            return ""
        return failed or ("too slow" if status is None else f"pytest's exit status {status}, {file}")


def digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def equivalents(root: Path) -> list[dict[str, str]]:
    """The table of faults that change nothing: file, rule, line (its text), after, reason."""
    path = root / EQUIVALENT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def reason_of(mutant: Mutant, table: Sequence[dict[str, str]], root: Path) -> str | None:
    """Why a fault changes nothing, where the table says so."""
    line = (root / mutant.file).read_text(encoding="utf-8").splitlines()[mutant.line - 1].strip()
    for row in table:
        if (row["file"], row["rule"], row["line"], row["after"]) == (mutant.file, mutant.rule, line, mutant.after):
            return row["reason"]
    return None


def wanted_files(root: Path, args: argparse.Namespace) -> list[str]:
    """The package's files that the command line names."""
    files = {path.resolve().relative_to(root).as_posix() for path in args.files}
    if args.since:
        words = ["git", "-C", str(root), "diff", "--name-only", "--diff-filter=d", args.since, "--", PACKAGE]
        files |= set(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
    for name in args.package:
        if not (root / PACKAGE / name).is_dir():
            raise SystemExit(f"--package {name}: no folder {PACKAGE}/{name}")
        files |= {path.relative_to(root).as_posix() for path in (root / PACKAGE / name).rglob("*.py")}
    return sorted(file for file in files if file.endswith(".py"))


def sampled(mutants: Sequence[Mutant], count: int | None, seed: int) -> Iterator[tuple[str, list[Mutant]]]:
    """By package: all faults, or `count` drawn at random; the draw of one package does not depend on the others."""
    by_package: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_package[mutant.package].append(mutant)
    for package, found in sorted(by_package.items()):
        if count is not None and count < len(found):
            places = sorted(random.Random(f"{package} {seed}").sample(range(len(found)), count))
            found = [found[place] for place in places]
        yield package, found


def warm_up(root: Path, modules: Iterable[str]) -> None:
    """Import what every fork needs and what is not the package's own."""
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(root), OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    if (root / "conftest.py").is_file():
        runpy.run_path(str(root / "conftest.py"))  # may set what others read while they are imported
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", type=Path, help="files of the package")
    parser.add_argument("--since", metavar="REV", help="files that differ from this revision")
    parser.add_argument("--package", nargs="+", default=[], metavar="NAME", help="all files of these folders, e.g. quant ptq")
    parser.add_argument("--sample", type=int, metavar="N", help="so many faults of each package, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--timeout", type=float, default=30, metavar="S", help="on top of four times what the tests usually take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep results here, and go on from there")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument("--warm", nargs="*", default=WARM, metavar="MODULE", help="imported once for all")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    root = args.root.resolve()
    files = wanted_files(root, args)
    if not files:
        raise SystemExit("no files: name some, or pass --since or --package")
    mutants = [mutant for file in files for mutant in find_mutants(root, file)]
    state: dict[str, Any] = json.loads(args.json.read_text("utf-8")) if args.json and args.json.is_file() else {}

    def save() -> None:
        if args.json:
            part = args.json.with_name(f"{args.json.name}.part")
            part.write_text(json.dumps(state), encoding="utf-8")
            part.replace(args.json)

    table, rates = equivalents(root), []
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        checker = Checker(root, Path(temporary), state, save, args.timeout)
        warm_up(checker.copy, args.warm)
        for package, chosen in sampled(mutants, args.sample, args.seed):
            killed = survived = equivalent = 0
            for mutant in chosen:
                reason = reason_of(mutant, table, root)
                if reason:
                    equivalent += 1
                    print(f"equivalent {mutant} ({reason})", flush=True)
                    continue
                result = checker.check(mutant)
                killed, survived = killed + result["killed"], survived + (not result["killed"])
                by = f" ({result['by']})" if result["by"] else ""
                print(f"killed {mutant}{by}" if result["killed"] else f"SURVIVED {mutant}", flush=True)
            rate = f"{100 * killed / (killed + survived):.1f} %" if killed + survived else "none counted"
            rates.append(f"{package}: {killed} of {killed + survived} killed, {rate}; {equivalent} equivalent")
    print("\n".join(rates))


if __name__ == "__main__":
    main()
