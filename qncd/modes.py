"""What each --quant_mode is composed of: QNCD's method, its peers, and their common parts switched on one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qncd.recipe import TRACKING, WIDEST, QuantConfig


@dataclass(frozen=True)
class Mode:
    """A composition of the package's parts; `summary` is what `--help` says about it.

    Attributes:
        weight_range, act_range, split, bias_correction, gptq, smoothing_search, bit_allocation, stepwise_embedding,
            stepwise_activations: of QuantConfig; smoothing is searched at 4-bit activations and fewer, where tracking leaves
            something to gain, with gptq; bits are allocated below 8, where there are some to give.
        narrow_act_range: `act_range` below 8 bits, where clipping costs less than what finer steps gain.
        quantizes_acts: without being asked to by --quant_act.
        smoothing: of features by the time embedding (intra noise).
        runtime_correction: of each prediction by an estimate made while sampling (inter noise).
        offline: the correction by what calibration runs have shown, "ptqd", "d2dpm" or "tracking".
        reconstruction: BRECQ.
    """

    summary: str
    weight_range: str = "mse"
    act_range: str = "max"
    narrow_act_range: str = "mse"
    split: bool = True
    quantizes_acts: bool = True
    bias_correction: bool = False
    gptq: bool = False
    smoothing_search: bool = False
    bit_allocation: bool = False
    stepwise_embedding: bool = False
    stepwise_activations: bool = False
    smoothing: bool = False
    runtime_correction: bool = False
    offline: str | None = None
    reconstruction: bool = False

    def quant_config(self, weight_bits: int | None, act_bits: int | None, **changes: Any) -> QuantConfig:
        """The mode's QuantConfig at a width; `changes` are fields of it that are set otherwise, None for those that are not."""
        names = (
            "weight_range", "act_range", "split", "bias_correction", "gptq", "smoothing_search", "bit_allocation",
            "stepwise_embedding", "stepwise_activations",
        )  # fmt: skip
        narrow = act_bits is not None and act_bits < WIDEST
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        fields["bit_allocation"] &= narrow
        if narrow:
            fields["act_range"] = self.narrow_act_range
        fields |= {name: value for name, value in changes.items() if value is not None}
        if changes.get("smoothing_search") is None:
            fields["smoothing_search"] &= fields["gptq"] and act_bits is not None and act_bits <= 4
        return QuantConfig(weight_bits, act_bits, **fields)


QUANT_MODES = {
    "linear": Mode(
        "min-max ranges, rounding to nearest and nothing else; activations with --quant_act",
        weight_range="max", narrow_act_range="max", split=False, quantizes_acts=False,
    ),
    "qdiff": Mode("Q-Diffusion: ranges of least error, shortcut split, weights reconstructed", reconstruction=True),
    "ptqd": Mode("qdiff, and PTQD's correction of each prediction by offline statistics", offline="ptqd", reconstruction=True),
    "tfmq": Mode(
        "qdiff, with TFMQ-DM's reconstruction of the time embedding and a range for each time step at its layers",
        stepwise_embedding=True, reconstruction=True,
    ),
    "d2dpm": Mode(
        "qdiff, and D2-DPM's correction of each prediction by offline statistics", offline="d2dpm", reconstruction=True
    ),
    "qncd": Mode(
        "ranges of least error, split, smoothing, bias and runtime noise correction; weights reconstructed with --recon",
        bias_correction=True, smoothing=True, runtime_correction=True,
    ),
    "qncd+": Mode(
        "not in the paper: weights by GPTQ against the full-precision outputs, smoothing searched for each layer, a range for "
        "each time step at every activation, widths of activations by what they do to the sample, and filters that lead back "
        "to the full-precision trajectory",
        bias_correction=True, gptq=True, smoothing_search=True, bit_allocation=True, stepwise_activations=True,
        offline=TRACKING,
    ),
}  # fmt: skip
