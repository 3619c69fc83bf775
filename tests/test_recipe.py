"""The tree of everything that can be asked for: modes, changes, files, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qncd.options import MAX_SEED, check_seed
from qncd.recipe import (
    MODES,
    CalibrationConfig,
    CorrectionConfig,
    QuantConfig,
    Recipe,
    ReconstructionConfig,
    SamplerConfig,
    SmoothingConfig,
)

WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A6": (4, 6), "W4A4": (4, 4), "W4A32": (4, None)}
PLAIN = {"weight_range": "max", "split": False, "bias_correction": False}
PEER: dict[str, Any] = {"bias_correction": False}
CLIPPED = {"act_range": "mse"}
STEPS = {"stepwise_activations": True}
DIFFERENCES = {"act_granularity": "token", "temporal_differences": True}
SVD = {"gptq": True, "smoothing_search": True, "rank": 32}
ROTATED = {"gptq": True, "rotation": True}
PLUS = {"gptq": True, "stepwise_activations": True, "rotation": None}
NARROW_PLUS = {**PLUS, **CLIPPED, "bit_allocation": True}

# mode -> options of QuantConfig that differ from its defaults at 8, below 8, at 4 bits, and with activations in floating point
QUANT = {
    "linear": (PLAIN, PLAIN, PLAIN, PLAIN),
    "qdiff": (PEER, PEER | CLIPPED, PEER | CLIPPED, PEER),
    "ptqd": (PEER, PEER | CLIPPED, PEER | CLIPPED, PEER),
    "tfmq": tuple(
        PEER | {"stepwise_embedding": True, "stepwise_activations": True} | more for more in ({}, CLIPPED, CLIPPED, {})
    ),
    "d2dpm": (PEER, PEER | CLIPPED, PEER | CLIPPED, PEER),
    "modiff": (PEER | DIFFERENCES, PEER | DIFFERENCES, PEER | DIFFERENCES, PEER),
    "qncd": (STEPS, STEPS | CLIPPED, STEPS | CLIPPED, STEPS),
    "svdquant": (SVD, SVD | CLIPPED, SVD | CLIPPED, {"gptq": True, "rank": 32}),
    "hadamard": (ROTATED, ROTATED | CLIPPED, ROTATED | CLIPPED, ROTATED),
    "qncd+": (PLUS, NARROW_PLUS, NARROW_PLUS | {"smoothing_search": True}, {**PLUS, "rotation": False}),
}
# mode -> smoothing, noise correction while sampling, offline correction, reconstruction of weights below 8 bits
PARTS: dict[str, tuple[bool, bool, str | None, bool]] = {
    "linear": (False, False, None, False),
    "qdiff": (False, False, None, True),
    "ptqd": (False, False, "ptqd", True),
    "tfmq": (False, False, None, True),
    "d2dpm": (False, False, "d2dpm", True),
    "modiff": (False, False, None, True),
    "qncd": (True, False, "tracking", True),
    "svdquant": (False, False, None, False),
    "hadamard": (False, False, None, False),
    "qncd+": (False, False, "tracking", False),
}


@pytest.mark.parametrize(("mode", "width"), itertools.product(MODES, WIDTHS))
def test_modes_at_widths(mode: str, width: str) -> None:
    recipe, (weight_bits, act_bits) = Recipe.of(mode, width), WIDTHS[width]
    column = {8: 0, 6: 1, 4: 2, None: 3}[act_bits]
    assert recipe.quant == QuantConfig(weight_bits, act_bits, **QUANT[mode][column])
    smoothing, correction, offline, reconstruction = PARTS[mode]
    assert recipe.smoothing == (SmoothingConfig() if smoothing else None)
    assert recipe.correction == (CorrectionConfig() if correction else None)
    assert recipe.reconstruction == (ReconstructionConfig() if reconstruction and weight_bits and weight_bits < 8 else None)
    assert recipe.offline == offline and recipe.calibration == CalibrationConfig()
    ranges = " (activations token, differences of time steps)" if recipe.quant.temporal_differences else ""
    assert recipe.label == f"{width}{ranges} {mode}"


def test_differences_of_time_steps_come_with_ranges_found_at_run_time() -> None:
    """What is about calibrated ranges gives way, and every other part of the mode stays."""
    plain, recipe = Recipe.of("qncd+", "W4A4"), Recipe.of("qncd+", "W4A4", temporal_differences=True, attention_bits=8)
    assert recipe.label == "W4A4 (activations token, differences of time steps, attention 8) qncd+"
    given_way = {"act_range": "max", "stepwise_activations": False, "bit_allocation": False}
    assert recipe.quant == dataclasses.replace(plain.quant, **DIFFERENCES, **given_way, attention_bits=8)
    assert recipe == dataclasses.replace(plain, quant=recipe.quant)
    assert Recipe.of("modiff", "W4A4", act_granularity="group32").quant.act_granularity == "group32"
    assert not Recipe.of("modiff", "W4A4", temporal_differences=False).quant.temporal_differences


def test_defaults_and_order_of_fields_stay() -> None:
    """Positional calls and files of old versions rely on them."""
    expected = {
        QuantConfig: dict(
            weight_bits=8, act_bits=8, softmax_bits=8, edge_bits=8, weight_range="mse", act_range="max", act_symmetric=False,
            split=True, softmax_range=None, quantize_attention=True, quantize_embedding=True, stepwise_embedding=False,
            stepwise_activations=False, gptq=False, smoothing_search=False, bit_allocation=False, bias_correction=True,
            step_weights=False, weight_grid="channel", rotation=False, rank=0, branch_bits=1.0, weight_granularity="channel",
            act_granularity="tensor", temporal_differences=False, attention_bits=None, weight_format="int", act_format="int",
            step_window=None,
        ),
        SmoothingConfig: dict(floor=1.0, strength=1.0, transformers=False),
        ReconstructionConfig: dict(
            iterations=2000, batch_size=32, lr=0.01, inputs=512, memory_gb=4.0, cache="fp16", seed=0, act_iterations=0,
            act_lr=0.01,
        ),
        CorrectionConfig: dict(
            interval=4, target="paper", statistics="sample", control=True, shrink=True, correct_variance=True
        ),
        SamplerConfig: dict(sample_type="generalized", skip_type="uniform", timesteps=100, eta=0.0, convention="ddim"),
        CalibrationConfig: dict(samples=64, steps=10, batch_size=32, seed=0),
    }  # fmt: skip
    for kind, fields in expected.items():
        assert list(dataclasses.asdict(kind()).items()) == list(fields.items())


def test_changes_reach_the_whole_tree() -> None:
    recipe = Recipe.of(
        "qdiff", "W4A6", iterations=4000, act_range="max", samples=128, softmax_bits=16, correction=True, interval=5,
        smoothing={"floor": 0.5}, **{"calibration.seed": 3},
    )  # fmt: skip
    assert recipe.reconstruction == ReconstructionConfig(iterations=4000)
    assert recipe.quant == QuantConfig(4, 6, act_range="max", softmax_bits=16, bias_correction=False)
    assert recipe.calibration == CalibrationConfig(samples=128, seed=3)
    assert recipe.correction == CorrectionConfig(interval=5) and recipe.smoothing == SmoothingConfig(0.5, transformers=True)
    assert Recipe.of("qdiff", "W4A8", reconstruction=ReconstructionConfig(9)).reconstruction == ReconstructionConfig(9)


@pytest.mark.parametrize(
    ("mode", "changes", "found"),
    [
        ("qncd", {"tracking": True}, (False, "tracking")),
        ("qncd", {"correction": True}, (True, None)),
        ("qncd", {"interval": 3}, (True, None)),
        ("qncd", {"correction": False}, (False, None)),
        ("qncd", {"tracking": False}, (False, None)),
        ("qncd+", {"correction": True}, (True, None)),
        ("qncd+", {"tracking": False}, (False, None)),
        ("qncd+", {"tracking": False, "correction": True}, (True, None)),
        ("linear", {"correction": True}, (True, None)),
        ("qncd", {"offline": "ptqd"}, (False, "ptqd")),
        ("ptqd", {"tracking": False}, (False, "ptqd")),
    ],
)
def test_one_correction_takes_the_place_of_another(mode: str, changes: dict[str, Any], found: tuple[bool, str | None]) -> None:
    recipe = Recipe.of(mode, **changes)
    assert (recipe.correction is not None, recipe.offline) == found


def test_what_a_mode_sets_gives_way() -> None:
    assert not Recipe.of("qncd+", "W4A4", gptq=False).quant.smoothing_search
    assert Recipe.of("qdiff", "W4A8", gptq=True).reconstruction is None
    assert Recipe.of("linear", "W4A8", gptq=True).quant.bias_correction
    assert not Recipe.of("svdquant", "W32A8").quant.rank and Recipe.of("hadamard", "W32A8").quant.rotation
    nearest = Recipe.of("svdquant", "W4A4", gptq=False)
    assert nearest.quant.rank == 32 and not nearest.quant.smoothing_search
    assert Recipe.of("svdquant", "W4A4", gptq=False, smoothing_search=True).quant.smoothing_search
    weights_in_floating_point = Recipe.of("qncd+", "W32A8")
    assert not weights_in_floating_point.quant.gptq and weights_in_floating_point.quant.weight_bits is None
    assert Recipe.of("qncd", "W4").quant == Recipe.of("qncd", "W4A32").quant == Recipe.of("qncd", "W4", act_bits=None).quant
    assert Recipe.of("qncd", "W4A16") == Recipe.of("qncd", "W4A32")
    tokens = Recipe.of("qncd+", "W4A4", act_granularity="token").quant  # there are no ranges to calibrate
    assert (tokens.act_range, tokens.stepwise_activations, tokens.bit_allocation) == ("max", False, False)
    assert tokens.gptq and tokens.smoothing_search


def test_names_of_widths_formats_and_granularities() -> None:
    fp8 = Recipe.of("linear", "FP8").quant
    assert (
        fp8 == Recipe.of("linear", "WFP8AFP8").quant == Recipe.of("linear", "W8A8", weight_format="fp8", act_format="fp8").quant
    )
    assert (fp8.weight_bits, fp8.act_bits, fp8.weight_format, fp8.act_format, fp8.label) == (8, 8, "fp8", "fp8", "FP8")
    assert Recipe.of("linear", "W4AFP8").quant.label == "W4AFP8" and Recipe.of("linear", "WFP8A16").quant.label == "WFP8A32"
    grouped = Recipe.of("linear", "W4A8", weight_granularity="group64", act_granularity="token")
    assert grouped.label == "W4A8 (weights group64, activations token) linear"


REFUSED = [
    ("qncd", "W9A8", {}, "width 'W9A8': allowed are names such as W4A8 and FP8, 2 to 8 bits or FP8 each, and 16 or 32"),
    ("qncd", "", {}, "width '': allowed are names such as W4A8 and FP8, 2 to 8 bits or FP8 each, and 16 or 32"),
    ("qdrop", "W8A8", {}, "mode 'qdrop': allowed are linear, qdiff, ptqd, tfmq, d2dpm, modiff, qncd, svdquant, hadamard, qncd+"),
    ("qncd", "W8A8", {"sampels": 3}, "unknown option 'sampels': did you mean samples?"),
    ("qncd", "W8A8", {"correction": {"intervall": 3}}, "correction: unknown option 'intervall': did you mean interval?"),
    ("qncd", "W8A8", {"seed": 3}, "option 'seed' is one of several: name reconstruction.seed or calibration.seed"),
    ("qncd", "W8A8", {"smoothing": 3}, "smoothing 3: allowed are true, false and options by name"),
    ("qncd", "W8A8", {"quant": False}, "quant False: allowed are options by name"),
    ("qncd", "W8A8", {"gptq": 1}, "gptq 1: allowed are True and False"),
    ("qncd", "W8A8", {"interval": 0}, "interval 0: allowed are whole numbers, 1 or more"),
    ("qncd", "W8A8", {"iterations": 4000}, "iterations needs reconstruction"),
    ("linear", "W8A8", {"interval": 4}, "interval needs correction"),
    ("qdiff", "W4A8", {"act_lr": 0.1}, "act_lr needs act_iterations"),
    ("qdiff", "W4A32", {"act_iterations": 5}, "act_iterations learns scales of quantized activations: they are in floating"),
    ("qncd+", "W4A6", {"reconstruction": True}, "reconstruction with GPTQ (gptq, or mode qncd+): both round the weights"),
    ("qdiff", "W32A8", {"reconstruction": True}, "reconstruction rounds weights: they are in floating point here"),
    ("ptqd", "W8A8", {"tracking": True}, "tracking: mode ptqd has a correction of its own"),
    ("ptqd", "W8A8", {"correction": True}, "correction: mode ptqd has a correction of its own"),
    ("qncd", "W8A8", {"tracking": True, "correction": True}, "correction: tracking is a correction too"),
    ("qncd", "W32A8", {"smoothing_search": True}, "smoothing_search makes weights easier to round: they are in floating point"),
    ("qncd", "W32A8", {"rank": 4}, "rank makes weights easier to round: they are in floating point here"),
    ("qncd", "W4A4", {"rank": -1}, "rank -1: allowed are whole numbers, 0 or more"),
    ("hadamard", "W4A4", {"branch_bits": 2}, "branch_bits needs rank"),
    ("linear", "W4A32", {"weight_grid": "gguf", "rank": 4}, "weight_grid gguf: no reader of such files rotates inputs or adds"),
    ("qncd", "W8A8", {"bit_allocation": True}, "bit_allocation gives some activations more than act_bits 8: allowed with it"),
    ("qncd", "W4A32", {"bit_allocation": True}, "bit_allocation is about quantized activations: they are in floating point"),
    ("qncd", "W4A32", {"softmax_bits": 16}, "softmax_bits is about quantized activations: they are in floating point here"),
    ("qncd+", "W4A6", {"bias_correction": False}, "gptq rounds about the inputs' means, whose errors go into the bias: it"),
    ("qncd", "W32A32", {}, "weight_bits and act_bits are both None: nothing would be quantized"),
    ("qncd", "W4A8", {"weight_granularity": "group7"}, "weight_granularity 'group7': allowed are channel, group16, group32, "),
    ("qncd", "W4A8", {"act_granularity": "channel"}, "act_granularity 'channel': allowed are tensor, token, group16, group32, "),
    ("qncd", "W4A32", {"act_granularity": "token"}, "act_granularity is about quantized activations: they are in floating point"),
    ("qncd", "W32A8", {"weight_format": "fp8"}, "weight_format is about quantized weights: they are in floating point here"),
    ("qncd", "W8A8", {"act_granularity": "token", "act_range": "mse"}, "act_range is about calibrated ranges: with act_gran"),
    ("tfmq", "W8A8", {"act_granularity": "token", "stepwise_activations": True}, "stepwise_activations is about calibrated"),
    ("qncd+", "W4A6", {"act_granularity": "group64", "bit_allocation": True}, "bit_allocation is about calibrated ranges: "),
    ("qdiff", "W4A8", {"act_granularity": "token", "act_iterations": 5}, "act_iterations learns calibrated steps of integers: "),
    ("qdiff", "W4AFP8", {"act_iterations": 5}, "act_iterations learns calibrated steps of integers: not with act_format fp8"),
    (
        "qdiff",
        "W8A8",
        {"attention_bits": 4, "quantize_attention": False},
        "attention_bits without quantize_attention: q, k and ",
    ),
    ("modiff", "W8A8", {"act_granularity": "tensor"}, "temporal_differences with act_granularity tensor: allowed are token and "),
    ("qncd", "FP8", {"weight_bits": 4}, "weight_format fp8 with weight_bits 4: allowed is 8"),
    ("qncd", "FP8", {"softmax_bits": 16}, "act_format fp8 with softmax_bits 16: allowed is 8"),
    ("qncd", "FP8", {"act_symmetric": True}, "act_format fp8 with act_symmetric True: allowed is False"),
    ("qncd", "FP8", {"reconstruction": True}, "reconstruction learns to round integers up or down: not with weight_format fp8"),
    ("linear", "W4A32", {"weight_grid": "gguf", "weight_granularity": "group64"}, "weight_grid gguf has groups of 32 integers"),
]


@pytest.mark.parametrize(("mode", "width", "changes", "message"), REFUSED)
def test_refusals_are_one_clear_line(mode: str, width: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.of(mode, width, **changes)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_tree_put_together_by_hand_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^correction and offline tracking: each prediction is corrected once, allowed is one$"):
        Recipe(correction=CorrectionConfig(), offline="tracking")
    with pytest.raises(ValueError, match=r"^reconstruction with GPTQ"):
        Recipe(quant=QuantConfig(gptq=True), reconstruction=ReconstructionConfig())
    with pytest.raises(ValueError, match=r"^quant None: expected QuantConfig$"):
        Recipe(quant=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "width"), itertools.product(MODES, WIDTHS))
def test_json_and_yaml_bring_it_back(mode: str, width: str, tmp_path: Path) -> None:
    recipe = Recipe.of(mode, width, samples=12)
    content = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(content) == recipe
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert Recipe.from_yaml(tmp_path / "r.yaml") == recipe


def test_json_of_other_versions() -> None:
    """Options younger than a file have their defaults, unknown ones are refused by name."""
    old = Recipe.of("qdiff", "W4A8").to_json()
    del old["quant"]["bit_allocation"], old["reconstruction"]["cache"], old["calibration"]
    assert Recipe.from_json(old) == Recipe.of("qdiff", "W4A8")
    with pytest.raises(ValueError, match=r"^quant: unknown option 'gpqt': did you mean gptq\?$"):
        Recipe.from_json({"quant": {"gpqt": True}})
    with pytest.raises(ValueError, match=r"^unknown option 'qant': did you mean quant\?$"):
        Recipe.from_json({"qant": {}})
    assert QuantConfig(**{"weight_bits": 4, "act_bits": 8, "softmax_bits": 8, "edge_bits": 8, "weight_range": "mse"})


def test_a_recipe_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("mode: qdiff\nwidth: W4A6\nreconstruction: {iterations: 40, lr: 1e-3}\nsamples: 12\nsmoothing: true\n")
    expected = Recipe.of("qdiff", "W4A6", iterations=40, lr=1e-3, samples=12, smoothing=True)
    assert Recipe.from_yaml(path) == expected
    for text, message in (
        ("intervall: 4", r"unknown option 'intervall': did you mean interval\?"),
        ("- a", "not a recipe: expected names of options with their values"),
        ("a: [", "not a yaml file at line 1: "),
        ("a: " + "9" * 6000, "not a yaml file: "),
        ("[" * 1000, "not a yaml file at line 1: nested deeper than 50 levels"),
        ("reconstruction: {lr: .inf}", "lr inf: allowed are numbers above 0"),
        ("weight_bits: nine", "weight_bits 'nine': allowed are whole numbers, 2 to 8"),
        ("mode: qdrop", "mode 'qdrop': allowed are "),
        ("iterations: 4", "iterations needs reconstruction"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"r\.yaml: {message}"):
            Recipe.from_yaml(path)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_settings_of_a_run() -> None:
    settings = Recipe.of("qncd", "W4A8", correction=True).settings()
    assert settings == {
        "quantization": {"mode": "qncd", **dataclasses.asdict(QuantConfig(4, 8))},
        "smoothing": {"floor": 1.0, "strength": 1.0, "transformers": False},
        "reconstruction": dataclasses.asdict(ReconstructionConfig()),
        "correction": dataclasses.asdict(CorrectionConfig()),
        "offline_correction": None,
        "calibration": {"samples": 64, "steps": 10, "batch_size": None, "seed": 0},
    }
    assert Recipe.of("qncd", act_range="running").settings()["calibration"]["batch_size"] == 32


def test_calibration_may_be_decided_later() -> None:
    later = Recipe.of("qncd", **{"calibration.batch_size": None, "calibration.steps": None})
    for steps, expected in ((4, 4), (50, 10)):
        found = later.decided(2, steps).calibration
        assert (found.batch_size, found.steps) == (2, expected)
    assert later.decided(2).calibration.steps == 10
    asked = Recipe.of("qncd", **{"calibration.steps": 6}).decided(2, 4).calibration
    assert (asked.batch_size, asked.steps) == (32, 6)


def test_only_corrections_that_need_it_ask_for_the_noise_table() -> None:
    assert Recipe.of("qncd", correction=True).controlled and Recipe.of("qncd", control=False).controlled
    assert Recipe.of("qncd", control=False, shrink=False).controlled is None and Recipe.of("qncd+").controlled is None


def test_seeds() -> None:
    from qncd.rng import ImageNoise

    for seed in (0, MAX_SEED):
        check_seed(seed)
        ImageNoise([seed + 1]).normal((1,))
    with pytest.raises(ValueError, match=r"^seed -1: allowed are whole numbers, 0 or more$"):
        check_seed(-1)
    with pytest.raises(ValueError, match=rf"^seed {MAX_SEED + 1}: allowed are whole numbers, 0 to {MAX_SEED}$"):
        check_seed(MAX_SEED + 1)
    with pytest.raises(ValueError, match=r"^seed 72057594037927936: allowed are whole numbers, 0 to 72057594037927935$"):
        ImageNoise([2**56])
