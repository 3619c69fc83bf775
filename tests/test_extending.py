"""The examples of docs/extending.md, run as they stand: each adds its line to a registry and is used through the API."""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import qncd
from qncd.engines import registry as engine_registry
from qncd.models import network as network_registry
from qncd.ptq.stages import registry as stage_registry
from qncd.recipe import QuantConfig, Recipe
from qncd.sampling.correctors import registry as corrector_registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n# (qncd/[\w/]+\.py)[^\n]*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run_example(path: str, **names: Any) -> dict[str, Any]:
    """The example's file as a module that can be imported by its name, then its line in a registry."""
    place = next(i for i, (name, _) in enumerate(BLOCKS) if name == path)
    room = types.ModuleType(path.removesuffix(".py").replace("/", "."))
    sys.modules[room.__name__] = room
    exec(compile(BLOCKS[place][1], path, "exec"), room.__dict__)
    exec(compile(BLOCKS[place + 1][1], BLOCKS[place + 1][0], "exec"), {**room.__dict__, **names})
    return room.__dict__


@pytest.fixture(autouse=True)
def registries_restored() -> Iterator[None]:
    modules = set(sys.modules)
    tables = (corrector_registry.CORRECTORS, engine_registry.ENGINES, network_registry.FAMILIES)
    before, stages = [dict(table) for table in tables], list(stage_registry.STAGES)
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)  # type: ignore[arg-type]
    stage_registry.STAGES[:] = stages
    for name in set(sys.modules) - modules:
        if name.startswith("qncd."):
            del sys.modules[name]


def inputs(unet: Any, count: int = 8) -> qncd.CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, unet.config.in_channels, 8, 8, generator=generator)
    return qncd.CalibrationSet(x, torch.arange(count) * 100)


def test_a_corrector(make_unet: Any, tmp_path: Path) -> None:
    example = run_example("qncd/sampling/correctors/mean_error.py", CORRECTORS=corrector_registry.CORRECTORS)
    unet = make_unet()
    recipe = Recipe(mode="linear", quant=QuantConfig(4, 8), offline="mean_error").with_calibration(samples=4)
    qncd.quantize(unet, recipe=recipe, calibration=inputs(unet), scheduler=DDIMScheduler(), steps=4)
    qncd.save(unet, tmp_path)
    again = make_unet()
    assert qncd.load_quantized(again, tmp_path).offline == "mean_error"
    record = again._qncd.record
    assert isinstance(record, example["MeanErrors"]) and record.means.shape == (4,) and bool((record.means != 0).all())
    corrector = corrector_registry.corrector_of(recipe, record)
    assert corrector is not None
    step = types.SimpleNamespace(index=2)
    corrected = corrector.correct(step, torch.zeros(1), torch.zeros(1), None, None)  # type: ignore[arg-type]
    assert torch.equal(corrected.eps, -record.means[2:3])


def test_a_stage(make_unet: Any) -> None:
    run_example("qncd/ptq/stages/weight_clipping.py", STAGES=stage_registry.STAGES)
    wide, narrow = make_unet(), make_unet()
    loud = make_unet().mid_block.resnets[0].conv1.weight
    report = qncd.quantize(narrow, "W4A8", "linear", calibration=inputs(narrow))
    assert report.found["weight_clipping"] == 1.5
    assert "weight_clipping" not in qncd.quantize(wide, "W8A8", "linear", calibration=inputs(wide)).found
    clipped = narrow.mid_block.resnets[0].conv1
    limit = 1.5 * float(loud.std())
    assert float(loud.abs().max()) > limit  # something is clipped
    assert float(clipped.weight.abs().max()) <= limit + float(clipped.weight_scale.max())


def test_an_engine(make_unet: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    run_example("qncd/engines/onnx_reference.py", ENGINES=engine_registry.ENGINES)
    unet = make_unet()
    data = inputs(unet)
    qncd.quantize(unet, "W8A8", "linear", calibration=data)
    qncd.export(unet, tmp_path, engine="onnx_reference")
    engine = qncd.open_engine(unet, tmp_path, "onnx_reference")
    expected, found = unet(data.x, data.t).sample, engine(data.x, data.t).sample
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
    assert "onnx_reference" in engine_registry.engine_names()


def test_a_family(caplog: pytest.LogCaptureFixture) -> None:
    example = run_example("qncd/models/families/tiny.py", FAMILIES=network_registry.FAMILIES)
    torch.manual_seed(0)
    plain, smoothed = example["TinyDenoiser"](), example["TinyDenoiser"]()
    smoothed.load_state_dict(plain.state_dict())
    x, t = torch.randn(16, 16), torch.arange(16) * 60
    data = qncd.CalibrationSet(x, t)
    exact = plain(x, t)[0]
    with caplog.at_level(logging.WARNING, "qncd"):
        report = qncd.quantize(smoothed, "W8A8", "qncd", calibration=data)
    assert "no family" not in caplog.text
    assert any("tracking" in text for text in report.left_out)  # a bare denoiser has no sampler to correct in
    assert smoothed.block.outer.smoothing is not None and smoothed.block.inner.smoothing is None
    assert float((smoothed(x, t)[0] - exact).detach().norm() / exact.norm()) < 0.05
    units = network_registry.network_of(smoothed).blocks()
    assert list(units) == ["block", "last"]


def test_every_example_is_run() -> None:
    files = [path for path, _ in BLOCKS if not path.endswith(("registry.py", "network.py"))]
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(files) == 4 and all(path in source for path in files)
