"""`qncd inspect`: tables of runs, checkpoints and models, and what is measured of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_pipelines
import torch
from PIL import Image
from quantized_networks import inputs, prepared

import qncd
from qncd.app import console
from qncd.app.commands import inspect
from qncd.inspection import measuring
from qncd.inspection.measuring import ChannelRanges, NoiseMeter, NoiseSums
from qncd.inspection.record import CONTROL, CORRECTED, INSPECTION_FILE, PLAIN, Inspected, NoiseAt, Smoothed
from qncd.inspection.rounding import LayerKept, rounding_of
from qncd.inspection.sources import checkpoint_in, record_of_checkpoint
from qncd.models.network import network_of
from qncd.ptq.checkpoint import save_quantized
from qncd.ptq.layer_record import PRODUCT, LayerRecord, NetworkRecord, what_layers_got
from qncd.quant.affine import SEARCH_RATIOS
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig
from qncd.report import terminal
from qncd.sampling.corrector import Corrected
from qncd.sampling.schedule import Step

LAYER = "mid_block.resnets.0.conv2"
RECORD = NetworkRecord(
    (
        LayerRecord("first", "Conv2d", 100, 8, 8, -1.0, 1.0, 1, (0.01, 0.03), 0.01, (0.02, 0.02)),
        LayerRecord("second", "Linear", 300, 4, 6, -2.5, 4.0, 2, (0.1, 0.3), 0.1, (0.3, 0.5)),
        LayerRecord("second.q", PRODUCT, 0, None, 8, -3.0, 3.0, 1),
    ),
    (900.0, 100.0), 2, (0.1, 0.3),
)  # fmt: skip


def run(*words: object) -> None:
    console.main(["inspect", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.split(": error: ", 1)[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "layers.json").write_text(json.dumps(RECORD.to_json()))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DDIM model as a folder of diffusers."""
    path = tmp_path_factory.mktemp("model") / "ddim"
    small_pipelines.made("DDIM").save_pretrained(path)
    return path


def test_layers_are_sorted_and_those_without_a_figure_come_last() -> None:
    def names(by: str | None, top: int | None = None) -> list[str]:
        return [layer.name for layer in terminal.ordered(RECORD.layers, by, top)]

    assert names(None) == ["first", "second", "second.q"]
    assert names("own") == names("gathered") == names("bits") == ["second", "first", "second.q"]
    assert names("weights", 1) == ["second"]
    assert tuple(terminal.SORTS) == inspect.SORTS


def test_a_run_as_aligned_text_and_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--sort", "own", "--top", "2", "--out", folder / "pictures")
    head, second, first, means = capsys.readouterr().out.splitlines()
    assert second.split() == ["second", "Linear", "300", "4", "6", "-2.5", "4", "20", "%", "40", "%"]
    assert len(head) == len(second) == len(first) and first.startswith("first   Conv2d ")
    assert means == (
        "in the mean: 2 layers, 400 weights, 5 bits a weight, 7.33 bits an input, own error 11 %, gathered 21 %, prediction 20 %"
    )
    assert {p.name for p in (folder / "pictures").iterdir()} == {
        INSPECTION_FILE, *(f"{n}.{s}" for n in ("layers", "map", "steps") for s in ("png", "svg")),
    }  # fmt: skip
    assert Inspected.open(folder / "pictures") == Inspected("run", RECORD, settings={"source": str(folder)})


def test_a_checkpoint_without_a_record_says_what_its_tensors_tell(
    make_unet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = QuantConfig(4, 8, bias_correction=False), tmp_path / "q.safetensors"
    network = network_of(prepared(make_unet(), config))
    save_quantized(network, path, config, "h", {})
    found = {layer.name: layer for layer in record_of_checkpoint(path).layers}
    run(path, "--top", "1")
    assert capsys.readouterr().err.startswith(f"{path}: has no record of its layers' errors")
    expected = {layer.name: layer for layer in what_layers_got(network).layers}
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert (found[name].weights, found[name].weight_bits, found[name].act_bits) == (
            layer.weights,
            layer.weight_bits,
            layer.act_bits,
        )
        assert found[name].low == pytest.approx(layer.low, rel=1e-3) and found[name].high == pytest.approx(layer.high, rel=1e-3)
    assert refused(capsys, path, "--out", tmp_path / "p").endswith(f"alone, nothing that --out {tmp_path / 'p'} could hold")
    assert refused(capsys, path, "--layer", LAYER) == f"--layer is for a model, and {path} is a quantized checkpoint"
    save_quantized(network, path, config, "h", {}, None, RECORD)
    assert record_of_checkpoint(path) == RECORD


def test_a_folder_of_a_quantized_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint in it, in one file or in parts."""
    pipe = small_pipelines.made("DDIM")
    qncd.quantize(pipe, "W4A8", "linear", calls=[small_pipelines.KINDS["DDIM"].call], steps=2)
    qncd.save(pipe, tmp_path / "pipe")
    pipe.unet.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    expected = {layer.name for layer in record_of_checkpoint(checkpoint_of(tmp_path / "pipe")).layers}
    assert {*quant_layers(pipe.unet)} <= expected
    assert {layer.name for layer in record_of_checkpoint(checkpoint_of(tmp_path / "parts")).layers} == expected
    run(tmp_path / "pipe", "--top", "1")
    assert "in the mean:" in capsys.readouterr().out
    small_pipelines.made("DDIM").save_pretrained(tmp_path / "float")
    assert checkpoint_in(tmp_path / "float") is None


def checkpoint_of(folder: Path) -> Path:
    found = checkpoint_in(folder)
    assert found is not None
    return found


def test_a_model_is_quantized_and_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Inspected] = []
    look = measuring.Inspection.look
    monkeypatch.setattr(measuring.Inspection, "look", lambda self: seen.append(look(self)) or seen[-1])
    out = tmp_path / "out"
    run(model, "--width", "W8A8", "--mode", "ptqd", "--samples", "4", "--steps", "3", "--layer", LAYER, "--out", out)
    text = capsys.readouterr().out
    assert LAYER in text and "in the mean:" in text
    names = ("layers", "map", "steps", "smoothing", "noise", "layer")
    assert {p.name for p in out.iterdir()} == {INSPECTION_FILE, *(f"{n}.{s}" for n in names for s in ("png", "svg"))}
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 500 and np.asarray(picture.convert("L")).std() > 5
    (found,) = seen
    assert set(found.noise) == {PLAIN, CORRECTED, CONTROL} and all(list(steps) == [0, 1, 2] for steps in found.noise.values())
    assert found.layer is not None and found.layer.bits == 8 and found.smoothed is not None and not found.smoothed.used
    weights, acts = found.layer.searches
    assert weights.errors.shape == (len(SEARCH_RATIOS), 32) and acts.errors.shape[1] == 1
    picked = torch.tensor(SEARCH_RATIOS)[weights.errors.argmin(0)]
    assert torch.allclose(weights.chosen, picked, atol=1e-4), "what the search chose is where its curve is lowest"
    again = Inspected.open(out)
    assert (again.label, again.record) == ("ddim: W8A8 ptqd", found.record) and again.smoothed is not None
    assert again.smoothed.ranges.keys() == found.smoothed.ranges.keys() and again.smoothed.most == found.smoothed.most
    assert again.noise[PLAIN][1].snr == pytest.approx(found.noise[PLAIN][1].snr, rel=1e-4)
    assert again.layer is not None and torch.equal(again.layer.exact.counts, found.layer.exact.counts.double())
    assert torch.allclose(again.layer.searches[0].errors, weights.errors.double(), rtol=1e-4)
    assert again.settings["source"] == str(model) and again.settings["sampler"] == {"timesteps": 3}
    assert again.settings["quantization"]["mode"] == "ptqd" and again.settings["calibration"]["samples"] == 4
    console.main(["report", str(out), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Smoothing, noise and rounding",
        "out: ddim: W8A8 ptqd",
        "Error by time step",
        f"Layers of {out.name}",
        "Settings",
    ):
        assert heading in page
    for label in ("Smoothed ranges", "Noise of the prediction by step", "Rounding of a layer"):
        assert f'aria-label="{label} of out: ddim: W8A8 ptqd"' in page


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("record"),
        lambda values: values["noise"]["quantized"]["0"].update(mean="x"),
        lambda values: values["smoothed"]["factors"].update(a=[1.0]),
        lambda values: values["record"]["layers"][0].update(beside=0.5),
    ],
)
def test_a_damaged_file_is_refused(damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = {PLAIN: {0: NoiseAt(float("inf"), 0.0, 0.0, 0.0)}}
    smoothed = Smoothed({"a": torch.ones(2)}, {"a": torch.ones(2)})
    Inspected("m", RECORD, smoothed, noise).save(tmp_path)
    assert Inspected.open(tmp_path).noise == noise
    values = json.loads((tmp_path / INSPECTION_FILE).read_text())
    damage(values)
    (tmp_path / INSPECTION_FILE).write_text(json.dumps(values))
    with pytest.raises(SystemExit) as stop:
        console.main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"{tmp_path / INSPECTION_FILE}: damaged (" in line


def test_noise_is_told_by_its_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(2, 2, 3, 8, 8, generator=generator)
    error = 0.1 + 0.2 * noise - 0.1 * signal
    sums = NoiseSums()
    for part in range(2):
        sums.add(4, error[part], signal[part])
    at = sums.steps()[4]
    assert at.mean == pytest.approx(float(error.mean()), rel=1e-4)
    assert at.std == pytest.approx(float(error.std(correction=0)), rel=1e-4)
    assert at.snr == pytest.approx(10 * float((signal.square().sum() / error.square().sum()).log10()), rel=1e-4)
    assert at.correlation == pytest.approx(
        float(torch.corrcoef(torch.stack([error.flatten(), signal.flatten()]))[0, 1]), rel=1e-4
    )
    sums.add(5, torch.zeros(3), torch.ones(3))
    assert sums.steps()[5].snr == float("inf") and sums.steps()[5].correlation == 0


def test_the_meter_shows_what_a_correction_leaves() -> None:
    class Half:
        def begin(self, *_: Any) -> None: ...

        def correct(self, step: Step, x: Any, eps: Any, denoise: Any, advance: Any) -> Corrected:
            return Corrected(eps / 2)

    meter, ones = NoiseMeter(Half()), torch.ones(1, 1, 2, 2)
    learned_variance = torch.full((1, 1, 2, 2), 9.0)
    step = Step(0, 1.0, -1, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    meter(step, ones, torch.cat([2 * ones, learned_variance], 1), torch.cat([ones, ones], 1))
    assert meter.plain.steps()[0].mean == 1 and meter.corrected.steps()[0].mean == 0


def test_ranges_of_channels_before_and_after() -> None:
    net = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(2, 1, 1), "linear": torch.nn.Linear(2, 1)})
    ranges = ChannelRanges()
    handles = ranges.watch(net, ["conv", "linear"])
    net["conv"](torch.tensor([[[[1.0, -6.0]], [[2.0, 0.5]]]]))
    net["linear"](torch.tensor([[[1.0, -6.0], [2.0, 0.5]]]))
    assert [handle.remove() for handle in handles] and ranges.largest["conv"].tolist() == [6, 2]
    assert ranges.largest["linear"].tolist() == [2, 6]
    smoothed = Smoothed(ranges.largest, {"conv": torch.tensor([3.0, 1.0]), "linear": torch.tensor([1.0, 2.0])})
    assert smoothed.after("conv").tolist() == [2, 2] and smoothed.ranges["linear"] == (6, 3) and smoothed.most == "conv"


def test_rounding_of_a_smoothed_layer(make_unet: Any) -> None:
    """Its weights are compared with what was rounded, which smoothing had changed; a stepwise range has a search a step."""
    from qncd.ptq.stages.temporal import set_all_stepwise_

    unet, data = make_unet(), inputs(make_unet())
    kept = LayerKept(network_of(unet), LAYER)
    for x, t, _ in data.batches(len(data)):
        for time in t.unique():
            network_of(unet).predict(x[t == time], t[t == time])
    for handle in kept.handles:
        handle.remove()
    prepared(unet, QuantConfig(8, 8, bias_correction=False, weight_range="max"), set_all_stepwise_)
    layer = quant_layers(unet)[LAYER]
    found = rounding_of(LAYER, kept, layer)
    assert found.codes is not None and int(found.codes[1].sum()) == int(found.exact.counts.sum()) == layer.weight.numel()
    assert float(found.errors.edges.abs().max()) <= 0.5001 and int(found.errors.counts.sum()) == layer.weight.numel()
    assert found.searches[1].errors.shape[1] == len(data.t.unique()) == len(found.searches[1].chosen)


def test_bad_input_is_one_line(folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "run.json").write_text("{}")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    expected: list[tuple[tuple[Any, ...], str]] = [
        ((folder, "--top", "0"), "--top 0: allowed are whole numbers, 1 or more"),
        ((folder, "--width", "W4A8"), f"--width is for a model, and {folder} is the folder of a run"),
        ((tmp_path / "plain",), f"{tmp_path / 'plain'}: has no layers.json"),
        ((tmp_path / "broken.safetensors",), f"{tmp_path / 'broken.safetensors'}: header of"),
        ((model,), f"{model}: neither the folder of a run (run.json) nor a quantized checkpoint; a model needs --width"),
        ((model, "--width", "W9"), "--width W9: "),
        ((model, "--width", "W8A8", "--layer", LAYER), f"--layer {LAYER} is drawn: name a folder"),
        ((model, "--width", "W8A8", "--prompt", "x"), "--prompt: DDIMPipeline takes no prompts"),
        ((tmp_path / "none.yml", "--width", "W8A8"), f"{tmp_path / 'none.yml'}: no such config file"),
        ((folder, "--out", folder / "run.json"), f"--out {folder / 'run.json'}: is a file"),
    ]
    for words, message in expected:
        assert refused(capsys, *words).startswith(message)
    unknown = refused(capsys, model, "--width", "W8A8", "--out", tmp_path / "o", "--layer", "mid_block.resnet.0.conv2")
    assert f"the nearest are {LAYER}, " in unknown and not (tmp_path / "o").exists()
