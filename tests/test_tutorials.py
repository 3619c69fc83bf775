"""The notebooks of docs/tutorials/ run as they stand and do what they say; what is committed of them is clean."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from script_runs import ROOT, load_script

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
BYTES = 150_000  # of a notebook, a few small pictures included

# What a notebook claims, in its own names.
CLAIMS = {
    "first_pipeline": "assert same and len(psnr) == 4 and min(psnr) > 30 and report.layers[1].weight_bits == 4",
    "export_and_run": "assert psnr(integers, fake) > 30 and fast.unet is not pipe.unet and file.stat().st_size < floats / 3",
    "add_a_method": "assert distances['line'] > distances['None'] + 5 and np.array_equal(draw(again), images['line'])",
    "which_bits_where": "assert len({layer.act_bits for layer in layers}) > 2 and np.diff(list(distances.values())) > 0.5",
}


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.stem)
def test_what_is_committed_is_clean(file: Path) -> None:
    """Every cell was run, in its order; no warnings, no paths of the machine that ran it, no large pictures."""
    text = file.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run tools/run_tutorials.py"
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert {kind for output in outputs for kind in output.get("data", {})} <= {"text/plain", "image/png"}
    assert len(text.encode()) < BYTES and "site-packages" not in text and str(Path.home()) not in text
    assert dict(notebook.metadata.language_info) == {"name": "python"}


@pytest.mark.slow
@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.stem)
def test_notebook_runs(file: Path, tmp_path: Path) -> None:
    tool = load_script(ROOT / "tools" / "run_tutorials.py")
    notebook = nbformat.read(file, as_version=4)
    printed = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS[file.stem]))
    tool.execute(notebook, tmp_path)
    again = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    assert len(again) == len(printed)  # no cell prints more or less than what is committed


def test_a_cell_that_fails_is_told(tmp_path: Path) -> None:
    tool = load_script(ROOT / "tools" / "run_tutorials.py")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(ValueError, match="a cell failed: ZeroDivisionError: division by zero"):
        tool.execute(notebook, tmp_path)


def test_every_notebook_has_a_claim() -> None:
    assert {file.stem for file in TUTORIALS} == set(CLAIMS)
