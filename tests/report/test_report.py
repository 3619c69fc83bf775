"""The report as a file: what it holds, what it refuses, and that it needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context

from qncd.app import console
from qncd.ptq.layer_record import NetworkRecord
from qncd.report import figures, pictures, sections
from qncd.report.folders import open_folders
from qncd.report.page import LARGEST, render
from qncd.report.sections import SECTIONS, Report
from qncd.report.sheets import make_sheets

from .conftest import COUNT, write_benchmark, write_run

VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """The elements of a page, and whether they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of all folders, written by the command."""
    out = tmp_path_factory.mktemp("out") / "report.html"
    console.main(["report", *map(str, folders.values()), "--out", str(out), "--pareto", str(out.with_name("pareto.svg"))])
    assert "<svg" in out.with_name("pareto.svg").read_text()
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_one_file_holds_everything(text: str, page: Page) -> None:
    assert len(text.encode()) < LARGEST
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_headings_links_and_names(page: Page) -> None:
    names = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(names) == len(set(names))
    targets = {(a["href"] or "")[1:] for a in page.of("a")} | {a["aria-labelledby"] for a in page.of("section")}
    assert targets <= set(names)
    assert [a["id"] for a in page.of("section")] == [section.key for section in SECTIONS]
    assert all(image.get("alt") for image in page.of("img"))
    assert all(svg.get("aria-label") for svg in page.of("svg") if svg.get("role") == "img")


def test_tables_can_be_sorted_by_keyboard(page: Page, text: str) -> None:
    tables = re.findall(r'<table class="sortable">.*?</table>', text, re.DOTALL)
    assert len(tables) == 5  # runs, three records of layers, one benchmark
    for table in tables:
        head, body = table.split("</thead>")
        columns = head.count("<th ")
        assert head.count("<button type=") == columns and "<caption>" in head
        rows = body.split("<tr>")[1:]
        assert rows and all(row.count("<td") + row.count("<th") == columns for row in rows)


def test_runs_side_by_side(page: Page) -> None:
    said = " ".join(" ".join(page.text).split())
    for words in ("W4A6 qncd+", "W4A6 linear", "full precision", "Where the error comes from", "block.11", "attention.q"):
        assert words in said
    assert re.search(r"\d\d\.\d\d \(\d\d\.\d\d to \d\d\.\d\d\)", said)  # PSNR with its interval
    assert "qncd benchmark quality <&>" in said  # escaped in the file, whole on the page


def test_sheets_flip_between_the_same_seeds(folders: dict[str, Path]) -> None:
    runs, benchmarks, _ = open_folders(list(folders.values()))
    sheets = make_sheets([*(run.pictured() for run in runs), *(one for b in benchmarks for one in b.pictured())])
    both, alone, cells = sheets.sheets
    assert both.views[:3] == ("full precision", "good: W4A6 qncd+", "poor: W4A6 linear")
    assert [view.split(" × ")[0] for view in both.views[3:]] == ["difference", "difference"]
    assert len(both.tiles) == COUNT and both.labels[2] == "000002 seed 9"
    assert len({picture.key for picture in both.tiles[0]}) == 5
    assert alone.views == ("full: full precision",) and len(alone.tiles) == COUNT
    assert cells.title == "bench, W4A8" and cells.views[:2] == ("full precision", "W4A8 linear") and len(cells.tiles) == 4
    good, _, linear, _ = sheets.extremes
    assert [line[:13] for line, _ in good.worst] == ["000005 seed 1", "000004 seed 1", "000003 seed 1"]
    assert [line[:6] for line, _ in good.median] == ["000003", "000002", "000001"]
    assert [line[:6] for line, _ in linear.worst] == ["000004", "000005"]
    assert all(picture.key in sheets.encoded.sources for tile in both.tiles for picture in tile)


def test_differences_are_magnified() -> None:
    exact = np.full((4, 4, 1), 100, np.uint8)
    image = exact.copy()
    image[0] = 103
    found = pictures.difference(exact, image)
    gain = pictures.gain_for([found])
    assert gain == 32 and pictures.magnified(found, gain)[:, 0, 0].tolist() == [128 + 96, 128, 128, 128]
    assert pictures.gain_for([10 * found]) == 4 and pictures.gain_for([90 * found]) == 1
    assert pictures.magnified(90 * found, 1).max() == 255


def test_many_large_images_are_shrunk() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 600, 600, 3), dtype=np.uint8)
    images = {str(i): image for i, image in enumerate(noise)}
    whole = pictures.encode(images, 10_000_000)
    assert whole.note == "as they are" and whole.sources["0"].startswith("data:image/png;base64,")
    small = pictures.encode(images, 300_000)
    assert small.note.startswith("as JPEG of quality 88, shrunk to ")
    assert sum(map(len, small.sources.values())) <= 300_000 < 3 * len(pictures.encode({"0": noise[0]}, 10_000_000).sources["0"])


def test_sections_without_content_are_left_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in full precision has no layers; a section is a line in a list."""
    report = Report(*open_folders([folders["full"]]))
    found = [a["id"] for a in Page(render(report, "")).of("section")]
    assert found == ["overview", "samples", "settings"]
    page = Page(render(report, "", [sections.Settings()]))
    assert [a["id"] for a in page.of("section")] == ["settings"]


def test_widths_and_bits_are_named_whole(tmp_path: Path) -> None:
    """Formats, granularities, and what is stored beside the weights."""
    run = write_run(tmp_path / "run", "svdquant", compared=False)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["quantization"] |= {"weight_format": "fp8", "act_granularity": "token"}
    (run / "run.json").write_text(json.dumps(record))
    ((found,), _, _) = open_folders([run])
    assert found.how == "WFP8A6 (activations token) svdquant"
    assert found.layers is not None and sections.mean_weight_bits(found.layers) == 4
    layers = [dataclasses.replace(layer, beside=2 * layer.weights) for layer in found.layers.layers]
    assert sections.mean_weight_bits(NetworkRecord(tuple(layers))) == 6


def test_plots_do_not_take_the_readers_settings_of_matplotlib(folders: dict[str, Path]) -> None:
    """Colours of the page alone, whatever a matplotlibrc or another module has set."""
    runs = open_folders([folders["good"]])[0]
    plain = figures.svg(figures.psnr_figure, runs, "psnr", "PSNR")
    assert plain is not None and "currentColor" in plain
    with rc_context({"text.color": "#123456", "xtick.color": "#123456", "axes.facecolor": "#123456", "font.size": 20}):
        assert figures.svg(figures.psnr_figure, runs, "psnr", "PSNR") == plain


def test_old_runs_say_what_they_lack(tmp_path: Path) -> None:
    run, bench = write_run(tmp_path / "run", "linear", compared=False), write_benchmark(tmp_path / "bench", sizes=False)
    (run / "layers.json").unlink()
    said = " ".join(" ".join(Page(render(Report(*open_folders([run, bench])), "")).text).split())
    assert "run: no full-precision images to compare with: sample it with --compare_fp" in said
    assert "run: sampled before runs recorded their layers" in said
    assert "No plot of quality against size" in said and "No samples: the cells were measured before" in said


def test_names_are_text(tmp_path: Path) -> None:
    """What a folder is called, or a prompt says, is never markup."""
    run = write_run(tmp_path / "<b>x", "linear")
    lines = [f'{{"file": "images/{path.name}", "prompt": "<script>alert(1)</script>"}}' for path in (run / "images").iterdir()]
    (run / "prompts.jsonl").write_text("\n".join(lines))
    text = render(Report(*open_folders([run])), "<i>")
    assert "<b>x" not in text and "<script>alert" not in text and "<i>" not in text and "&lt;script&gt;alert(1)" in text
    Page(text)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        console.main(["report", *map(str, words)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    return error[0].split(": error: ", 1)[1]


def test_bad_folders_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"settings": {"benchmark": "speed"}}')
    half = write_benchmark(tmp_path / "half")
    (half / "quality.json").unlink()
    damaged = write_benchmark(tmp_path / "damaged")
    (damaged / "quality.json").write_text('{"rows": [3]}')
    layers = write_run(tmp_path / "layers", "linear")
    (layers / "layers.json").write_text("{}")
    run = write_run(tmp_path / "run", "linear")
    (run / "run.json").write_text('{"settings": {"model": "x", "sampler": {}, "quantization": {"mode": "linear"}}}')
    expected: list[tuple[tuple[Any, ...], str]] = [
        (("nowhere",), "nowhere: no such folder"),
        (("empty",), "empty: neither a run nor a benchmark, it has no run.json: allowed are folders of"),
        (("other",), "other: neither a run of a sampling command nor a quality benchmark: allowed are"),
        (("half",), "half: a benchmark without quality.json: finish it"),
        (("damaged",), "damaged/quality.json: damaged (no "),
        (("layers",), "layers/layers.json: no record of layers"),
        (("run",), "run/run.json: damaged (no quantization in it): allowed are"),
        ((folders["good"], folders["good"]), f"{folders['good']}: named twice"),
        ((folders["good"], "--out", "empty"), "--out empty: a folder, expected a file"),
        ((folders["good"], "--pareto", "p.png"), "--pareto p.png: 0 of the folders are quality benchmarks"),
        ((folders["bench"], "--pareto", "p.pdf"), "--pareto p.pdf: allowed are names that end in .png or .svg"),
        ((write_benchmark(tmp_path / "old", sizes=False), "--pareto", "p.png"), "--pareto p.png: "),
    ]
    for words, message in expected:
        assert refused(capsys, *words).startswith(message)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "p.png").exists()
