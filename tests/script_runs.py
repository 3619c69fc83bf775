"""A way to run a script or a tool in this process, which test folders share."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qncd.app import stopping

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: Path) -> ModuleType:
    """A script or tool as a module of its name, not run as a command."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def run_in_process(name: str, *arguments: object, status: int = 0, folder: str = "scripts") -> str:
    """Run a script in this process (importing torch anew takes seconds); returns what it wrote to stderr."""
    script, stderr, code = ROOT / folder / name, io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in stopping.NUMBERS}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert code == status, stderr.getvalue()
    return stderr.getvalue()
