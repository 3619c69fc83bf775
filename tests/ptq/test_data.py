"""The calibration set: its parts, its files, and how it is collected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_networks import CONTEXT

from qncd.models.network import network_of
from qncd.ptq.data import CalibrationCollector, CalibrationSet, load_calibration, save_calibration
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.recipe import QuantConfig
from qncd.sampling.samplers import StepState
from qncd.sampling.schedule import Step


def make_set(count: int = 13, channels: int = 3) -> CalibrationSet:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, channels, 8, 8, generator=generator) * torch.linspace(0.2, 3, count).view(-1, 1, 1, 1)
    return CalibrationSet(x, torch.randint(0, 1000, (count,), generator=generator))


def test_bad_inputs_are_refused() -> None:
    x = torch.zeros(2, 3, 8, 8)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^the calibration inputs hold NaN or infinity$"):
        CalibrationSet(x, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("shape", "extra", "message"),
    [
        ((0, 3, 8, 8), {}, r"^calibration inputs of shape \(0, 3, 8, 8\): expected \(N, \.\.\.\), N 1 or more$"),
        ((2,), {}, r"^calibration inputs of shape \(2,\): expected"),
        ((2, 3, 8, 8), {"t": torch.zeros(3)}, r"^calibration t has 3 entries for 2 inputs$"),
        ((2, 3, 8, 8), {"inputs": {"context": torch.zeros(3, 4)}}, r"^calibration context has 3 entries for 2 inputs$"),
        ((2, 3, 8, 8), {"inputs": {"scale": torch.zeros(())}}, r"^calibration scale has no entries for 2 inputs$"),
        ((2, 3, 8, 8), {"uncond": {"context": torch.zeros(5)}}, r"^calibration context has 5 entries for 2 inputs$"),
        ((2, 3, 8, 8), {"uncond": {"context": torch.zeros(2)}}, r"^calibration uncond has \['context'\], inputs have \[\]$"),
        ((2, 3, 8, 8), {"inputs": torch.zeros(2, 4)}, r"^calibration inputs: expected a mapping from names to tensors"),
    ],
)
def test_parts_have_to_fit(shape: tuple[int, ...], extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationSet(torch.zeros(shape), **{"t": torch.zeros(shape[0]), **extra})


def test_batches_stack_both_halves_of_guidance() -> None:
    data = make_set(5)
    data = CalibrationSet(data.x, data.t, {CONTEXT: torch.arange(5.0)[:, None]}, {CONTEXT: -torch.arange(5.0)[:, None]})
    assert (len(data), data.passed) == (5, 10)
    x, t, given = next(iter(data.batches(2)))
    assert torch.equal(x, torch.cat([data.x[:2]] * 2)) and torch.equal(t, torch.cat([data.t[:2]] * 2))
    assert given.keys() == {CONTEXT} and given[CONTEXT].flatten().tolist() == [0, 1, 0, -1]
    assert [len(batch[0]) for batch in data.batches(2)] == [4, 4, 2]


def test_a_set_of_another_model_is_refused(make_unet: Any, make_cross_unet: Any) -> None:
    data, unet = make_set(), make_unet()
    with pytest.raises(ValueError, match=r"^ranges are found for a model prepared by quantize_$"):
        calibrate_(unet, data, QuantConfig(4, 8))
    message = r"^the calibration set holds inputs of shape \(4, 8, 8\), the model takes \(3, 8, 8\)$"
    with pytest.raises(ValueError, match=message):
        calibrate_(quantize_(unet, QuantConfig(4, 8)), make_set(channels=4), QuantConfig(4, 8))
    with pytest.raises(ValueError, match=r"the model takes \(3, 16, 16\)$"):
        data.check_model(network_of(make_unet(sample_size=16)))
    with pytest.raises(ValueError, match=r"^the calibration set has no encoder_hidden_states, the model needs them$"):
        make_set(channels=4).check_model(network_of(make_cross_unet()))
    known = CalibrationSet(data.x, data.t, model_hash="a" * 64)
    known.check_model(network_of(unet), "a" * 64)
    known.check_model(network_of(unet))
    with pytest.raises(ValueError, match=r"another model \(weights aaaaaaaaaaaa, this one bbbbbbbbbbbb\)$"):
        known.check_model(network_of(unet), "b" * 64)


def test_one_set_of_conditions_serves_every_time_step(tmp_path: Path) -> None:
    """Contexts of a text model are large: they are held once, in memory and in the file, and read back so."""
    data = make_set(6)
    cond, uncond = torch.randn(3, 77, 12), torch.randn(1, 77, 12)
    data = CalibrationSet(data.x, torch.tensor([900] * 3 + [100] * 3), {CONTEXT: cond}, {CONTEXT: uncond})
    for x, _, given in data.batches(2):
        contexts = given[CONTEXT]
        assert len(contexts) == len(x) == 4 and torch.equal(contexts[2:], uncond.expand(2, -1, -1))
    part = data.subset(torch.tensor([1, 5]))
    assert torch.equal(part.inputs[CONTEXT], cond[[1, 2]])
    save_calibration(data, tmp_path / "set.pt")
    plain = torch.load(tmp_path / "set.pt", weights_only=True)  # as Q-Diffusion reads it
    assert [c.shape for c in plain["cs"]] == [c.shape for c in plain["ucs"]] == [(3, 77, 12)] * 2
    assert torch.equal(plain["cs"][1], cond) and torch.equal(plain["ucs"][1], uncond.expand(3, -1, -1))
    assert (tmp_path / "set.pt").stat().st_size < 4 * (data.x.numel() + cond.numel() + uncond.numel()) + 8000
    back = load_calibration(tmp_path / "set.pt", samples=3, steps=2)
    assert torch.equal(back.inputs[CONTEXT], cond)
    assert back.uncond is not None and torch.equal(back.uncond[CONTEXT], uncond)


def test_file_round_trip(tmp_path: Path) -> None:
    times = torch.tensor([900, 900, 500, 500, 10, 10])
    data = make_set(6)
    data = CalibrationSet(data.x, times, {CONTEXT: torch.randn(6, 5, 12)}, {CONTEXT: torch.randn(6, 5, 12)}, model_hash="f" * 64)
    save_calibration(data, tmp_path / "deep" / "set.pt")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set.pt"]
    back = load_calibration(tmp_path / "deep" / "set.pt", samples=2, steps=3)
    for name in ("x", "t"):
        assert torch.equal(getattr(back, name), getattr(data, name)), name
    assert back.uncond is not None and data.uncond is not None and back.uncond.keys() == back.inputs.keys() == {CONTEXT}
    assert torch.equal(back.inputs[CONTEXT], data.inputs[CONTEXT]) and torch.equal(back.uncond[CONTEXT], data.uncond[CONTEXT])
    assert back.model_hash == data.model_hash
    less = load_calibration(tmp_path / "deep" / "set.pt", samples=1, steps=2)
    assert less.t.tolist() == [900, 500] and torch.equal(less.x, data.x[[0, 2]])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("conditions", [False, True])
def test_q_diffusion_files_are_read(tmp_path: Path, stacked: bool, conditions: bool) -> None:
    """Lists with one entry a time step, or the same stacked to one tensor; evenly spread steps are taken."""
    steps, count = 10, 4
    content: dict[str, Any] = {
        "xs": [torch.full((count, 3, 8, 8), float(i)) + torch.arange(count).view(-1, 1, 1, 1) / 10 for i in range(steps)],
        "ts": [torch.full((count,), 100 * (steps - 1 - i)) for i in range(steps)],
    }
    if conditions:
        content["cs"] = [torch.full((count, 5, 12), float(i)) for i in range(steps)]
        content["ucs"] = [torch.full((count, 5, 12), -float(i)) for i in range(steps)]
    if stacked:
        content = {key: torch.stack(value) for key, value in content.items()}
    torch.save(content, tmp_path / "cali.pt")
    data = load_calibration(tmp_path / "cali.pt", samples=3, steps=4)
    chosen = [0, 2, 5, 7]
    assert data.t.tolist() == [900 - 100 * i for i in chosen for _ in range(3)] and data.t.dtype == torch.int64
    torch.testing.assert_close(data.x[:, 0, 0, 0], torch.tensor([i + j / 10 for i in chosen for j in range(3)]))
    assert bool(data.inputs) == (data.uncond is not None) == conditions and data.model_hash is None
    if data.uncond is not None:
        assert torch.equal(data.inputs[CONTEXT], -data.uncond[CONTEXT]) and data.inputs[CONTEXT][::3, 0, 0].tolist() == chosen


@pytest.mark.parametrize(
    ("content", "samples", "steps", "message"),
    [
        ({"xs": [torch.zeros(2, 3, 8, 8)] * 3, "ts": [torch.zeros(2)] * 3}, 2, 4,
         "holds 3 time steps, --cali_st 4 asked for; allowed are 1 to 3"),
        ({"xs": [torch.zeros(2, 3, 8, 8)] * 3, "ts": [torch.zeros(2)] * 3}, 5, 3,
         "xs holds 2 inputs a time step, --cali_n 5 asked for"),
        ({"xs": [torch.zeros(2, 3, 8, 8)] * 2, "ts": [torch.zeros(2)] * 3}, 2, 2, "2 entries in xs, 3 in ts"),
        ({"xs": [torch.zeros(2, 3, 8, 8)], "ts": [torch.tensor(1)]}, 1, 1, "ts holds 1 inputs a time step, --cali_n 1 asked for"),
        ({"x": []}, 1, 1, "not a calibration set (expected a dict with lists xs and ts, one entry a time step)"),
        ([1, 2], 1, 1, "not a calibration set (expected a dict with lists xs and ts, one entry a time step)"),
    ],
)  # fmt: skip
def test_files_that_do_not_do(tmp_path: Path, content: Any, samples: int, steps: int, message: str) -> None:
    path = tmp_path / "cali.pt"
    torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        load_calibration(path, samples, steps)
    assert str(caught.value) == f"{path}: {message}"


def test_bad_counts(tmp_path: Path) -> None:
    for samples, steps, name in ((0, 1, "cali_n"), (1, 0, "cali_st")):
        with pytest.raises(ValueError, match=rf"^{name} 0: allowed are whole numbers, 1 or more$"):
            load_calibration(tmp_path / "none.pt", samples, steps)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_calibration(tmp_path / "none.pt", 1, 1)


def test_the_collector_keeps_evenly_spread_steps() -> None:
    collector = CalibrationCollector(10, 3)
    for start in (0, 4):
        for index in range(10):
            x = torch.full((2, 3, 1, 1), float(start + index))
            step = Step(index, 900 - 100 * index, 800 - 100 * index, 0.5, 0.6, 0.7, 0.8, 0.0, 0.0)
            collector(StepState(step=step, x=x, eps=-x, corrected=-x, x0=-x, x_prev=-x))
    data = collector.result({"labels": torch.arange(4.0)}, model_hash="h")
    assert data.t.tolist() == [800] * 4 + [400] * 4 + [100] * 4  # steps 1, 5 and 8: the middles of three parts
    assert data.x[:, 0, 0, 0].tolist() == [1, 1, 5, 5, 5, 5, 9, 9, 8, 8, 12, 12]
    assert data.inputs["labels"].tolist() == [0, 1, 2, 3]
    assert [given["labels"].tolist() for _, _, given in data.batches(6)] == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]
    assert data.model_hash == "h"
    for steps in (0, 11):
        with pytest.raises(ValueError, match=rf"^cali_st {steps}: the sampler takes 10 steps; allowed are 1 to 10$"):
            CalibrationCollector(10, steps)


def listed(**changes: Any) -> dict[str, Any]:
    """Three entries of two inputs each."""
    content = {"xs": [torch.zeros(2, 3, 8, 8)] * 3, "ts": [torch.full((2,), t) for t in (9, 5, 1)], "cs": [torch.zeros(2, 4)] * 3}
    return {**content, **changes}


X, NAN = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xs": [X, NAN, X]}, "xs of step 1: holds NaN or infinity"),
        ({"xs": [X, X, X[..., :4]]},
         "xs of step 2: (2, 3, 8, 4) of torch.float32, that of step 0 is (2, 3, 8, 8) of torch.float32"),
        ({"xs": [X, X, X.half()]},
         "xs of step 2: (2, 3, 8, 8) of torch.float16, that of step 0 is (2, 3, 8, 8) of torch.float32"),
        ({"xs": [X.long()] * 3}, "xs of step 0: (2, 3, 8, 8) of torch.int64, expected floats (n, ...)"),
        ({"xs": [torch.zeros(2)] * 3}, "xs of step 0: (2,) of torch.float32, expected floats (n, ...)"),
        ({"xs": ["a"] * 3}, "xs of step 0: expected numbers, not a str"),
        ({"xs": 5}, "xs: expected a list with one entry a time step, not a int"),
        ({"xs": {"a": 1}}, "xs: expected a list with one entry a time step, not a dict"),
        ({"ts": torch.tensor(3)}, "ts: expected a list with one entry a time step, not a Tensor"),
        ({"ts": [torch.tensor([9, 8])] * 3}, "ts of step 0: expected one time step, the same for all inputs"),
        ({"ts": [torch.tensor([[9], [9]])] * 3}, "ts of step 0: expected one time step, the same for all inputs"),
        ({"ts": [torch.tensor([-1, -1])] * 3}, "ts of step 0: -1, allowed are time steps from 0 to 1e+06"),
        ({"ts": [torch.tensor([torch.nan] * 2)] * 3}, "ts of step 0: holds NaN or infinity"),
        ({"cs": [torch.zeros(2, 4)] * 2}, "2 entries in cs, 3 in ts"),
        ({"cs": [torch.zeros(1, 4)] * 3}, "cs holds 1 inputs a time step, --cali_n 2 asked for"),
        ({"cs": [torch.full((2, 4), torch.inf)] * 3}, "cs of step 0: holds NaN or infinity"),
        ({"cs": [torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, 4)]},
         "cs of step 1: (2, 5) of torch.float32, that of step 0 is (2, 4) of torch.float32"),
        ({"cs": None, "inputs": [1]}, "inputs: expected lists by name, not a list"),
        ({"cs": None, "inputs": {3: []}}, "inputs: expected names of arguments of the network"),
        ({"condition": ["a"]}, "condition: expected the name of an argument of the network"),
        ({"condition": "a\nb"}, "condition: expected the name of an argument of the network"),
        ({"ucs": [torch.zeros(2, 4)] * 3, "cs": None}, "calibration uncond has ['encoder_hidden_states'], inputs have []"),
    ],
)  # fmt: skip
def test_entries_that_do_not_do(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "cali.pt"
    torch.save(listed(**changes), path)
    with pytest.raises(ValueError) as caught:
        load_calibration(path, 2, 3)
    assert str(caught.value) == f"{path}: {message}"


def test_conditions_hold_numbers() -> None:
    with pytest.raises(ValueError, match=r"^calibration context holds NaN or infinity$"):
        CalibrationSet(torch.zeros(2, 3), torch.zeros(2), {"context": torch.full((1, 4), torch.nan)})


def test_equal_sets_are_written_as_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        save_calibration(make_set(), tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_half_precision_and_arrays_are_read(tmp_path: Path) -> None:
    content = {"xs": [torch.ones(2, 3, 4, 4).half()] * 2, "ts": [np.array([0.5, 0.5])] * 2}
    torch.save(content, tmp_path / "cali.pt")
    data = load_calibration(tmp_path / "cali.pt", 2, 2)
    assert data.x.dtype == data.t.dtype == torch.float32 and data.t.tolist() == [0.5] * 4


@pytest.mark.parametrize(("steps", "samples", "count"), [(20, 64, 320), (10, 64, 320), (10, 64, 128), (10, 32, 80), (20, 16, 40)])
def test_a_part_is_of_all_time_steps_and_of_all_trajectories(steps: int, samples: int, count: int) -> None:
    """Also where the set's length is a multiple of the part's: every second or fourth input would be the same trajectories'."""
    trajectories = torch.arange(samples).repeat(steps)
    data = CalibrationSet(trajectories.float()[:, None], torch.arange(steps).repeat_interleave(samples))
    part = data.spread(count)
    rows = part.t * samples + part.x[:, 0].long()
    assert len(part) == count and bool((rows.diff() > 0).all())
    at = part.t.bincount(minlength=steps)
    assert int(at.max() - at.min()) <= 2
    seen = part.x[:, 0].long().bincount(minlength=samples)
    assert int((seen > 0).sum()) >= 0.75 * min(samples, count) and int(seen.max()) <= 3 * count / samples + 1


def test_a_part_of_everything_is_everything() -> None:
    data = make_set(13)
    for count in (13, 20):
        part = data.spread(count)
        assert torch.equal(part.x, data.x) and torch.equal(part.t, data.t)
    assert torch.equal(data.spread(1).x, data.x[:1])
