"""Published evaluations: their command lines, what they cost, their tables, and a whole rehearsal of a small one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from qncd.app import console
from qncd.app.commands import reproduce
from qncd.benchmark import reproduction
from qncd.benchmark.plan import FULL
from qncd.benchmark.protocols import PROTOCOLS, REFERENCES
from qncd.benchmark.reproduction import Cost, Entry, Reproduction, check_room, cost_of, table_lines
from qncd.io.files import write_json
from qncd.models import latent, loading
from qncd.models.configs import CONFIGS
from qncd.models.loading import load_config
from qncd.models.schema import COMPVIS, layout_of
from qncd.recipe import RecipeError

ENTRIES = (Entry(FULL), Entry("W8A8", "qncd"), Entry("W4A8", "qncd+"), Entry("W4A8", "qdiff"))


def plan(name: str, out: Path, **changes: Any) -> Reproduction:
    weights = ("--config", str(CONFIGS / PROTOCOLS[name].config), "--use_pretrained")
    prompts = out / "prompts.txt" if PROTOCOLS[name].prompts else None
    return dataclasses.replace(Reproduction(name, out, weights, out / "real.npz", prompts, 100, ENTRIES), **changes)


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_command_lines_are_those_of_the_commands(name: str, rehearsal: bool, tmp_path: Path) -> None:
    chosen = plan(name, tmp_path, rehearsal=rehearsal, checkpoints={"W4A8": tmp_path / "q.pth"}, calibration=("--cali_n", "4"))
    for entry in ENTRIES:
        words = chosen.sampling(entry)
        _, args = console.parse(words)
        steps = next(getattr(args, key) for key in ("timesteps", "custom_steps", "ddim_steps") if hasattr(args, key))
        assert steps == (4 if rehearsal else {"coco": 50}.get(name, chosen.protocol.steps))
        assert args.ptq == (entry.mode != FULL) and (args.quant_mode or FULL) == entry.mode
        if entry.mode != FULL:
            assert (args.weight_bit, args.act_bit, args.cali_n) == (int(entry.width[1]), int(entry.width[3]), 4)
            assert args.cali_ckpt == (tmp_path / "q.pth" if entry.width == "W4A8" else tmp_path / "W8A8_qncd.safetensors")
        judged, compared = chosen.evaluation(entry), chosen.pairing(entry)
        assert judged is not None and (compared is None) == (entry.mode == FULL)
        for line in (judged, *((compared,) if compared else ())):
            console.parse(line)


def test_every_protocol_names_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(*_: object, **__: object) -> None:
        raise urllib.error.URLError("unplugged")

    monkeypatch.setenv("QNCD_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", unplugged)
    for protocol in PROTOCOLS.values():
        config = load_config(CONFIGS / protocol.config)
        module = latent if layout_of(config) is COMPVIS else loading
        with pytest.raises(
            FileNotFoundError, match=r"cannot be downloaded from https://.*: put it at .*, or name it with --ckpt"
        ):
            module.default_weights(config, True, None)
        assert protocol.reference is None or protocol.reference in REFERENCES
        assert all(row.figures and row.source for row in protocol.published)


def test_cost(tmp_path: Path) -> None:
    """100 images of 20 guided steps in full precision, one row of them quantized, its estimates every fourth step."""
    one = plan("imagenet", tmp_path, entries=ENTRIES[:2])
    found = cost_of(one, 0.5, 1000)
    calibration = reproduction.CALIBRATION_RUNS * 64 * 40
    assert found.images == 200 and found.calls == pytest.approx(4000 + 4000 * 1.25 + calibration)
    assert found.hours == pytest.approx((4000 + (5000 + calibration) * reproduction.SIMULATED) * 0.5 / 3600)
    rows = plan("imagenet", tmp_path, entries=(ENTRIES[0], ENTRIES[3]))
    assert cost_of(rows, 0.5, 1000, iterations=10, inputs=4).calls == 4000 + 4000 + calibration + 3 * 10 * 4
    assert cost_of(dataclasses.replace(rows, calibration=("--no-recon",)), 0.5, 1000).calls == 8000 + calibration
    write_json(one.scores(ENTRIES[1]), {"fid": 1})
    assert cost_of(one, 0.5, 1000).calls == 4000  # what is there costs nothing again


def test_too_little_disk_or_memory_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = Cost(1, 1, 1, 2 * 10**9, 3 * 10**9)
    monkeypatch.setattr(reproduction, "memory_of", lambda device: 4 * 10**9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 10**9))
    check_room(cost, tmp_path / "a" / "b", "cpu")
    monkeypatch.setattr(reproduction, "memory_of", lambda device: 10**9)
    with pytest.raises(ValueError, match=r"^--device cpu: 1 GB of memory free, 3 GB "):
        check_room(cost, tmp_path, "cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(ValueError, match=r"b: 1 GB free on its disk, 2 GB are needed"):
        check_room(cost, tmp_path / "a" / "b", "cpu")


def test_the_table_puts_published_rows_beside_ours(tmp_path: Path) -> None:
    chosen = plan("imagenet", tmp_path)
    write_json(chosen.scores(Entry(FULL)), {"fid": 11.5, "inception_score_adm": 240.0, "notes": []})
    write_json(chosen.scores(ENTRIES[1]), {"fid": 10.75, "inception_score_adm": 230.0})
    write_json(chosen.scores(ENTRIES[1], "_pairs"), {"psnr": 31.25, "psnr_p5": "inf", "fid": None})
    lines = table_lines(chosen)
    assert "100 images a row (published: 50000)" in lines[2]
    rows = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("|")]
    assert rows[0] == ["width", "method", "FID", "IS", "PSNR to FP, dB", "5th percentile", "source"]
    assert ["W8A8", "qncd", "10.75", "230.0", "31.25", "inf", "here"] in rows
    assert ["W8A8", "QNCD", "10.57", "231.8", "–", "–", "[1]"] in rows and [
        "W4A8",
        "PTQD",
        "10.40",
        "214.7",
        "–",
        "–",
        "[2]",
    ] in rows
    assert not any(row[0] == "W4A6" for row in rows)  # nobody asked for it
    assert lines[-2:] == ["- [1] QNCD (arXiv 2403.19140)", "- [2] PTQD (arXiv 2305.10657)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifar10", "--widths", "W4"], "--widths W4: allowed are names such as W4A8"),
        (["cifar10", "--reference", "/no/such"], "--reference /no/such: no such file"),
        (["cifar10"], "--reference is missing: a folder with the 50,000 training images"),
        (["coco", "--reference", "{here}"], "--annotations is missing: captions_val2014.json"),
        (["cifar10", "--annotations", "{here}"], "takes no captions"),
        (["cifar10", "--rehearse", "--ckpt", "{here}"], "--rehearse has random weights: it excludes --ckpt"),
        (["cifar10", "--rehearse", "--images", "1"], "--images 1: allowed are 2 or more"),
        (["cifar10", "--rehearse", "--cali_ckpt", "W4A8"], "--cali_ckpt W4A8: expected WIDTH=FILE"),
        (["cifar10", "--rehearse", "--cali_ckpt", "W4A4={here}"], "with a width of --widths (W8A8 W4A8)"),
        (["cifar10", "--rehearse", "--cali_ckpt", "W4A8=/no"], "--cali_ckpt W4A8=/no: no such file"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path / "cache"))
    given = [word.format(here=tmp_path) for word in words]
    with pytest.raises((ValueError, FileNotFoundError, RecipeError)) as caught:
        reproduce.main(reproduce.make_parser().parse_args([*given, "--out", str(tmp_path / "out"), "--device", "cpu"]))
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the bundled DDIM model's size; then the same again, which does nothing, and with other settings, which is refused."""
    small = dataclasses.replace(PROTOCOLS["cifar10"], config="fashion_mnist.yml", size=32)
    monkeypatch.setitem(PROTOCOLS, "cifar10", small)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["cifar10", "--rehearse", "--widths", "W8A8", "--modes", "qncd", "--out", str(tmp_path / "out"), "--device", "cpu"]

    def run(*more: str) -> None:
        reproduce.main(reproduce.make_parser().parse_args([*words, *more]))

    run()
    table = capsys.readouterr().out
    assert "A rehearsal: random weights" in table and "| W8A8 | qncd | " in table and "| FP | full precision | " in table
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    costs = content["costs"]["W8A8_qncd"]
    assert {"sampling", "judging"} == costs.keys() and all(cost["peak_bytes"] > 1e8 for cost in costs.values())
    assert content["rows"][0]["figures"]["psnr"] > 5
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(files) == 6  # two images and a sheet of each row
    run()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")} == files
    with pytest.raises(ValueError, match=r"holds a run with other settings: images \(2 there, 3 now\)"):
        run("--images", "3")
