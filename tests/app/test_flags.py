"""Flags that are made from a recipe's fields, and the recipe that they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

import qncd
from qncd.app import flags
from qncd.app import parser as cli
from qncd.app.quantizing import check_engine_arguments
from qncd.modes import DEFAULT_MODE
from qncd.options import MAX_SEED, Limits, option, section
from qncd.recipe import QUANTIZATION, CalibrationConfig, CorrectionConfig, QuantConfig, Recipe, ReconstructionConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("sample_diffusion_ddim", "sample_diffusion_ldm", "txt2img")
MODES = "linear|qdiff|ptqd|tfmq|d2dpm|modiff|qncd|svdquant|hadamard|qncd+"
GROUPS = "group16|group32|group64|group128|group256"
ACT_STEPS = Recipe.of("qdiff", reconstruction=True, act_iterations=7, act_lr=0.1)
# A flag, what it takes (a type, choices, nothing, or on and off), and the default that help shows. Written down from the
# hand-written parser, before flags came from the recipe; new are --recipe, and `running` of --act_range.
FLAGS = {
    "quantization": (
        ("ptq", "", ""), ("recipe", "path", ""), ("quant_mode", MODES, "qncd+"), ("weight_bit", "int", "8"),
        ("quant_act", "", ""), ("act_bit", "int", "8"), ("sm_abit", "int", "8"), ("a_sym", "", ""), ("a_min_max", "", ""),
        ("running_stat", "", ""), ("rs_sm_only", "", ""), ("emb_float", "", ""), ("act_range", "mse|max|running", "at"),
        ("split", "on/off", ""), ("scale_split_static", "on/off", ""), ("bias_correction", "on/off", ""),
        ("gptq", "on/off", ""), ("smooth_search", "on/off", ""), ("allocate_bits", "on/off", ""),
        ("stepwise_act", "on/off", ""), ("step_weights", "on/off", ""), ("tracking", "on/off", ""), ("weight_only", "", ""),
        ("weight_grid", "channel|gguf", "channel"), ("quantize_attention", "on/off", ""), ("rotation", "on/off", ""),
        ("rank", "int", "0"), ("branch_bits", "float", "1"),
        ("weight_granularity", f"channel|{GROUPS}", "channel"), ("act_granularity", f"tensor|token|{GROUPS}", "tensor"),
        ("temporal_differences", "on/off", ""), ("attention_bits", "int", "as"),
        ("weight_format", "int|fp8", "int"), ("act_format", "int|fp8", "int"), ("step_window", "float", "0.1"),
    ),
    "reconstruction (BRECQ)": (
        ("recon", "on/off", ""), ("cali_iters", "int", "2000"), ("recon_batch", "int", "32"), ("recon_lr", "float", "0.01"),
        ("recon_inputs", "int", "512"),
        ("recon_memory", "float", "4"), ("recon_cache", "fp16|bf16|fp32", "fp16"), ("recon_act", "", ""),
        ("cali_iters_a", "int", "500"), ("cali_lr", "float", "0.01"),
    ),
    "noise correction (inter noise)": (
        ("sample_reverse", "int?", ""), ("no-sample_reverse", "", ""), ("reverse_interval", "int", "4"),
        ("reverse_target", "consistent|paper", "paper"), ("reverse_statistics", "sample|batch|channel", "sample"),
        ("reverse_control", "on/off", ""),
    ),
    "calibration": (
        ("cali_n", "int", "64"), ("cali_st", "int", "10"), ("cali_batch_size", "int", "32"), ("cali_seed", "seed", "0"),
        ("cond", "", ""), ("cali_data_path", "path", ""), ("cali_ckpt", "path", ""), ("resume", "", ""), ("resume_w", "", ""),
    ),
}  # fmt: skip


def script_parser(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    found: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: found.append(self))
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="parsed")["parse_args"]()
    monkeypatch.undo()
    return found[0]


def described(action: argparse.Action) -> tuple[str, str, str]:
    kind = getattr(action.type, "__name__", "seed") if action.type else "|".join(action.choices or ())
    if isinstance(action, argparse.BooleanOptionalAction):
        kind = "on/off"
    kind = kind.lower() + ("?" if action.nargs == "?" else "")
    shown = re.search(r"\(default ([^\s;)]+)", action.help or "")
    return action.option_strings[0].removeprefix("--"), kind, shown[1] if shown else ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_the_sampling_scripts(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {group.title: group._group_actions for group in script_parser(script, monkeypatch)._action_groups}
    for title, expected in FLAGS.items():
        assert {described(action) for action in groups[title]} == set(expected)
        assert all(action.default in (None, False) for action in groups[title]), "a default would look like a flag"
        assert all(action.help for action in groups[title])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flag", "high"), [("--seed", MAX_SEED), ("--cali_seed", 2**35 - 1)])
def test_seeds_are_refused_first(
    script: str, flag: str, high: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = script_parser(script, monkeypatch)
    # No --config and no --logdir: seeds are looked at before anything else is.
    for text, message in (
        ("-1", "seed -1: allowed are whole numbers, 0 or more"),
        (str(high + 1), f"seed {high + 1}: allowed are whole numbers, 0 to {high}"),
        ("one", "invalid int value: 'one'"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([flag, text])
        assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"error: argument {flag}: {message}\n")


def parse(*words: str, recipe_type: type[Recipe] = Recipe) -> argparse.Namespace:
    parser = cli.make_parser("")
    cli.add_checkpoint_arguments(flags.add_recipe_arguments(parser, recipe_type)["calibration"])
    return parser.parse_args(words)


def recipe(*words: str) -> Recipe:
    found = flags.recipe_of(parse("--ptq", *words))
    assert found is not None
    return found


def undecided(made: Recipe) -> Recipe:
    """As flags leave it: inputs a forward pass follow from the model, time steps that nobody asked for from the sampler."""
    steps = None if made.calibration.steps == CalibrationConfig.steps else made.calibration.steps
    return made.with_calibration(batch_size=None, steps=steps)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Recipe.of("qncd", "W8A8")),
        ("--quant_mode linear", Recipe.of("linear", "W8A32")),
        ("--quant_mode linear --act_bit 4", Recipe.of("linear", "W8A32")),
        ("--quant_mode linear --quant_act --weight_bit 4", Recipe.of("linear", "W4A8")),
        ("--weight_only --act_bit 4", Recipe.of("qncd", "W8A32")),
        ("--a_min_max --act_bit 6", Recipe.of("qncd", "W8A6", act_range="max")),
        ("--running_stat --sm_abit 16", Recipe.of("qncd", act_range="running", softmax_bits=16)),
        ("--running_stat --rs_sm_only", Recipe.of("qncd", softmax_range="running")),
        ("--rs_sm_only --act_range mse", Recipe.of("qncd", softmax_range="running", act_range="mse")),
        ("--emb_float --a_sym", Recipe.of("qncd", quantize_embedding=False, act_symmetric=True)),
        ("--sample_reverse --reverse_interval 10", Recipe.of("qncd", interval=10)),
        ("--sample_reverse 3", Recipe.of("qncd", interval=3)),
        ("--no-sample_reverse --no-scale_split_static", Recipe.of("qncd", correction=False, smoothing=False)),
        ("--no-reverse_control", Recipe.of("qncd", control=False, shrink=False)),
        ("--quant_mode linear --reverse_target consistent", Recipe.of("linear", "W8A32", correction={"target": "consistent"})),
        ("--quant_mode qncd+ --sample_reverse 2", Recipe.of("qncd+", correction={"interval": 2})),
        ("--tracking", Recipe.of("qncd", tracking=True)),
        ("--recon --recon_batch 4", Recipe.of("qncd", reconstruction={"batch_size": 4})),
        ("--recon --cali_iters 5", Recipe.of("qncd", reconstruction={"iterations": 5})),
        ("--quant_mode qdiff --weight_bit 4 --recon_act", Recipe.of("qdiff", "W4A8", act_iterations=500)),
        ("--quant_mode qdiff --recon --recon_act --cali_iters_a 7 --cali_lr 0.1", ACT_STEPS),
        ("--weight_bit 4 --no-recon", Recipe.of("qncd", "W4A8", reconstruction=False)),
        ("--weight_bit 4 --weight_grid gguf --weight_only", Recipe.of("qncd", "W4A32", weight_grid="gguf")),
        (
            "--weight_bit 4 --weight_granularity group64 --weight_only",
            Recipe.of("qncd", "W4A16", weight_granularity="group64"),
        ),
        ("--weight_format fp8 --act_format fp8", Recipe.of("qncd", "FP8")),
        ("--act_bit 6 --act_granularity token", Recipe.of("qncd", "W8A6", act_granularity="token")),
        (
            "--act_bit 6 --temporal_differences --attention_bits 8",
            Recipe.of("qncd", "W8A6", temporal_differences=True, attention_bits=8),
        ),
        ("--quant_mode qdiff --weight_bit 4 --gptq", Recipe.of("qdiff", "W4A8", gptq=True)),
        ("--quant_mode qdiff --weight_bit 4 --resume_w", Recipe.of("qdiff", "W4A8", reconstruction=False)),
        ("--cali_n 7 --cali_st 3 --cali_seed 4", Recipe.of("qncd", samples=7, steps=3, calibration={"seed": 4})),
    ],
)
def test_what_flags_stand_for(words: str, expected: Recipe) -> None:
    assert recipe("--quant_mode", "qncd", *words.split()) == undecided(expected)


def test_the_mode_that_nobody_has_to_name() -> None:
    assert recipe("--weight_bit", "4") == undecided(Recipe.of("qncd+", "W4A8")) == undecided(Recipe.of(width="W4A8"))
    assert inspect.signature(qncd.quantize).parameters["mode"].default == DEFAULT_MODE == "qncd+"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--act_bit 8", ("max", False, False)),
        ("--act_bit 6", ("mse", False, True)),
        ("--act_bit 6 --a_min_max", ("max", False, True)),
        ("--act_bit 4", ("mse", True, True)),
    ],
)
def test_what_narrow_activations_get(words: str, expected: tuple[str, bool, bool]) -> None:
    quant = recipe("--quant_mode", "qncd+", "--weight_bit", "4", *words.split()).quant
    assert (quant.act_range, quant.smoothing_search, quant.bit_allocation) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--act_bit 9", "--act_bit 9: allowed are whole numbers, 2 to 8"),
        ("--recon --cali_iters 0", "--cali_iters 0: allowed are whole numbers, 1 or more"),
        ("--recon --recon_memory -1", "--recon_memory -1.0: allowed are numbers from 0 on"),
        ("--recon --recon_lr inf", "--recon_lr inf: allowed are numbers above 0"),
        ("--recon --recon_act --cali_iters_a -1", "--cali_iters_a -1: allowed are whole numbers, 0 or more"),
        ("--sample_reverse -1", "--sample_reverse -1: allowed are whole numbers, 1 or more"),
        ("--weight_only --quant_act", "--weight_only and --quant_act exclude one another"),
        ("--running_stat --act_range max", "--running_stat and --act_range exclude one another"),
        ("--weight_only --running_stat", "--running_stat is about quantized activations: they are in floating point here"),
        ("--weight_only --sm_abit 16", "--sm_abit is about quantized activations: they are in floating point here"),
        ("--quant_mode qdiff --no-reverse_control", "--reverse_control needs --sample_reverse"),
        (
            "--no-sample_reverse --reverse_interval 3",
            "--no-sample_reverse contradicts --sample_reverse and the --reverse_* flags",
        ),
        ("--sample_reverse 3 --reverse_interval 4", "--sample_reverse 3 and --reverse_interval 4 name two intervals"),
        ("--recon --gptq", "--recon with GPTQ (--gptq, or --quant_mode qncd): both round the weights, allowed is one"),
        ("--quant_mode ptqd --sample_reverse", "--sample_reverse: --quant_mode ptqd has a correction of its own"),
        ("--cali_iters_a 3", "--cali_iters_a needs --recon"),
        ("--weight_bit 4 --cali_iters_a 3", "--cali_iters_a needs --recon_act"),
        ("--weight_bit 4 --cali_lr 0.01", "--cali_lr needs --recon_act"),
        (
            "--temporal_differences --act_granularity tensor",
            "--temporal_differences with --act_granularity tensor: allowed are token and groups: the ranges of differences are "
            "found at run time",
        ),
        (
            "--act_granularity token --stepwise_act",
            "--stepwise_act is about calibrated ranges: with --act_granularity token they are found at run time",
        ),
        ("--act_format fp8 --act_bit 6", "--act_format fp8 with --act_bit 6: allowed is 8"),
        ("--weight_grid gguf", "--weight_grid gguf with W8A8: allowed are W8A32 and W4A32 (--weight_only)"),
        (
            "--weight_grid gguf --weight_only --scale_split_static",
            "--scale_split_static divides the inputs of convolutions, which --weight_grid gguf leaves as they are",
        ),
    ],
)
def test_refusals_name_the_flag(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        recipe("--quant_mode", "qncd", *words.split())


@pytest.mark.parametrize(
    ("words", "backend", "message"),
    [
        ("--act_granularity token", "onnxruntime",
         "has no form for activations whose scales are found at run time: allowed is torch or triton"),
        ("--act_granularity group64", "triton",
         "has no form for activations whose scales are found at run time for groups or differences: allowed is torch"),
        ("--weight_granularity group32", "openvino",
         "has no form for weights with one scale for each 32 inputs: allowed is torch"),
        ("--act_format fp8", "openvino", "has no form for fp8: allowed is torch"),
    ],
)  # fmt: skip
def test_engines_without_kernels_are_refused_first(words: str, backend: str, message: str) -> None:
    asked = recipe("--quant_mode", "qncd", *words.split())
    engine = argparse.Namespace(backend=backend, engine_precision="fp32", onnx=None)
    with pytest.raises(ValueError, match=rf"^--backend {backend} {re.escape(message)}$"):
        check_engine_arguments(engine, asked)


def test_scales_of_tokens_in_attention_are_refused_first() -> None:
    words = ("--quant_mode", "qncd", "--act_granularity", "token")
    engine = argparse.Namespace(backend="triton", engine_precision="fp32", onnx=None)
    with pytest.raises(ValueError, match=r"^--backend triton: attention's products with .*: pass --no-quantize_attention$"):
        check_engine_arguments(engine, recipe(*words))
    check_engine_arguments(engine, recipe(*words, "--no-quantize_attention"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--weight_bit 4 --quant_mode qncd+", "--quant_mode needs --ptq"),
        ("--weight_bit 4", "--weight_bit needs --ptq"),
        ("--no-split", "--no-split needs --ptq"),
        ("--a_sym", "--a_sym needs --ptq"),
        ("--recipe r.yaml", "--recipe needs --ptq"),
        ("--recon", "--recon needs --ptq"),
        ("--no-recon", "--no-recon needs --ptq"),
        ("--cali_iters 3", "--cali_iters needs --recon"),
        ("--reverse_interval 3", "--sample_reverse corrects a quantized network: it needs --ptq"),
        ("--tracking", "--tracking corrects a quantized network: it needs --ptq"),
    ],
)
def test_without_ptq_no_flag_is_ignored(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        flags.recipe_of(parse(*words.split()))


def test_full_precision_has_no_recipe() -> None:
    assert flags.recipe_of(parse()) is None
    assert flags.recipe_of(parse("--cali_n", "4")) is None, "one command line with and without --ptq"


def test_a_recipe_in_a_file_and_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"

    def given(content: dict[str, object], words: str = "") -> Recipe:
        path.write_text(json.dumps(content))  # JSON is YAML
        return recipe("--recipe", str(path), *words.split())

    content = {"mode": "qdiff", "width": "W4A6", "reconstruction": {"iterations": 40}, "samples": 12}
    expected = undecided(Recipe.of("qdiff", "W4A6", iterations=40, samples=12))
    assert given(content) == expected
    assert given(content, "--cali_iters 50 --act_bit 8") == undecided(Recipe.of("qdiff", "W4A8", iterations=50, samples=12))
    assert given(content, "--no-recon").reconstruction is None
    assert given(content, "--resume_w").reconstruction is None
    assert given(content, "--quant_mode ptqd").offline == "ptqd"
    assert given({"mode": "linear", "width": "W4A6"}).quant.act_bits == 6, "the file says that activations are quantized"
    assert given({"mode": "linear", "width": "W4A32"}, "--quant_act").quant.act_bits == 8
    assert given({"width": "W4A6", "bit_allocation": False}, "--weight_only").quant.act_bits is None
    assert given({"tracking": True}, "--sample_reverse 3").correction == CorrectionConfig(3)
    assert given({"correction": {"interval": 3}}, "--tracking").offline == "tracking"
    assert given({"calibration": {"batch_size": 3}}).decided(2).calibration.batch_size == 3
    whole = Recipe.of("qncd+", "W4A4").to_json()
    assert given(whole) == Recipe.of("qncd+", "W4A4")
    assert given(whole, "--sample_reverse 2").offline is None
    for bad, message in (({"intervall": 3}, "did you mean interval?"), ({"gptq": 1}, "gptq 1: allowed are True and False")):
        with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
            given(bad)
    with pytest.raises(FileNotFoundError, match="no such file"):
        recipe("--recipe", str(tmp_path / "none.yaml"))


Wider = dataclasses.make_dataclass(
    "Wider",
    [("outlier_channels", int, option(2, flag="outliers", limits=Limits(1, 9), help="kept apart")),
     ("rotate", bool, option(False, flag="rotate", help="rotate the inputs")),
     ("damping", float, option(0.5, flag="damping", limits=Limits(above=0, high=1), help="of the Hessian"))],
    bases=(QuantConfig,), frozen=True,
)  # fmt: skip
WiderRecipe = dataclasses.make_dataclass(
    "WiderRecipe", [("quant", Wider, section(Wider, QUANTIZATION, optional=False))], bases=(Recipe,), frozen=True
)


def test_a_new_option_is_one_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags, help, check, default, and its places in run.json and the checkpoint follow."""

    def made(*words: str) -> Recipe:
        found = flags.recipe_of(parse(*words, recipe_type=WiderRecipe), WiderRecipe)
        assert found is not None
        return found

    with pytest.raises(SystemExit):
        parse("--help", recipe_type=WiderRecipe)
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--outliers \S+ kept apart \(default 2\)", text)
    assert "--rotate, --no-rotate rotate the inputs" in text and "of the Hessian (default 0.5)" in text

    assert made("--ptq").settings()["quantization"]["outlier_channels"] == 2
    changed = made("--ptq", "--outliers", "3", "--rotate", "--damping", "0.1")
    assert changed == undecided(WiderRecipe.of("qncd+", outlier_channels=3, rotate=True, damping=0.1))
    assert {"outlier_channels": 3, "rotate": True, "damping": 0.1}.items() <= changed.settings()["quantization"].items()
    stored = json.loads(json.dumps(changed.to_json()))
    assert stored["quant"]["outlier_channels"] == 3 and WiderRecipe.from_json(stored) == changed
    assert WiderRecipe.from_json(Recipe.of("qncd").to_json()) == WiderRecipe.of("qncd"), "files from before it"
    with pytest.raises(ValueError, match=r"^quant: unknown option 'outlier_channels'"):
        Recipe.from_json(stored)

    for words, message in (
        (("--outliers", "10"), "--outliers 10: allowed are whole numbers, 1 to 9"),
        (("--damping", "0"), "--damping 0.0: allowed are numbers above 0, up to 1"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
            made("--ptq", *words)
    with pytest.raises(ValueError, match=r"^--rotate needs --ptq$"):
        made("--rotate")
    with pytest.raises(ValueError, match=r"^outlier_channels 0: allowed are whole numbers, 1 to 9$"):
        Wider(outlier_channels=0)


def test_reconstruction_options_keep_their_flags() -> None:
    """One flag an option, whatever its section is called."""
    made = recipe(
        "--no-gptq", "--recon", "--recon_lr", "0.5", "--recon_inputs", "9", "--recon_memory", "1", "--recon_cache", "bf16"
    )
    assert made.reconstruction == ReconstructionConfig(lr=0.5, inputs=9, memory_gb=1.0, cache="bf16")


def test_the_published_line() -> None:
    words = "--weight_bit 8 --quant_mode qncd --quant_act --act_bit 8 --cali_st 25 --cali_batch_size 1 --cali_n 128 --ptq"
    words += " --cond --scale_split_static --sample_reverse --reverse_interval 10 --running_stat --sm_abit 16"
    made = flags.recipe_of(parse(*words.split()))
    assert made == Recipe.of(
        "qncd", "W8A8", steps=25, samples=128, interval=10, act_range="running", softmax_bits=16, smoothing=True,
        **{"calibration.batch_size": 1},
    )  # fmt: skip
