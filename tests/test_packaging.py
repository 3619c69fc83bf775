"""The packaging files agree with one another, and files in the repository keep to what a parser can check."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    captured: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: captured.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def ranges(lines: list[str]) -> dict[str, SpecifierSet]:
    """Requirement lines as canonical name -> allowed versions; a name must not come twice."""
    parsed = [Requirement(line) for line in lines]
    by_name = {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}
    assert len(by_name) == len(parsed), f"a package is named twice: {sorted(lines)}"
    return by_name


def repository_files() -> list[Path]:
    """Files that are tracked or would be, as git sees it; every file where this is no git checkout."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return [path for path in ROOT.rglob("*") if path.is_file()]
    return [path for name in sorted(set(listing.split("\0")) - {""}) if (path := ROOT / name).is_file()]


def python_trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in repository_files():
        if path.suffix == ".py":
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_requirement_has_a_range(setup_arguments: dict[str, Any]) -> None:
    for name, specifier in ranges(setup_arguments["install_requires"]).items():
        operators = {part.operator for part in specifier}
        assert operators == {">=", "<"}, f"{name}{specifier}: expected a lower and an upper bound"


def test_version_is_the_one_in_the_package(setup_arguments: dict[str, Any]) -> None:
    text = (ROOT / "qncd" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE) == [setup_arguments["version"]]


def test_citation_is_of_this_version(setup_arguments: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert [citation[key] for key in ("title", "version", "license")] == ["QNCD", setup_arguments["version"], "Apache-2.0"]
    assert citation["preferred-citation"]["url"] == setup_arguments["project_urls"]["Paper"]
    assert f"## {setup_arguments['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_issue_forms_ask_for_something() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    for form in [yaml.safe_load(path.read_text(encoding="utf-8")) for path in forms]:
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert form["name"] and form["description"] and len({field["id"] for field in fields}) == len(fields) > 0
        assert all(field["attributes"]["label"] for field in fields)
    assert len(forms) == 3


def test_every_package_folder_is_installed(setup_arguments: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "qncd").rglob("*.py")}
    assert set(setup_arguments["packages"]) == {folder.replace("/", ".") for folder in folders} | {"qncd.configs"}
    assert setup_arguments["package_dir"] == {"qncd.configs": "configs"}


def test_environment_agrees_with_setup(setup_arguments: dict[str, Any]) -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip_lines,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "-e ." in pip_lines
    listed = ranges([line for line in pip_lines if not line.startswith("-")])
    assert listed == ranges(setup_arguments["install_requires"] + setup_arguments["extras_require"]["test"])

    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(setup_arguments["python_requires"])


def test_constraints_satisfy_setup(setup_arguments: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = ranges([line for line in lines if line and not line.startswith("#")])
    for name, specifier in pins.items():
        assert [part.operator for part in specifier] == ["=="], f"{name}{specifier}: expected one exact version"
    allowed = ranges(setup_arguments["install_requires"] + setup_arguments["extras_require"]["test"])
    for name, specifier in allowed.items():
        assert name in pins, f"constraints.txt does not pin {name}"
        (pin,) = pins[name]
        assert pin.version in specifier, f"constraints.txt has {name}{pin}, setup.py allows {specifier}"


def test_configs_parse() -> None:
    configs = [path for path in repository_files() if (ROOT / "configs") in path.parents and path.suffix != ".md"]
    assert configs
    for path in configs:
        assert path.suffix in {".yml", ".yaml"}, f"{path.relative_to(ROOT)}: configs are yaml files"
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), f"{path.relative_to(ROOT)}: not a mapping"


def forbidden(node: ast.AST) -> str | None:
    """What is wrong with this node by the project's rules, if anything."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            return ".cuda(): the device comes from the model or the command line, use .to(device)"
        for keyword in node.keywords:
            if keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and not keyword.value.value:
                return "weights_only=False runs code from the file it loads"
    return None


def test_no_forbidden_code() -> None:
    found = [
        f"{path}:{getattr(node, 'lineno', 0)}: {message}"
        for path, tree in python_trees()
        for node in ast.walk(tree)
        if (message := forbidden(node))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x.cuda()", 1),
        ("model.half().cuda(0)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("try:\n    f()\nexcept:\n    pass", 1),
        ("try:\n    f()\nexcept OSError:\n    pass", 0),
        ("torch.cuda.is_available()  # not .cuda()", 0),
    ],
)
def test_forbidden_code_is_seen(source: str, expected: int) -> None:
    assert sum(forbidden(node) is not None for node in ast.walk(ast.parse(source))) == expected
