"""Everything that can be asked for, as one tree of frozen dataclasses: what is checked, stored and turned into flags.

`Recipe.of("qncd+", "W4A8", iterations=4000)` starts from a mode (`qncd.modes`) and changes options of it by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qncd.granularity import ACTIVATIONS, TENSOR, WEIGHTS
from qncd.modes import CHANNEL, DEFAULT_MODE, GGUF, MODES, WIDEST, changes_of, compose
from qncd.options import Limits, RecipeError, check_options, option, options_of, read_options, read_tree, section, sections_of
from qncd.options import OptionError as OptionError
from qncd.options import check_choice as check_choice
from qncd.options import check_int as check_int
from qncd.reconstruction import ACT_ITERATIONS as ACT_ITERATIONS
from qncd.reconstruction import ReconstructionConfig as ReconstructionConfig
from qncd.smoothing import SmoothingConfig
from qncd.steps import SamplerConfig as SamplerConfig
from qncd.widths import FORMATS, FP8, INTEGER, check_numbers, label_of, parse_width

WEIGHT_RANGES = ("mse", "max")
WEIGHT_GRIDS = (CHANNEL, GGUF)
GGUF_BITS, GGUF_GROUP = (4, 8), 32  # of q4_0 and q8_0, and inputs that share a scale
ACT_RANGES = ("mse", "max", "running")
TARGETS = ("consistent", "paper")
STATISTICS = ("sample", "batch", "channel")
QUANTIZATION = "quantization"
R = TypeVar("R", bound="Recipe")


@dataclass(frozen=True)
class QuantConfig:
    """How weights and activations are quantized (uniform affine, section 3.1 of Q-Diffusion, arXiv 2302.04304).

    Attributes:
        weight_bits: 2 to 8, or None to leave weights in floating point. Symmetric, codes in [-2^(b-1), 2^(b-1)-1].
        act_bits: 2 to 8, or None. Codes in [0, 2^b-1] with a zero point, or [-2^(b-1), 2^(b-1)-1] without one where
            `act_symmetric`. Where a skip concatenation is split, its halves have ranges apart.
        softmax_bits: 2 to 16: attention probabilities, never a zero point. Used where `act_bits` is not None.
        edge_bits: weights and activations of the first and the last layer; None for the same as in all other layers.
        weight_range: "mse" (the clip ratio that minimises the L2.4 error) or "max".
        act_range: "max", "mse" (as for weights, over the histogram of the whole calibration set), or "running"
            (exponential moving average of batch extremes, momentum 0.95). Clipping shrinks predictions a little at every
            step, which a sampler adds up: "max" gave the better images at 8 bits, "mse" at 6 and 4.
        split: quantize the two halves of a skip concatenation apart (Q-Diffusion's shortcut split).
        softmax_range: `act_range` of the softmax output alone; None for the same as all other activations.
        quantize_attention: quantize q, k, v and the softmax output as well.
        quantize_embedding: quantize the time embedding's layers and the blocks' projections of it as well.
        stepwise_embedding: inputs of those layers have a range for each of the sampler's time steps (TFMQ-DM, arXiv 2311.16503).
        stepwise_activations: every activation has a range for each time step that the sampler visits.
        step_window: share of them, on each side of one, whose ranges its own covers too; None: that of the network's family.
        gptq: round each layer's weights in sequence, every error made up for by the weights not yet rounded (GPTQ, arXiv
            2210.17323), towards what the layer gives on inputs that are not rounded (GPTAQ, arXiv 2504.02692).
        smoothing_search: divide each layer's input channels by powers of their spread and multiply the weights by
            them (SmoothQuant, arXiv 2211.10438); the power that leaves the layer's output the least error is kept. Acts
            where `act_bits` is not None.
        bit_allocation: mixed precision: activations have up to 8 bits each, and `act_bits` in the mean over all multiplications,
            shared out so as to leave the sample the least error; `edge_bits` and `softmax_bits` stay. Needs 7 bits or fewer.
        step_weights: in reconstruction and bias correction, inputs count as an error at their time step moves the sample.
        weight_grid: "channel" (one scale for each output channel), or "gguf" (one for each 32 inputs of a row, a float16 number,
            as in GGUF's types q8_0 and q4_0: exactly what such a file holds, see `qncd.engines.gguf`). On GGUF's grid are linear
            layers whose rows are whole blocks; convolutions, the time embedding and activations stay in floating point.
        rotation: rotate the inputs of inner layers (`qncd.ptq.stages.rotation`); None: as the family gains by it (transformers).
        rank: the largest, of 16-bit branches beside the weights of the same layers (`qncd.ptq.stages.low_rank`); 0 for none.
        branch_bits: of a branch for each weight of its layer, at most: small layers have smaller ranks, or none.
        weight_granularity: "channel" (one scale for each output channel), or "group32" and the like (one for each 32 inputs of a
            row, a float16 number): a name in `qncd.granularity.WEIGHTS`.
        act_granularity: "tensor" (one scale, calibrated), or found at run time: "token" (one for each token of a linear layer's
            input, each sample of a convolution's) or "group32" and the like (one for each 32 channels of those).
        temporal_differences: round what inputs of layers differ by from the time step before (MoDiff, arXiv 2506.22463).
        attention_bits: 2 to 8, of q, k and v; None for `act_bits`.
        weight_format, act_format: "int", or "fp8": 8 bits of floating point, e4m3, without zero points.
        bias_correction: take the mean error of each layer's output out of its bias (Nagel et al. 2019, arXiv 1906.04721, section
            4.2; measured on calibration data). Not part of the QNCD paper.
    """

    weight_bits: int | None = option(8, flag="weight_bit", limits=Limits(2, 8), optional=True, help="bits of the weights, 2 to 8")
    act_bits: int | None = option(8, flag="act_bit", limits=Limits(2, 8), optional=True, help="bits of the activations, 2 to 8")
    softmax_bits: int = option(8, flag="sm_abit", limits=Limits(2, 16), needs="act_bits", help="of the softmax output, 2 to 16")
    edge_bits: int | None = option(8, limits=Limits(2, 8), optional=True)
    weight_range: str = option("mse", choices=WEIGHT_RANGES)
    act_range: str = option(
        "max", flag="act_range", choices=ACT_RANGES, needs="act_bits",
        help="activation ranges: extremes (default at 8 bits, and in linear), least L2.4 error (default below) or moving "
        "averages (as --running_stat)",
    )  # fmt: skip
    act_symmetric: bool = option(False, needs="act_bits")
    split: bool = option(True, flag="split", help="quantize the halves of skip concatenations apart")
    softmax_range: str | None = option(None, choices=ACT_RANGES, optional=True, needs="act_bits")
    quantize_attention: bool = option(True, flag="quantize_attention", help="quantize q, k, v and the softmax output as well")
    quantize_embedding: bool = option(True)
    stepwise_embedding: bool = option(False)
    stepwise_activations: bool = option(
        False, flag="stepwise_act", needs="act_bits", help="a range for each of the sampler's time steps at every activation"
    )
    gptq: bool = option(
        False, flag="gptq",
        help="round weights in sequence, errors made up for by those to come, against full-precision outputs",
    )  # fmt: skip
    smoothing_search: bool = option(
        False, flag="smooth_search", needs="act_bits",
        help="smooth each layer's input as strongly as leaves its output the least error",
    )  # fmt: skip
    bit_allocation: bool = option(
        False, flag="allocate_bits", needs="act_bits",
        help="mixed precision: activations of up to 8 bits, --act_bit in the mean over all multiplications, shared out so as "
        "to leave the sample the least error",
    )  # fmt: skip
    bias_correction: bool = option(
        True, flag="bias_correction", help="take a layer's mean error out of its bias; not in the paper"
    )
    step_weights: bool = option(False, flag="step_weights", help="weigh inputs by what an error at their step does to the sample")
    weight_grid: str = option(
        CHANNEL, flag="weight_grid", choices=WEIGHT_GRIDS,
        help="channel: weights have one scale for each output channel; gguf: those of linear layers have one for each 32 inputs "
        "(q8_0 at 8 bits, q4_0 at 4), others stay in floating point, for `qncd export --out FILE.gguf`",
    )  # fmt: skip
    rotation: bool | None = option(False, flag="rotation", optional=True, help="Hadamard rotations (qncd+: of transformers)")
    rank: int = option(0, flag="rank", limits=Limits(0), help="largest rank of 16-bit branches beside weights (0: none)")
    branch_bits: float = option(
        1.0, flag="branch_bits", limits=Limits(above=0), needs="rank", help="their bits for each weight of a layer at most"
    )
    weight_granularity: str = option(
        CHANNEL, flag="weight_granularity", choices=tuple(WEIGHTS), needs="weight_bits",
        help="one scale for each output channel of a weight, or for each group of so many inputs of a row",
    )  # fmt: skip
    act_granularity: str = option(
        TENSOR, flag="act_granularity", choices=tuple(ACTIVATIONS), needs="act_bits",
        help="tensor: one calibrated range; token: one for each token (of a convolution: sample), found at run time; "
        "group: one for each group of so many of its channels, likewise",
    )  # fmt: skip
    temporal_differences: bool = option(
        False, flag="temporal_differences", needs="act_bits", help="round what inputs differ by from the time step before"
    )
    attention_bits: int | None = option(
        None, flag="attention_bits", limits=Limits(2, 8), optional=True, needs="act_bits",
        help="bits of q, k and v (default as --act_bit)")  # fmt: skip
    weight_format: str = option(
        INTEGER, flag="weight_format", choices=FORMATS, needs="weight_bits", help="integers, or fp8: e4m3, 8 bits"
    )
    act_format: str = option(INTEGER, flag="act_format", choices=FORMATS, needs="act_bits", help="the same of activations")
    step_window: float | None = option(
        None, flag="step_window", limits=Limits(0.0, 0.5), optional=True, needs="stepwise_activations",
        help="share of the time steps on each side whose ranges that of a step covers too (default 0.1 for transformers, else 0)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        if self.weight_bits is None and self.act_bits is None:
            raise ValueError("weight_bits and act_bits are both None: nothing would be quantized")
        if self.gptq and self.weight_bits is None:
            raise ValueError("gptq rounds weights: weight_bits None is not allowed with it")
        if self.gptq and not self.bias_correction:
            raise ValueError("gptq rounds about the inputs' means, whose errors go into the bias: it needs bias_correction")
        if (self.smoothing_search or self.rank) and self.weight_bits is None:
            part = "{quant.smoothing_search}" if self.smoothing_search else "{quant.rank}"
            raise RecipeError(f"{part} makes weights easier to round: they are in floating point here")
        if self.bit_allocation and (self.act_bits is None or self.act_bits >= WIDEST):
            raise ValueError(
                f"bit_allocation gives some activations more than act_bits {self.act_bits}: allowed with it are 2 to {WIDEST - 1}"
            )
        if self.weight_grid == GGUF and (self.rotation or self.rank):
            raise RecipeError("{quant.weight_grid} gguf: no reader of such files rotates inputs or adds branches")
        if self.weight_grid == GGUF and (self.act_bits is not None or self.weight_bits not in GGUF_BITS):
            raise RecipeError(f"{{quant.weight_grid}} gguf with {self.label}: allowed are W8A32 and W4A32 (--weight_only)")
        if self.weight_grid == GGUF and (self.weight_granularity, self.weight_format) != (CHANNEL, INTEGER):
            other = f"{{quant.weight_granularity}} {self.weight_granularity}, {{quant.weight_format}} {self.weight_format}"
            raise RecipeError(f"{{quant.weight_grid}} gguf has groups of {GGUF_GROUP} integers, not {other}")
        check_numbers(self)

    @property
    def label(self) -> str:
        """W8A8, W4A32, FP8 and so on, with what is not the usual way besides."""
        return label_of(self)


@dataclass(frozen=True)
class CorrectionConfig:
    """Inter noise: runtime noise estimation (QNCD, section 3.3).

    Attributes:
        interval: steps between two estimates; the last estimate is used in between.
        target: what the estimate is compared with: "paper" (the noise of one step, z) or "consistent" (all noise
            that x0-hat says is in the re-noised sample; x0-hat holds the same bias, so most of it cancels).
        statistics: "batch" (one mean for the batch), "sample" (one an image) or "channel" (one an image and channel).
        control: subtract what the full-precision model would report at the same step, from a table made in calibration.
        shrink: shrink each estimate m towards 0, by max(0, 1 - (3 sd/m)^2) with sd the estimator's own spread on the
            full-precision model: an estimate within its own noise corrects nothing.
        correct_variance: take the estimated variance out of the sampler's noise where eta > 0.
    """

    interval: int = option(4, flag="reverse_interval", limits=Limits(1), help="the N of --sample_reverse, as its own flag")
    target: str = option("paper", flag="reverse_target", choices=TARGETS, help="what the estimate is compared with")
    statistics: str = option(
        "sample", flag="reverse_statistics", choices=STATISTICS,
        help="one mean of the estimates: of each image, of the batch, or of each image and channel",
    )  # fmt: skip
    control: bool = option(True)
    shrink: bool = option(True)
    correct_variance: bool = option(True)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration set: `samples` trajectories, seen at `steps` of the sampler's time steps.

    Attributes:
        samples: images (trajectories); the set holds samples * steps inputs.
        steps: time steps, spread evenly over the sampler's.
        batch_size: inputs a forward pass. This and `steps` may be None: not decided yet, see `Recipe.decided`.
        seed: of the trajectories' own seeds.
    """

    samples: int = option(64, flag="cali_n", limits=Limits(1), help="inputs at each calibration time step")
    steps: int = option(
        10, flag="cali_st", limits=Limits(1), optional=True,
        help="calibration time steps, or all of a sampler with fewer (default {default})",
    )  # fmt: skip
    batch_size: int = option(
        32, flag="cali_batch_size", limits=Limits(1), optional=True,
        help="inputs at a time (default {default}; 2 for large inputs)",
    )  # fmt: skip
    seed: int = option(0, flag="cali_seed", limits=Limits(0, 2**35 - 1), help="of the calibration images' own seeds")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Recipe:
    """Everything that is asked for of a quantized network; a part that is off is None.

    Attributes:
        mode: what it started from, a name in MODES; the other fields say what it came to.
        correction: noise correction while sampling; excludes `offline`.
        offline: correction of each prediction by what calibration runs have shown: "ptqd", "d2dpm", "tracking", or another name
            of `qncd.sampling.correctors.registry.CORRECTORS`.
    """

    mode: str = option(
        DEFAULT_MODE, flag="quant_mode", choices=tuple(MODES), group=QUANTIZATION,
        help="method, a mode of the table at the end",
    )  # fmt: skip
    quant: QuantConfig = section(QuantConfig, QUANTIZATION, optional=False)
    smoothing: SmoothingConfig | None = section(
        SmoothingConfig, QUANTIZATION, "scale_split_static", "intra noise: smooth features by the embedding (qncd: of UNets)"
    )
    reconstruction: ReconstructionConfig | None = section(
        ReconstructionConfig, "reconstruction (BRECQ)", "recon",
        "learn the rounding of the weights block by block: minutes to hours",
    )  # fmt: skip
    correction: CorrectionConfig | None = section(CorrectionConfig, "noise correction (inter noise)")
    offline: str | None = option(None, optional=True)  # a name in qncd.sampling.correctors.registry
    calibration: CalibrationConfig = section(CalibrationConfig, "calibration", optional=False)

    def __post_init__(self) -> None:
        check_options(self)
        for name, about in sections_of(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, about.kind) and not (value is None and about.optional):
                raise ValueError(f"{name} {value!r}: expected {about.kind.__name__}")
        if self.reconstruction and self.quant.gptq:
            raise RecipeError(
                f"{{reconstruction}} with GPTQ ({{quant.gptq}}, or {{mode}} {self.mode}): both round the weights, allowed is one"
            )
        if self.reconstruction and self.quant.weight_format == FP8:
            raise RecipeError("{reconstruction} learns to round integers up or down: not with {quant.weight_format} fp8")
        if self.reconstruction and self.quant.weight_bits is None:
            raise RecipeError("{reconstruction} rounds weights: they are in floating point here")
        if self.reconstruction and self.reconstruction.act_iterations and self.quant.act_bits is None:
            raise RecipeError(
                "{reconstruction.act_iterations} learns scales of quantized activations: they are in floating point here"
            )
        if self.reconstruction and self.reconstruction.act_iterations:
            for name, only in (("act_granularity", TENSOR), ("act_format", INTEGER)):
                if (asked := getattr(self.quant, name)) != only:
                    text = f"learns calibrated steps of integers: not with {{quant.{name}}} {asked}"
                    raise RecipeError(f"{{reconstruction.act_iterations}} {text}")
        if self.smoothing and self.quant.weight_grid == GGUF:
            raise RecipeError("{smoothing} divides the inputs of convolutions, which {quant.weight_grid} gguf leaves as they are")
        if self.quant.step_weights and not self.reconstruction and (self.quant.gptq or not self.quant.bias_correction):
            parts = "{reconstruction}, or {quant.bias_correction} without GPTQ"
            raise RecipeError(f"{{quant.step_weights}} weighs the inputs of reconstruction and bias correction: it needs {parts}")
        if self.offline and self.correction:
            raise ValueError(f"correction and offline {self.offline}: each prediction is corrected once, allowed is one")

    @classmethod
    def of(cls: type[R], mode: str = DEFAULT_MODE, width: str = "W8A8", **changes: Any) -> R:
        """A mode at a width, with changes.

        Args:
            mode: a name in MODES.
            width: such as W4A8 or FP8; W4A16, W4A32 and W4 leave activations in floating point.
            changes: options by name (`gptq=True`, `interval=5`, `samples=64`), and `smoothing`, `reconstruction`,
                `correction` and `tracking`: True or False, the first three also with a dict of their options.

        Raises:
            ValueError: an option is unknown, out of range, contradicts another one, or has no effect.
        """
        given = changes_of(cls, changes)
        recipe: R = compose(cls, mode, {**parse_width(width), **given}, given)
        return recipe

    @property
    def label(self) -> str:
        """W4A8 qncd and so on."""
        return f"{self.quant.label} {self.mode}"

    @property
    def controlled(self) -> CorrectionConfig | None:
        """The correction, if it needs the full-precision model's noise table."""
        return self.correction if self.correction and (self.correction.control or self.correction.shrink) else None

    def decided(self: R, batch_size: int, sampler_steps: int = CalibrationConfig.steps) -> R:
        """The same with what of `calibration` nobody has asked for.

        Args:
            batch_size: inputs a forward pass.
            sampler_steps: of the sampler, which may have fewer than calibration looks at by default.
        """
        steps = self.calibration.steps or min(CalibrationConfig.steps, sampler_steps)
        return self.with_calibration(batch_size=self.calibration.batch_size or batch_size, steps=steps)

    @property
    def by_batch(self) -> bool:
        """Whether an image depends on the others of its batch: the correction takes its statistics over all of them."""
        return self.correction is not None and self.correction.statistics == "batch"

    def with_calibration(self: R, **changes: Any) -> R:
        """The same with other options of the calibration set."""
        return dataclasses.replace(self, calibration=dataclasses.replace(self.calibration, **changes))

    def without(self: R, part: str) -> R:
        """The same without "bit_allocation", "step_weights", "correction" (runtime) or "offline" correction."""
        if part in ("bit_allocation", "step_weights"):
            quant: dict[str, Any] = {part: False}
            return dataclasses.replace(self, quant=dataclasses.replace(self.quant, **quant))
        nothing: dict[str, Any] = {part: None}
        return dataclasses.replace(self, **nothing)

    def settings(self) -> dict[str, Any]:
        """What of it decides what an image looks like, for run.json."""
        content = self.to_json()
        running = "running" in (self.quant.act_range, self.quant.softmax_range)  # other ranges are those of any batch size
        return {
            "quantization": {"mode": content.pop("mode"), **content.pop("quant")},
            "offline_correction": content.pop("offline"),
            **content,
            "calibration": content["calibration"] | ({} if running else {"batch_size": None}),
        }

    def to_json(self) -> dict[str, Any]:
        """A nested dict of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[R], data: Mapping[str, Any]) -> R:
        """The recipe that `to_json` wrote; options younger than that have their defaults, unknown ones are refused."""
        recipe: R = read_tree(cls, data)
        return recipe

    @classmethod
    def from_yaml(cls: type[R], path: Path) -> R:
        """A recipe in a file: mode, width and options as in `of`, or all that `to_json` writes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming the file, as `of`.
        """
        content = read_options(path)
        try:
            given = changes_of(cls, content)
            whole = {*options_of(cls), *sections_of(cls)} <= content.keys()
            recipe: R = compose(cls, given.get("mode", cls.mode), given, () if whole else given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return recipe
