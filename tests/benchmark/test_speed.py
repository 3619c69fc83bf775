"""The speed benchmark's whole command lines are command lines of `qncd`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_pipelines import made

from qncd.app import console
from qncd.app.commands import benchmark_speed
from qncd.benchmark import large_speed, speed
from qncd.models.network import Network, network_of
from qncd.models.seen import remember_inputs
from qncd.ptq.data import CalibrationSet


def test_jobs_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def run(name: str, *flags: object) -> float:
        main, args = console.parse([name, *map(str, flags)])
        called.append((main.__module__.rpartition(".")[2], getattr(args, "backend", None)))
        return 1.0 if getattr(args, "backend", "torch") == "torch" else 0.5

    monkeypatch.setattr(speed, "_run_command", run)
    module = SimpleNamespace(save_pretrained=lambda folder: None)
    monkeypatch.setattr(speed, "_cifar", lambda: SimpleNamespace(module=module))
    figures = speed.measure_jobs(rounds=1, images=4)
    assert called == [
        (module, backend)
        for sampler in ("sample_ddim", "txt2img")
        for module, backend in ((sampler, "torch"), ("export", None), (sampler, "torch"), (sampler, "openvino"))
    ]
    assert figures["cifar_size_job_speedup"] == figures["txt2img_job_speedup"] == 2
    assert figures["txt2img_int8_images_per_second"] == 8


def test_networks_at_full_size_are_parts_of_the_command() -> None:
    assert tuple(large_speed.LARGE) == benchmark_speed.LARGE
    assert set(benchmark_speed.LARGE) < set(benchmark_speed.PARTS)


def test_a_contest_of_a_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A small one in the place of that at full size, exported in this process."""

    def small() -> tuple[Network, CalibrationSet]:
        network = network_of(made("DiT").transformer)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        data = CalibrationSet(x, torch.tensor(large_speed.TIMES), {"class_labels": torch.tensor([7, 1000])})
        remember_inputs(network, data.x, data.t, data.inputs, {})
        return network, data

    def here(target: Any, args: Any) -> Any:
        return SimpleNamespace(start=lambda: target(*args), join=lambda: None, exitcode=0)

    monkeypatch.setitem(large_speed.LARGE, "transformer", small)
    monkeypatch.setattr(large_speed.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=here))
    figures = large_speed.measure_large("transformer", 1, 1)
    text = capsys.readouterr().out
    assert figures["transformer_torch_fp32_speedup"] == 1 and figures["transformer_openvino_int8_speedup"] > 0
    assert "transformer, openvino int8 " in text
    assert ("transformer_int8_over_openvino_bf16" in figures) != ("note: openvino bf16: " in text)
