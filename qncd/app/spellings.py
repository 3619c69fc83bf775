"""Flags as the original publishes them, where they are not one option of the recipe each."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qncd.modes import MODES
from qncd.recipe import ACT_ITERATIONS, QUANTIZATION, QuantConfig

RECONSTRUCTION, CORRECTION = "reconstruction (BRECQ)", "noise correction (inter noise)"
_SWITCH: dict[str, Any] = {"action": "store_true"}
_ON_OFF: dict[str, Any] = {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class Spelling:
    """A flag that stands for changes of the recipe.

    Attributes:
        flag: without dashes.
        group: title of its group in `--help`.
        changes: by path, what it stands for; empty where `changes_of_spellings` says.
        arguments: of argparse's `add_argument`.
        switch: what it turns on, where `--help` shall name the modes in which that is on.
    """

    flag: str
    group: str
    help: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=lambda: _SWITCH)
    switch: str | None = None


SPELLINGS = (
    Spelling("quant_act", QUANTIZATION, "quantize activations in --quant_mode linear too"),
    Spelling("weight_only", QUANTIZATION, "leave activations in floating point whatever the mode"),
    Spelling("a_sym", QUANTIZATION, "symmetric activation codes, no zero point", {"quant.act_symmetric": True}),
    Spelling("a_min_max", QUANTIZATION, "activation ranges by their extremes: --act_range max", {"quant.act_range": "max"}),
    Spelling(
        "running_stat", QUANTIZATION, "activation ranges by moving averages (momentum 0.95)", {"quant.act_range": "running"}
    ),
    Spelling("rs_sm_only", QUANTIZATION, "moving averages for the softmax output only", {"quant.softmax_range": "running"}),
    Spelling(
        "emb_float", QUANTIZATION, "leave the time embedding and its projections in floating point",
        {"quant.quantize_embedding": False},
    ),
    Spelling(
        "tracking", QUANTIZATION,
        "correct each prediction by a filter fitted on calibration runs to lead back to the full-precision trajectory, in the "
        "place of --sample_reverse", arguments=_ON_OFF, switch="tracking",
    ),
    Spelling("recon_act", RECONSTRUCTION, "after the weights, learn the activation scales too, block by block (LSQ)"),
    Spelling(
        "sample_reverse", CORRECTION, "estimate the quantization noise while sampling, every N steps",
        arguments={"type": int, "nargs": "?", "const": 0, "metavar": "N"}, switch="correction",
    ),
    Spelling("no-sample_reverse", CORRECTION, "no correction, for ablation"),
    Spelling(
        "reverse_control", CORRECTION,
        "correct relative to the full-precision model's own estimates (default; --no-reverse_control: as published)",
        arguments=_ON_OFF,
    ),
)  # fmt: skip

NAMES = {
    "mode": "--quant_mode", "tracking": "--tracking", "correction": "--sample_reverse",
    "correction.control": "--reverse_control", "correction.shrink": "--reverse_control",
    "quant.act_symmetric": "--a_sym", "quant.softmax_range": "--rs_sm_only", "quant.quantize_embedding": "--emb_float",
}  # fmt: skip


def names(args: argparse.Namespace) -> dict[str, str]:
    """What messages call options that have no flag of their name, by path."""
    by_hand = args.cali_iters_a is not None and not args.recon_act
    given = {path: f"--{s.flag}" for s in SPELLINGS if is_given(args, s.flag) for path in s.changes}
    return {**NAMES, **given, "reconstruction.act_iterations": "--cali_iters_a" if by_hand else "--recon_act"}


def attribute(flag: str) -> str:
    """Where argparse keeps a flag's value."""
    return flag.replace("-", "_")


def is_given(args: argparse.Namespace, flag: str) -> bool:
    """Whether a flag of the recipe is on the command line; those that are not are None, or False where they only switch on."""
    value, once = getattr(args, attribute(flag), None), any(s.flag == flag and s.arguments is _SWITCH for s in SPELLINGS)
    return bool(value) if once else value is not None


def check_spellings(args: argparse.Namespace) -> None:
    """Raise ValueError where flags contradict one another by what they say, whatever the recipe comes to."""
    if args.weight_only and args.quant_act:
        raise ValueError("--weight_only and --quant_act exclude one another")
    if args.a_min_max and (args.running_stat or args.act_range not in (None, "max")):
        raise ValueError("--a_min_max contradicts --running_stat and --act_range mse")
    if args.running_stat and args.act_range:
        raise ValueError("--running_stat and --act_range exclude one another")


def changes_of_spellings(args: argparse.Namespace) -> dict[str, Any]:
    """What the published flags ask for, by path. Raises ValueError where they contradict one another."""
    check_spellings(args)
    changes: dict[str, Any] = {}
    for spelling in SPELLINGS:
        if is_given(args, spelling.flag):
            changes |= spelling.changes
    if args.rs_sm_only and args.running_stat:  # the narrower of the two
        changes.pop("quant.act_range")
    if args.tracking is not None:
        changes["tracking"] = args.tracking
    if args.recon_act and args.cali_iters_a is None:
        changes["reconstruction.act_iterations"] = ACT_ITERATIONS
    return changes | _correction_changes(args)


def _correction_changes(args: argparse.Namespace) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    asked = is_correction_asked(args)
    if args.sample_reverse is not None and args.sample_reverse < 0:
        raise ValueError(f"--sample_reverse {args.sample_reverse}: allowed are whole numbers, 1 or more")
    if args.sample_reverse and args.reverse_interval is not None and args.sample_reverse != args.reverse_interval:
        raise ValueError(
            f"--sample_reverse {args.sample_reverse} and --reverse_interval {args.reverse_interval} name two intervals"
        )
    if asked or args.no_sample_reverse:
        changes["correction"] = asked
    if args.sample_reverse:
        changes["correction.interval"] = args.sample_reverse
    if args.reverse_control is not None:
        changes["correction.control"] = changes["correction.shrink"] = args.reverse_control
    return changes


def is_correction_asked(args: argparse.Namespace) -> bool:
    """Whether some flag asks for noise correction. Raises ValueError where another one asks for none."""
    details = ("sample_reverse", "reverse_interval", "reverse_target", "reverse_statistics")
    asked = any(getattr(args, name) is not None for name in details)
    if args.no_sample_reverse and asked:
        raise ValueError("--no-sample_reverse contradicts --sample_reverse and the --reverse_* flags")
    return asked


def act_bits(args: argparse.Namespace, mode: str, file: Mapping[str, Any]) -> dict[str, Any]:
    """The width of the activations, which in some modes --quant_act asks for; nothing where the recipe's file says it."""
    wanted = MODES[mode].quantizes_acts or args.quant_act or file.get("quant.act_bits") is not None
    if args.weight_only or not wanted:
        return {"quant.act_bits": None}
    if args.act_bit is None and args.quant_act and file.get("quant.act_bits", 8) is None:
        return {"quant.act_bits": QuantConfig.act_bits}
    return {} if args.act_bit is None else {"quant.act_bits": args.act_bit}


def check_activation_steps(args: argparse.Namespace, file: Mapping[str, Any]) -> None:
    """Raise ValueError where flags say how activation scales are learned, and nothing says that they are."""
    if args.recon_act:
        if args.cali_iters_a is not None and args.cali_iters_a < 1:
            raise ValueError(f"--cali_iters_a {args.cali_iters_a}: allowed are whole numbers, 1 or more")
    elif not file.get("reconstruction.act_iterations"):
        for name in ("cali_iters_a", "cali_lr"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} needs --recon_act")


def refuse_without_ptq(args: argparse.Namespace) -> None:
    """Raise ValueError where a part is asked for that works on a quantized network."""
    if args.recon:
        raise ValueError("--recon needs --ptq")
    if is_correction_asked(args):
        raise ValueError("--sample_reverse corrects a quantized network: it needs --ptq")
    if args.tracking:
        raise ValueError("--tracking corrects a quantized network: it needs --ptq")
