"""Lower layers never import higher ones, modules stay small, and `--help` does not wait for torch."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qncd"
MAX_LINES = 400
MAX_SCRIPT_LINES = 60

# From low to high: a module imports from its own layer or from lower ones.
LAYERS = (
    ("registration", "corrected", "cluster", "distributed", "launchers", "progress", "workers"),
    ("io",),
    ("recipe", "modes", "options", "rng", "steps", "granularity", "reconstruction", "smoothing", "widths"),
    ("models", "metrics"),
    ("quant",),
    ("sampling",),
    ("ptq", "training"),
    ("engines",),
    ("api", "saving", "corrected_scheduler", "diffusers_quantizer"),
    ("app",),
    ("benchmark",),
    ("inspection",),
    ("report",),
    ("commands",),
)
COMMANDS = ("qncd.app.commands", "qncd.app.console")  # the top of the app, above the benchmarks that they run
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Layers that may import less than what lies below them.
ONLY = {
    "models": {"recipe", "rng", "io"},
    "metrics": {"recipe", "distributed", "progress", "rng", "io"},
    "quant": {"recipe", "rng", "granularity"},
    "sampling": {"recipe", "rng", "models"},
    "engines": {"recipe", "io", "models", "quant", "granularity"},
}

# Modules that meet in a protocol only.
STRANGERS = ("qncd.sampling.samplers", "qncd.sampling.correctors.runtime")

# Everything that `--help` imports; yaml takes 20 ms, torch seconds.
LIGHT_MODULES = (
    "qncd", "qncd.options", "qncd.modes", "qncd.recipe", "qncd.models.configs", "qncd.app.flags",
    "qncd.app.parser", "qncd.app.console",
    *(f"qncd.app.commands.{path.stem}" for path in sorted((PACKAGE / "app" / "commands").glob("[!_]*.py"))),
)  # fmt: skip
LIGHT_THIRD_PARTY = {"yaml"}
HEAVY = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "PIL",
    "diffusers",
    "transformers",
    "open_clip",
    "omegaconf",
    "pytorch_lightning",
    "lightning_fabric",
    "torch_fidelity",
    "matplotlib",
    "jinja2",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "openvino",
    "triton",
)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path, ROOT): path for path in sorted(PACKAGE.rglob("*.py"))}


def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"), str(MODULES[name]))


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def nodes_run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, nothing under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield statement
                yield from nodes_run_on_import(statement)
            continue
        yield child
        yield from nodes_run_on_import(child)


def imported(nodes: Iterator[ast.AST], name: str, is_package: bool) -> Iterator[tuple[int, str, str]]:
    """Every import among the nodes as (line, module, name), absolute; the name is "" for `import module`.

    Also sees `importlib.import_module("module")` with a literal name.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = name.split(".") if is_package else name.split(".")[:-1]
                base = base[: len(base) - (node.level - 1)]
                module = ".".join(base + ([module] if module else []))
            for alias in node.names:
                yield node.lineno, module, alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(target, str) and not target.startswith("."):
                yield node.lineno, target, ""


def imports_of(name: str, tree: ast.Module, on_import_only: bool = False) -> list[tuple[int, str, str]]:
    is_package = name in MODULES and MODULES[name].name == "__init__.py"
    nodes = nodes_run_on_import(tree) if on_import_only else ast.walk(tree)
    return list(imported(iter(nodes), name, is_package))


def target_module(module: str, name: str) -> str:
    """The module that `from module import name` reaches: the submodule of that name where there is one."""
    return f"{module}.{name}" if name and f"{module}.{name}" in MODULES else module


def layer_of(name: str) -> str:
    """The layer of a module below qncd: its folder there, but for the commands."""
    return "commands" if name.startswith(COMMANDS) else name.split(".")[1]


def layering_faults(name: str, tree: ast.Module) -> list[str]:
    """One line for each import of the module that breaks the order of the layers."""
    if name in {"qncd", "qncd.__main__"}:
        return []
    layer = layer_of(name)
    if layer not in RANK:
        return [f"{name}: qncd/{layer} has no place in LAYERS (tests/test_import_graph.py)"]
    faults = []
    for line, module, attribute in imports_of(name, tree):
        if module != "qncd" and not module.startswith("qncd."):
            continue
        reached = f"qncd.{attribute}" if module == "qncd" and attribute in RANK else target_module(module, attribute)
        if name in STRANGERS and reached in {*STRANGERS, "qncd.sampling"} - {name}:
            faults.append(f"{name}:{line}: imports {reached}: samplers and runtime_noise know only the corrector protocol")
        if reached == "qncd":
            if attribute != "__version__":
                faults.append(f"{name}:{line}: imports {attribute or 'qncd'} from the top package: name the module that has it")
            continue
        other = layer_of(reached)
        if other == layer:
            continue
        if other not in RANK:
            faults.append(f"{name}:{line}: imports {reached}, which has no place in LAYERS")
        elif RANK[other] > RANK[layer] or (layer in ONLY and other not in ONLY[layer]):
            faults.append(f"{name}:{line}: {layer} must not import {reached}")
    return faults


@pytest.mark.parametrize("name", MODULES)
def test_layering(name: str) -> None:
    faults = layering_faults(name, parse(name))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("qncd.rng", "from qncd.recipe import Seed", True),
        ("qncd.recipe", "from qncd.models import registry", False),
        ("qncd.options", "from qncd.io.yaml_files import read_yaml", True),
        ("qncd.io.yaml_files", "from qncd.options import option", False),
        ("qncd.io.images", "from qncd.models import registry", False),
        ("qncd.models.original.ddim", "from qncd.io.images import save", True),
        ("qncd.models.original.ddim", "from qncd.metrics.fid import fid", False),
        ("qncd.metrics.fid", "from ..models import ddim", False),
        ("qncd.quant.affine", "import torch", True),
        ("qncd.quant.affine", "from . import observers", True),
        ("qncd.quant.affine", "from qncd import io", False),
        ("qncd.quant.affine", "def f():\n    from qncd.models import ddim", False),
        ("qncd.quant.affine", "if TYPE_CHECKING:\n    from qncd.ptq import smoothing", False),
        ("qncd.sampling.samplers", "from qncd.rng import generators", True),
        ("qncd.sampling.samplers", "from qncd.quant.affine import fake_quantize", False),
        ("qncd.sampling.samplers", "from qncd.sampling.corrector import Corrector", True),
        ("qncd.sampling.samplers", "from qncd.sampling.correctors.runtime import RuntimeNoise", False),
        ("qncd.sampling.samplers", "from .correctors.runtime import RuntimeNoise", False),
        ("qncd.sampling.correctors.runtime", "from ..samplers import ddim", False),
        ("qncd.ptq.stages.smoothing", "from qncd.quant.layers import QuantLinear\nfrom qncd.models import ddim", True),
        ("qncd.ptq.stages.smoothing", "from qncd import app", False),
        ("qncd.ptq.stages.smoothing", "from qncd import quantize_", False),
        ("qncd.ptq.stages.smoothing", "from qncd import __version__", True),
        ("qncd.ptq.stages.smoothing", 'importlib.import_module("qncd.app.parser")', False),
        ("qncd.app.parser", "from qncd.ptq import smoothing", True),
        ("qncd.app.job", "from qncd.app.commands import sample", False),
        ("qncd.benchmark.plan", "from qncd.app.commands import sample", False),
        ("qncd.app.commands.sample", "from qncd.benchmark import plan\nfrom qncd.app import parser", True),
        ("qncd.misc", "", False),
        ("qncd.ptq.stages.smoothing", "from qncd.misc import helper", False),
    ],
)
def test_layering_rules(name: str, source: str, allowed: bool) -> None:
    assert (not layering_faults(name, ast.parse(source))) is allowed


@pytest.mark.parametrize("name", [name for name in LIGHT_MODULES if name in MODULES])
def test_light_modules_import_nothing_heavy(name: str) -> None:
    """Importing the module, and so everything of qncd that it imports, needs the standard library and yaml only."""
    pending, seen = [name], set()
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        if "." in module:
            pending.append(module.rpartition(".")[0])  # importing a module runs the packages above it
        for line, target, attribute in imports_of(module, parse(module), on_import_only=True):
            top = target.split(".")[0]
            if top == "qncd":
                reached = target_module(target, attribute)
                pending.extend([reached] if reached in MODULES else [])
            else:
                light = top in sys.stdlib_module_names or top in LIGHT_THIRD_PARTY
                assert light, f"{module}:{line}: imports {target} when {name} is imported: import it where it is used"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another in a circle: what is left when those without imports are taken away again and again."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return [sorted(left)] if left else []


def test_no_module_imports_itself_through_others() -> None:
    """Imports under TYPE_CHECKING and inside functions count too."""
    graph = {
        name: {target_module(module, attribute) for _, module, attribute in imports_of(name, parse(name))}
        & MODULES.keys() - {name}
        for name in MODULES
    }
    assert not circles(graph), circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()})
    assert not circles({"a": {"b"}, "b": {"c"}, "c": set()})


def test_quantization_knows_no_architecture() -> None:
    for name in MODULES:
        if name.startswith("qncd.quant"):
            assert not any(module.startswith("diffusers") for _, module, _ in imports_of(name, parse(name))), name


def test_arguments_of_the_command_line_stay_in_the_app() -> None:
    for name in MODULES:
        reads = any(module == "argparse" for _, module, _ in imports_of(name, parse(name)))
        assert not reads or name.startswith("qncd.app"), f"{name} imports argparse: below qncd/app there is no command line"


MAX_PARAMETERS = 8
KERNELS = "qncd.engines.triton"  # kernels take every stride


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len(given) - (bool(given) and given[0].arg in ("self", "cls"))


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(KERNELS)])
def test_functions_take_few_parameters(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = parameters(node)
            assert count <= MAX_PARAMETERS, (
                f"{name}:{node.lineno}: {node.name} has {count} parameters, allowed are {MAX_PARAMETERS}"
            )


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines, allowed are {MAX_LINES}: split it"


SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for path in (*sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "tools").glob("*.py")), ROOT / "evaluator.py")
    if path.is_file()
]

# Runs a script as `python SCRIPT --help` does, then says what it printed and which modules that loaded.
_REPORT_MODULES = """
import contextlib, io, json, os, runpy, sys, time
script = sys.argv[1]
sys.argv = [script, "--help"]
sys.path.insert(0, os.path.dirname(script))
status, said = None, io.StringIO()
with contextlib.redirect_stdout(said):
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"status": status or 0, "said": said.getvalue(), "modules": modules, "seconds": time.process_time()}))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if not script.startswith("tools/")])
def test_scripts_are_thin(script: str) -> None:
    """Their bodies are in the package, so that an installed wheel has all of them."""
    lines = len((ROOT / script).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_SCRIPT_LINES, f"{script} has {lines} lines, allowed are {MAX_SCRIPT_LINES}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_loads_nothing_heavy(script: str) -> None:
    result = run_python("-c", _REPORT_MODULES, str(ROOT / script))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["seconds"] < 2  # of the processor: on a machine that does other things too, it takes longer than these
    assert report["status"] == 0 and report["said"].startswith("usage: ")
    assert not set(HEAVY) & set(report["modules"])
