"""Engines are found by name, and one more is a class and a line of the registry."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_networks import assert_same_in_integers, call, inputs, prepared
from torch import Tensor

from qncd.engines.engine import check_engine, engine_of, export, file_engines, open_engine
from qncd.engines.network import EngineNetwork
from qncd.engines.onnx.engine import ArraySession, OnnxEngine
from qncd.engines.onnx.model import FILE
from qncd.engines.registry import ENGINES, PRECISIONS, engine_names
from qncd.models.network import Network
from qncd.recipe import QuantConfig

ROOT = Path(__file__).resolve().parents[2]


class Reference(OnnxEngine):
    """ONNX's own reference implementation: slow, in NumPy."""

    name = "reference"
    packages = ("onnx",)

    def session(self, folder: Path, threads: int, precision: str = "fp32") -> ArraySession:
        from onnx.reference import ReferenceEvaluator

        model = ReferenceEvaluator(str(folder / FILE))
        return lambda arrays: model.run(None, arrays)[0]


class Doubles:
    """The network itself in double precision: an engine that runs no file."""

    name, file, tokens, precisions = "doubles", False, False, ("fp64",)

    def check(self, precision: str) -> None:
        pass

    def open(self, network: Network, folder: Path | None, *, precision: str, threads: int | None) -> EngineNetwork:
        module: Any = copy.deepcopy(network.module).double()

        def session(inputs: dict[str, Tensor]) -> Tensor:
            doubles: Tensor = module(inputs.pop("sample").double(), **inputs).sample
            return doubles

        return EngineNetwork(network, session)


@pytest.fixture
def more_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    room = types.ModuleType("engines_of_a_test")
    for kind in (Reference, Doubles):
        setattr(room, kind.__name__, kind)
        monkeypatch.setitem(ENGINES, kind.name, f"{room.__name__}:{kind.__name__}")
    monkeypatch.setitem(sys.modules, room.__name__, room)


def test_the_registry() -> None:
    assert engine_names()[0] == "torch" and set(engine_names()[1:]) == set(ENGINES)
    for name in ENGINES:
        engine = engine_of(name)
        assert engine.name == name and set(engine.precisions) <= set(PRECISIONS)
    assert file_engines() == [name for name in ENGINES if name != "triton"]
    check_engine("torch")
    with pytest.raises(ValueError, match="fp16: allowed with backend torch is fp32; triton has fp16"):
        check_engine("torch", "fp16")
    with pytest.raises(ValueError, match="'torch': allowed are torch"):
        engine_of("torch")


def test_packages_that_are_not_there() -> None:
    """Every engine is found without them, and its check says what is missing."""
    code = """
import sys
for package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "triton"):
    sys.modules[package] = None
from qncd.engines.engine import check_engine, file_engines
check_engine("torch")
for name in file_engines():
    try:
        check_engine(name)
    except ValueError as error:
        print(name, error)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("the package onnx is not there") == len(file_engines())


@pytest.mark.usefixtures("more_engines")
def test_an_engine_more(make_unet: Any, tmp_path: Path) -> None:
    config = QuantConfig(4, 8)
    unet = prepared(make_unet(), config)
    export(unet, tmp_path, config)
    assert_same_in_integers(make_unet(), unet, open_engine(unet, tmp_path, "reference"), count=2)
    with pytest.raises(ValueError, match="backend reference needs the folder of an exported model"):
        open_engine(unet, None, "reference")


@pytest.mark.usefixtures("more_engines")
def test_an_engine_without_a_file(make_unet: Any) -> None:
    unet, data = make_unet(), inputs(make_unet(), 2)
    expected = call(unet, data)
    found = call(open_engine(unet, None, "doubles", "fp64"), data)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="fp32: allowed with backend doubles is fp64; onnxruntime, openvino"):
        check_engine("doubles")
