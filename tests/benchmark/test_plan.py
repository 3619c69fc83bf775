"""What a cell of the quality benchmark is told apart by."""

from __future__ import annotations

from pathlib import Path

import pytest

from qncd.benchmark.plan import FULL, Cell, Composition, Plan, make_cells
from qncd.recipe import CalibrationConfig, CorrectionConfig, ReconstructionConfig, SamplerConfig


def plan(out: Path) -> Plan:
    return Plan(
        out, {}, None, {"weights": "0"}, None, "cpu", SamplerConfig(timesteps=4), CalibrationConfig(4, 4), CorrectionConfig(),
        ReconstructionConfig(3), True, 4, 0, 4,
    )  # fmt: skip


def test_a_mode_with_changes(tmp_path: Path) -> None:
    text = "qncd+,gptq=false,interval=2,correction=true,act_range=max"
    composition = Composition.parse(text)
    assert composition.title == "qncd+, no gptq, interval 2, correction, act range max"
    recipe = Cell("W4A6", text, 3).recipe_in(plan(tmp_path))
    assert recipe is not None and not recipe.quant.gptq and recipe.quant.act_range == "max" and recipe.calibration.seed == 3
    assert recipe.correction == CorrectionConfig(interval=2) and recipe.offline is None  # the row's interval, not the plan's
    plain = Cell("W4A6", "qncd,correction=true").recipe_in(plan(tmp_path))
    assert plain is not None and plain.correction == CorrectionConfig() and plain.reconstruction == ReconstructionConfig(3)
    own = Cell("W4A6", "qncd,iterations=9").recipe_in(plan(tmp_path))
    assert own is not None and own.reconstruction == ReconstructionConfig(9)
    assert Cell(FULL, FULL).recipe_in(plan(tmp_path)) is None and Cell("W8A8", "nncf").recipe_in(plan(tmp_path)) is None
    assert make_cells(["w4a8"], ["qncd+", "linear", "qncd+"], 2) == [
        Cell(FULL), Cell("W4A8", "qncd+"), Cell("W4A8", "linear"), Cell("W4A8", "qncd+", 1), Cell("W4A8", "linear", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("best", "--modes best: allowed are linear, qdiff, .*, nncf"),
        ("qncd,smoothing", "--modes qncd,smoothing: 'smoothing': allowed are changes such as smoothing=false"),
        ("qncd,smoothing=[", r"--modes qncd,smoothing=\[: 'smoothing=\[': allowed are changes"),
        ("qncd,smooth=false", "--modes qncd,smooth=false at W4A6: .*smooth"),
        ("qncd+,bit_allocation=true", r"--modes qncd\+,bit_allocation=true at W8A8: bit_allocation"),
        ("nncf,split=false", "--modes nncf,split=false: allowed are"),
    ],
)
def test_a_mode_that_is_none(mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_cells(["W4A6", "W8A8"], [mode], 1)


def test_weights_are_reconstructed_once_for_all_activations(tmp_path: Path) -> None:
    folders = {
        (width, mode): Cell(width, mode).reconstruction_folder(plan(tmp_path))
        for width in ("W3A8", "W4A8", "W4A4") for mode in ("qdiff", "ptqd", "tfmq", "qncd", "qncd,smoothing=false")
    }  # fmt: skip
    assert folders["W4A8", "qdiff"] == folders["W4A4", "ptqd"] == folders["W4A4", "qncd,smoothing=false"]
    assert len({folders[key] for key in (("W3A8", "qdiff"), ("W4A8", "qdiff"), ("W4A8", "tfmq"), ("W4A8", "qncd"))}) == 4
    searched = [Cell(width, "qdiff,smoothing_search=true").reconstruction_folder(plan(tmp_path)) for width in ("W4A8", "W4A4")]
    assert len({*searched, folders["W4A4", "qdiff"]}) == 3  # the activations decide how weights are smoothed
    assert Cell("W4A4", "qncd+").reconstruction_folder(plan(tmp_path)) is None
    assert Cell("W8A4", "qdiff").reconstruction_folder(plan(tmp_path)) is None  # the nearest of 8 bits is as good


def test_widths_are_all_that_recipes_have() -> None:
    """Peers are left out where a width is none of integers on both sides."""
    cells = make_cells(["fp8", "WFP8AFP8", "w4a16", "W4"], ["linear", "svdquant"], 1)
    assert [(cell.width, cell.mode) for cell in cells[1:]] == [
        (width, mode) for width in ("FP8", "W4A32") for mode in ("linear", "svdquant")
    ]
    with pytest.raises(ValueError, match=r"^--widths W9A8: allowed are names such as W4A8 and FP8, 2 to 8 bits or FP8 each"):
        make_cells(["W9A8"], ["linear"], 1)
    with pytest.raises(ValueError, match=r"^--widths FP8: --modes nncf can do W8A8$"):
        make_cells(["FP8"], ["linear", "nncf"], 1)
    with pytest.raises(ValueError, match=r"^--modes linear,act_bits=6 at FP8: "):
        make_cells(["FP8"], ["linear,act_bits=6"], 1)
