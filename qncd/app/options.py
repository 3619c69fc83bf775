"""What parsed flags ask for: the configurations that they stand for, and what they contradict."""

from __future__ import annotations

import argparse

from qncd.app import parser as cli
from qncd.modes import QUANT_MODES
from qncd.recipe import TRACKING, CorrectionConfig, QuantConfig, ReconstructionConfig, SamplerConfig, SmoothingConfig

RECONSTRUCTION_FLAGS = {
    "iterations": "cali_iters", "lr": "recon_lr", "inputs": "recon_inputs", "memory_gb": "recon_memory", "cache": "recon_cache",
    "act_iterations": "cali_iters_a", "act_lr": "cali_lr",
}  # fmt: skip


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler that the flags ask for. Raises ValueError for values out of range."""
    return SamplerConfig(args.sample_type, args.skip_type, args.timesteps, args.eta)


def quant_config(args: argparse.Namespace) -> QuantConfig | None:
    """The quantization that the flags ask for, None without --ptq. Raises ValueError for values out of range."""
    if not args.ptq:
        return None
    for name in ("weight_bit", "act_bit"):
        if not 2 <= getattr(args, name) <= 8:
            raise ValueError(f"--{name} {getattr(args, name)}: allowed are 2 to 8")
    if not 2 <= args.sm_abit <= 16:
        raise ValueError(f"--sm_abit {args.sm_abit}: allowed are 2 to 16")
    if args.weight_only and args.quant_act:
        raise ValueError("--weight_only and --quant_act exclude one another")
    mode = QUANT_MODES[args.quant_mode]
    quantize_acts = not args.weight_only and (mode.quantizes_acts or args.quant_act)
    if args.a_min_max and (args.running_stat or args.act_range not in (None, "max")):
        raise ValueError("--a_min_max contradicts --running_stat and --act_range mse")
    if args.stepwise_act and not quantize_acts:
        raise ValueError("--stepwise_act is about quantized activations: they are in floating point here")
    if args.smooth_search and not quantize_acts:
        raise ValueError("--smooth_search is about quantized activations: they are in floating point here")
    if args.smooth_search and not (mode.gptq if args.gptq is None else args.gptq):
        raise ValueError("--smooth_search compares the errors that GPTQ leaves: it needs --gptq")
    if args.allocate_bits and not quantize_acts:
        raise ValueError("--allocate_bits is about quantized activations: they are in floating point here")
    if args.recon and (mode.gptq if args.gptq is None else args.gptq):
        raise ValueError(f"--recon with GPTQ (--gptq, or --quant_mode {args.quant_mode}): both round the weights, allowed is one")
    act_range = "max" if args.a_min_max else args.act_range  # None: what the mode takes
    if args.running_stat or args.rs_sm_only:
        if args.running_stat and args.act_range:
            raise ValueError("--running_stat and --act_range exclude one another")
        act_range = act_range if args.rs_sm_only else "running"
    return mode.quant_config(
        args.weight_bit,
        args.act_bit if quantize_acts else None,
        softmax_bits=args.sm_abit,
        act_range=act_range,
        softmax_range="running" if args.rs_sm_only else None,
        quantize_embedding=not args.emb_float,
        act_symmetric=args.a_sym,
        split=args.split,
        bias_correction=args.gptq or None if args.bias_correction is None else args.bias_correction,
        gptq=args.gptq,
        smoothing_search=args.smooth_search,
        bit_allocation=args.allocate_bits,
        stepwise_activations=args.stepwise_act,
    )


def smoothing_config(args: argparse.Namespace) -> SmoothingConfig | None:
    """Smoothing, or None where it is off."""
    wanted = QUANT_MODES[args.quant_mode].smoothing if args.scale_split_static is None else args.scale_split_static
    return SmoothingConfig() if args.ptq and wanted else None


def correction_config(args: argparse.Namespace) -> CorrectionConfig | None:
    """Noise correction, or None where it is off. Raises ValueError for contradicting flags."""
    details = [n for n in ("reverse_interval", "reverse_target", "reverse_statistics") if getattr(args, n) is not None]
    asked = args.sample_reverse is not None or bool(details)
    if args.no_sample_reverse and asked:
        raise ValueError("--no-sample_reverse contradicts --sample_reverse and the --reverse_* flags")
    if asked and not args.ptq:
        raise ValueError("--sample_reverse corrects a quantized network: it needs --ptq")
    by_mode = QUANT_MODES[args.quant_mode].runtime_correction and not args.tracking
    if args.no_sample_reverse or not args.ptq or not (asked or by_mode):
        return None
    if args.sample_reverse and args.reverse_interval and args.sample_reverse != args.reverse_interval:
        raise ValueError(
            f"--sample_reverse {args.sample_reverse} and --reverse_interval {args.reverse_interval} name two intervals"
        )
    if (args.sample_reverse or 0) < 0 or (args.reverse_interval is not None and args.reverse_interval < 1):
        value = args.reverse_interval if args.reverse_interval is not None else args.sample_reverse
        raise ValueError(f"interval {value}: allowed are whole numbers, 1 or more")
    defaults = CorrectionConfig()
    return CorrectionConfig(
        interval=args.sample_reverse or args.reverse_interval or defaults.interval,
        target=args.reverse_target or defaults.target,
        statistics=args.reverse_statistics or defaults.statistics,
        control=args.reverse_control,
        shrink=args.reverse_control and defaults.shrink,
    )


def reconstruction_config(args: argparse.Namespace) -> ReconstructionConfig | None:
    """Reconstruction, or None where it is off. Raises ValueError for contradicting flags and values out of range."""
    given = {field: getattr(args, name) for field, name in RECONSTRUCTION_FLAGS.items() if getattr(args, name) is not None}
    by_mode = QUANT_MODES[args.quant_mode].reconstruction and not args.resume_w and not args.gptq
    wanted = by_mode if args.recon is None else args.recon
    if wanted and args.ptq:
        act_flags = [RECONSTRUCTION_FLAGS[field] for field in ("act_iterations", "act_lr") if field in given]
        if not args.recon_act:
            if act_flags:
                raise ValueError(f"--{act_flags[0]} needs --recon_act")
            return ReconstructionConfig(**given)
        if args.weight_only or not (QUANT_MODES[args.quant_mode].quantizes_acts or args.quant_act):
            raise ValueError("--recon_act learns scales of quantized activations: they are in floating point here")
        given.setdefault("act_iterations", cli.ACT_ITERATIONS)
        cli.check_counts(args, ("cali_iters_a",))
        return ReconstructionConfig(**given)
    if args.recon:
        raise ValueError("--recon needs --ptq")
    if given or args.recon_act:
        raise ValueError(f"--{RECONSTRUCTION_FLAGS[next(iter(given))] if given else 'recon_act'} needs --recon")
    return None


def offline_kind(args: argparse.Namespace) -> str | None:
    """The offline correction that --quant_mode or --tracking stands for, None where --sample_reverse takes tracking's place.

    Raises:
        ValueError: --tracking without --ptq, or two corrections are asked for.
    """
    kind = QUANT_MODES[args.quant_mode].offline
    if args.tracking and not args.ptq:
        raise ValueError("--tracking corrects a quantized network: it needs --ptq")
    if args.tracking and kind not in (None, TRACKING):
        raise ValueError(f"--tracking: --quant_mode {args.quant_mode} has a correction of its own")
    if kind in (None, TRACKING) and args.tracking is not None:
        kind = TRACKING if args.tracking else None
    if not args.ptq or kind is None:
        return None
    if correction_config(args) is None:
        return kind
    if kind == TRACKING and not args.tracking:
        return None
    other = "--tracking is a correction too" if args.tracking else f"--quant_mode {args.quant_mode} has a correction of its own"
    raise ValueError(f"--sample_reverse: {other}")
