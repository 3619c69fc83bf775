"""What each mode is composed of: QNCD's method, its peers, and what goes beyond the paper.

A mode is a recipe by name: the options of `qncd.recipe.Recipe` that it sets, some of them by the width of the activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qncd.granularity import TENSOR, TOKEN
from qncd.options import Option, RecipeError, check_choice, options_of, paths_of, resolve, sections_of
from qncd.widths import CALIBRATED, parse_width

DEFAULT_MODE = "qncd+"
WIDEST = 8  # bits of an activation: what integer kernels take
CHANNEL, GGUF = "channel", "gguf"  # grids of weights
TRACKING = "tracking"  # the offline correction of qncd.sampling.correctors.tracking
OF_ACTIVATIONS = ("smoothing_search", "temporal_differences", "act_granularity")  # what modes set of quantized ones
CLIPPED = {"act_range": "mse"}  # below 8 bits clipping costs less than what finer steps gain


@dataclass(frozen=True)
class Mode:
    """A composition of the package's parts.

    Attributes:
        summary: what `--help` says about it.
        options: that it sets at every width; all others have their defaults.
        weights_below_8: what it sets besides where weights have fewer than 8 bits.
        below_8: and where activations have fewer than 8 bits.
        up_to_4: and where they have 4 or fewer.
        quantizes_acts: the command line quantizes activations without being asked to by --quant_act.
        runtime: the correction while sampling takes the place of the offline one where it, or an option of it, is asked for.
        without_runtime: what it sets besides where that is not so.
    """

    summary: str
    options: Mapping[str, Any]
    weights_below_8: Mapping[str, Any] = field(default_factory=dict)
    below_8: Mapping[str, Any] = field(default_factory=lambda: CLIPPED)
    up_to_4: Mapping[str, Any] = field(default_factory=dict)
    quantizes_acts: bool = True
    runtime: bool = False
    without_runtime: Mapping[str, Any] = field(default_factory=dict)

    def at(self, weight_bits: int | None, act_bits: int | None) -> dict[str, Any]:
        """The options that it sets where weights and activations have so many bits; None for floating point."""
        found = dict(self.options)
        if weight_bits is not None and weight_bits < WIDEST:
            found |= self.weights_below_8
        if act_bits is not None and act_bits < WIDEST:
            found |= self.below_8
        if act_bits is not None and act_bits <= 4:
            found |= self.up_to_4
        return found


_PEER = {"bias_correction": False}
_BRECQ = {"reconstruction": True}  # of 8 bits the nearest is as good

MODES = {
    "linear": Mode(
        "min-max ranges and rounding to nearest; activations only with --quant_act",
        {"weight_range": "max", "split": False, "bias_correction": False}, below_8={}, quantizes_acts=False,
    ),
    "qdiff": Mode("Q-Diffusion: ranges of least error, shortcut split, weights below 8 bits reconstructed", _PEER, _BRECQ),
    "ptqd": Mode("qdiff, and PTQD's correction of each prediction by statistics", {**_PEER, "offline": "ptqd"}, _BRECQ),
    "tfmq": Mode(
        "qdiff, with TFMQ-DM's time embedding and a range for each time step at every activation",
        {**_PEER, "stepwise_embedding": True, "stepwise_activations": True}, _BRECQ,
    ),
    "d2dpm": Mode("qdiff, and D2-DPM's correction of each prediction by statistics", {**_PEER, "offline": "d2dpm"}, _BRECQ),
    "modiff": Mode(
        "qdiff, with MoDiff's activations: the differences of time steps are rounded, by ranges found at run time",
        {**_PEER, "act_granularity": TOKEN, "temporal_differences": True}, _BRECQ,
    ),
    "qncd": Mode(
        "qdiff, with QNCD's smoothing of UNets, a range for each time step and filters, or (--sample_reverse) noise estimation",
        {"bias_correction": True, "smoothing": True, "offline": TRACKING}, _BRECQ,
        runtime=True, without_runtime={"stepwise_activations": True},
    ),
    "svdquant": Mode(
        "SVDQuant: a 16-bit low-rank branch beside smoothed weights, the rest of them by GPTQ",
        {"bias_correction": True, "gptq": True, "smoothing_search": True, "rank": 32},
    ),
    "hadamard": Mode(
        "Hadamard rotations of the channels in front of layers (ConvRot), weights by GPTQ",
        {"bias_correction": True, "gptq": True, "rotation": True},
    ),
    "qncd+": Mode(
        "not in the paper: GPTQ, a range for each time step, mixed precision below 8 bits, filters, rotations on transformers",
        {"bias_correction": True, "gptq": True, "stepwise_activations": True, "offline": TRACKING, "rotation": None},
        below_8={**CLIPPED, "bit_allocation": True},
        up_to_4={"smoothing_search": True},  # at more bits tracking leaves it nothing to gain
    ),
}  # fmt: skip


def changes_of(tree: type, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a recipe as a user writes them, by path; a `width` among them becomes two. As `qncd.options.resolve`."""
    width = parse_width(changes["width"]) if "width" in changes else {}
    others = resolve(tree, {name: value for name, value in changes.items() if name != "width"}, ("tracking", "width"))
    kinds = {path: option.kind for path, option in paths_of(tree).items()}
    return {**width, **{path: _as_number(value) if kinds.get(path) is float else value for path, value in others.items()}}


def _as_number(value: Any) -> Any:
    """1e-3 is a text in YAML 1.1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def compose(tree: type, mode: str, given: Mapping[str, Any], watched: Collection[str] = ()) -> Any:
    """A mode with changes by path. What the mode sets gives way where the changes leave it nothing to do.

    Args:
        tree: `qncd.recipe.Recipe`, or one with more options.
        watched: those of the changes that must have an effect.

    Raises:
        ValueError: an option is out of range, contradicts another one, or is of a part that is off.
    """
    check_choice("mode", mode, tuple(MODES))
    weight_bits, act_bits = (given.get(f"quant.{name}", 8) for name in ("weight_bits", "act_bits"))
    usual = changes_of(tree, MODES[mode].at(*(bits if isinstance(bits, int) else None for bits in (weight_bits, act_bits))))
    offline, correction = _corrections(mode, usual, given)
    if not correction:
        usual |= changes_of(tree, MODES[mode].without_runtime)
    if weight_bits is None:
        usual = {path: value for path, value in usual.items() if path not in ("quant.gptq", "quant.rank")}
    if given.get("quant.temporal_differences"):
        usual.setdefault("quant.act_granularity", TOKEN)
    if act_bits is None:  # nor is there anything to be left to the family of a network
        usual = {path: v for path, v in usual.items() if v is not None and path.partition(".")[2] not in OF_ACTIVATIONS}
    elif {**usual, **given}.get("quant.act_granularity", TENSOR) != TENSOR:  # there are no ranges to calibrate
        usual = {path: value for path, value in usual.items() if path.partition(".")[2] not in CALIBRATED}
    asked = {**usual, **given}
    if asked.get("quant.gptq"):
        asked["quant.bias_correction"] = given.get("quant.bias_correction", True)
        asked["reconstruction"] = given.get("reconstruction", False)
    elif "quant.smoothing_search" not in given:
        asked["quant.smoothing_search"] = False
    if given.get("smoothing") or any(path.startswith("smoothing.") for path in given):
        asked["smoothing.transformers"] = given.get("smoothing.transformers", True)
    if asked.get("quant.weight_grid") == GGUF:
        asked["smoothing"] = given.get("smoothing", False)
    asked["offline"], asked["correction"] = offline, correction
    values = {"mode": mode} | {name: asked[name] for name in options_of(tree) if name in asked and name != "mode"}
    for name, part in sections_of(tree).items():
        details = {path: value for path, value in asked.items() if path.startswith(f"{name}.")}
        if part.optional and not asked.get(name):
            if details:
                raise RecipeError(f"{{{next(iter(details))}}} needs {{{name}}}")
            continue
        _check_effects(name, options_of(part.kind), asked, watched)
        values[name] = part.kind(**{path.partition(".")[2]: value for path, value in details.items()})
    return tree(**values)


def _check_effects(section: str, options: Mapping[str, Option], asked: Mapping[str, Any], watched: Collection[str]) -> None:
    idle = {
        "act_bits": "is about quantized activations: they are in floating point here",
        "weight_bits": "is about quantized weights: they are in floating point here",
    }
    for name, option in options.items():
        path = f"{section}.{name}"
        if path not in watched or option.needs is None or asked[path] == option.default:
            continue
        needed = f"{section}.{option.needs}"
        if not asked.get(needed, options[option.needs].default):
            raise RecipeError(f"{{{path}}} {idle.get(option.needs, f'needs {{{needed}}}')}")


def _corrections(mode: str, usual: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The offline correction, and whether there is one while sampling: what is asked for takes the place of the mode's."""
    kind, tracking = usual.get("offline"), given.get("tracking")
    if tracking and kind not in (None, TRACKING):
        raise RecipeError(f"{{tracking}}: {{mode}} {mode} has a correction of its own")
    if tracking is not None and kind in (None, TRACKING):
        kind = TRACKING if tracking else None
    kind = given.get("offline", kind)
    asked_for = bool(tracking or given.get("offline"))
    correction = given.get("correction")
    if MODES[mode].runtime and not asked_for:
        if correction is None:
            correction = any(path.startswith("correction.") for path in given)
        elif correction is False:  # none of either kind
            kind = None
    if correction and kind == TRACKING and not asked_for:
        kind = None
    if correction and kind:
        other = "{tracking} is a correction too" if asked_for else f"{{mode}} {mode} has a correction of its own"
        raise RecipeError(f"{{correction}}: {other}")
    return kind, bool(correction)
