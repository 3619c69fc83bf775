"""The speed benchmark's whole command lines are command lines of `qncd`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qncd.app import console
from qncd.benchmark import speed


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
