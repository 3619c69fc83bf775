"""What a cell of the quality benchmark is told apart by."""

from __future__ import annotations

from pathlib import Path

from qncd.benchmark.plan import Cell, Plan
from qncd.recipe import CalibrationConfig, CorrectionConfig, ReconstructionConfig, SamplerConfig


def plan(out: Path) -> Plan:
    return Plan(
        out, {}, None, {"weights": "0"}, None, "cpu", SamplerConfig(timesteps=4), CalibrationConfig(4, 4), CorrectionConfig(),
        ReconstructionConfig(3), True, 4, 0, 4,
    )  # fmt: skip


def test_widths_below_eight_bits_have_their_own_ranges_and_smoothing(tmp_path: Path) -> None:
    found = {
        (width, mode): Cell(width, mode).settings(plan(tmp_path))["quantization"]
        for width in ("W8A8", "W4A6", "W4A4") for mode in ("linear", "qdiff", "qncd+", "uniform", "extremes", "unsmoothed")
    }  # fmt: skip
    clipping = {key for key, settings in found.items() if settings["act_range"] == "mse"}
    assert clipping == {(width, mode) for width in ("W4A6", "W4A4") for mode in ("qdiff", "qncd+", "uniform", "unsmoothed")}
    # Only where they are on: cells from before there were such things stand.
    searched = {key for key, settings in found.items() if "smoothing_search" in settings}
    assert searched == {("W4A4", "qncd+"), ("W4A4", "uniform"), ("W4A4", "extremes")}
    allocated = {key for key, settings in found.items() if "bit_allocation" in settings}
    assert allocated == {(width, mode) for width in ("W4A6", "W4A4") for mode in ("qncd+", "extremes", "unsmoothed")}


def test_weights_are_reconstructed_once_for_all_activations(tmp_path: Path) -> None:
    folders = {
        (width, mode): Cell(width, mode).reconstruction_folder(plan(tmp_path))
        for width in ("W8A8", "W4A8", "W4A4") for mode in ("qdiff", "ptqd", "tfmq")
    }  # fmt: skip
    assert folders["W4A8", "qdiff"] == folders["W4A4", "ptqd"] != folders["W8A8", "qdiff"]
    assert folders["W4A8", "tfmq"] != folders["W4A8", "qdiff"]
    assert Cell("W4A4", "qncd+").reconstruction_folder(plan(tmp_path)) is None
