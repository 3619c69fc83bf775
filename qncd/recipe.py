"""Every setting of quantization, smoothing, correction and sampling, checked where it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WEIGHT_RANGES = ("mse", "max")
ACT_RANGES = ("mse", "max", "running")
TARGETS = ("consistent", "paper")
STATISTICS = ("sample", "batch", "channel")
SAMPLE_TYPES = ("generalized", "ddpm_noisy", "dpm_solver", "plms")
DETERMINISTIC = ("dpm_solver", "plms")
SKIP_TYPES = ("uniform", "quad")
CONVENTIONS = ("ddim", "ldm")
CACHES = ("fp16", "bf16", "fp32")
WIDEST = 8  # bits of an activation: what integer kernels take
TRACKING = "tracking"  # the offline correction of qncd.sampling.correctors.tracking


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError naming the value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: allowed are {', '.join(map(str, allowed))}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ValueError(f"{name} {value!r}: allowed are whole numbers, {bound}")


@dataclass(frozen=True)
class QuantConfig:
    """How weights and activations are quantized (uniform affine, section 3.1 of Q-Diffusion, arXiv 2302.04304).

    Attributes:
        weight_bits: 2 to 8, or None to leave weights in floating point. Symmetric, one scale an output channel,
            codes in [-2^(b-1), 2^(b-1)-1].
        act_bits: 2 to 8, or None. One scale a tensor (two where a skip concatenation is split), codes in [0, 2^b-1]
            with a zero point, or [-2^(b-1), 2^(b-1)-1] without one where `act_symmetric`.
        softmax_bits: 2 to 16: attention probabilities, never a zero point. Used where `act_bits` is not None.
        edge_bits: weights and activations of the first and the last layer; None: as everywhere.
        weight_range: "mse" (the clip ratio that minimises the L2.4 error) or "max".
        act_range: "max", "mse" (as for weights, over the histogram of the whole calibration set), or "running"
            (exponential moving average of batch extremes, momentum 0.95). Clipping shrinks the noise prediction a
            little at every step, and a sampler adds that up: "max" gave the better images at 8 bits, "mse" at 6 and 4.
        split: quantize the two halves of a skip concatenation apart (Q-Diffusion's shortcut split).
        softmax_range: the same for the softmax output alone; None: as `act_range`.
        quantize_attention: quantize q, k, v and the softmax output as well.
        stepwise_embedding: the inputs of those layers have a range for each time step that the sampler visits (TFMQ-DM,
            arXiv 2311.16503).
        quantize_embedding: quantize the time embedding's layers and the blocks' projections of it as well.
        stepwise_activations: every activation has a range for each time step that the sampler visits.
        gptq: round each layer's weights in sequence, every error made up for by the weights not yet rounded (GPTQ, arXiv
            2210.17323), towards what the layer gives on inputs that are not rounded (GPTAQ, arXiv 2504.02692).
        smoothing_search: with `gptq`, divide each layer's input channels by powers of their spread and multiply the weights by
            them (SmoothQuant, arXiv 2211.10438); the power that leaves the layer's output the least error is kept. Acts
            where `act_bits` is not None.
        bit_allocation: activations have widths of their own, up to 8 bits, `act_bits` in the mean over all multiplications:
            those that leave the sample the least error (bit_allocation). Not the first and the last layer's nor the
            softmax output's, which `edge_bits` and `softmax_bits` say. Needs `act_bits` of 7 or fewer.
        bias_correction: take the mean error that rounding leaves in each layer's output out of its bias (Nagel et
            al. 2019, arXiv 1906.04721, section 4.2; measured on calibration data). Not part of the QNCD paper.
    """

    weight_bits: int | None = 8
    act_bits: int | None = 8
    softmax_bits: int = 8
    edge_bits: int | None = 8
    weight_range: str = "mse"
    act_range: str = "max"
    act_symmetric: bool = False
    split: bool = True
    softmax_range: str | None = None
    quantize_attention: bool = True
    quantize_embedding: bool = True
    stepwise_embedding: bool = False
    stepwise_activations: bool = False
    gptq: bool = False
    smoothing_search: bool = False
    bit_allocation: bool = False
    bias_correction: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 2, 8)
        check_int("softmax_bits", self.softmax_bits, 2, 16)
        if self.edge_bits is not None:
            check_int("edge_bits", self.edge_bits, 2, 8)
        check_choice("weight_range", self.weight_range, WEIGHT_RANGES)
        check_choice("act_range", self.act_range, ACT_RANGES)
        if self.softmax_range is not None:
            check_choice("softmax_range", self.softmax_range, ACT_RANGES)
        if self.weight_bits is None and self.act_bits is None:
            raise ValueError("weight_bits and act_bits are both None: nothing would be quantized")
        if self.gptq and self.weight_bits is None:
            raise ValueError("gptq rounds weights: weight_bits None is not allowed with it")
        if self.gptq and not self.bias_correction:
            raise ValueError("gptq rounds about the inputs' means, whose errors go into the bias: it needs bias_correction")
        if self.smoothing_search and not self.gptq:
            raise ValueError("smoothing_search compares the errors that gptq leaves: it needs gptq")
        if self.bit_allocation and (self.act_bits is None or self.act_bits >= WIDEST):
            raise ValueError(
                f"bit_allocation gives some activations more than act_bits {self.act_bits}: allowed with it are 2 to {WIDEST - 1}"
            )

    @property
    def label(self) -> str:
        """W8A8, W4A32 and so on."""
        return f"W{self.weight_bits or 32}A{self.act_bits or 32}"


@dataclass(frozen=True)
class ReconstructionConfig:
    """BRECQ: rounding of the weights learned block by block (arXiv 2102.05426; AdaRound, arXiv 2004.10568).

    Attributes:
        iterations: optimizer steps of each block.
        batch_size: inputs a step.
        lr: of Adam on the rounding variables.
        inputs: calibration inputs used, evenly spread over the set; None for all.
        memory_gb: cached activations of a block above this go to a file; of each process where there are several.
        cache: how they are kept, "fp16", "bf16" (8 bits of precision, any size) or "fp32".
        seed: of the order in which inputs are drawn.
        act_iterations: optimizer steps of each block's activation scales, after all weights and ranges (LSQ, arXiv
            1902.08153, as the second phase of BRECQ and Q-Diffusion); 0 leaves the scales as calibrated.
        act_lr: of Adam on the logarithms of the scales; falls to 0 over the steps as a cosine. 0.01 is the best of 0.001 to
            0.03 on blocks of the latent model in the box.
    """

    iterations: int = 2000
    batch_size: int = 32
    lr: float = 1e-2
    inputs: int | None = 512
    memory_gb: float = 4.0
    cache: str = "fp16"
    seed: int = 0
    act_iterations: int = 0
    act_lr: float = 1e-2

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, 1)
        check_int("act_iterations", self.act_iterations, 0)
        check_choice("cache", self.cache, CACHES)
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0)
        if self.inputs is not None:
            check_int("inputs", self.inputs, 1)
        for name in ("lr", "act_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)!r}: allowed are numbers above 0")
        if not self.memory_gb >= 0:
            raise ValueError(f"memory_gb {self.memory_gb!r}: allowed are numbers from 0 on")


@dataclass(frozen=True)
class SmoothingConfig:
    """Intra noise: embedding-derived feature smoothing (QNCD, arXiv 2403.19140, section 3.2).

    Attributes:
        floor: smallest factor; 1 only ever shrinks channels, as in the paper.
    """

    floor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor {self.floor!r}: allowed are numbers above 0, up to 1")


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

    interval: int = 4
    target: str = "paper"
    statistics: str = "sample"
    control: bool = True
    shrink: bool = True
    correct_variance: bool = True

    def __post_init__(self) -> None:
        check_int("interval", self.interval, 1)
        check_choice("target", self.target, TARGETS)
        check_choice("statistics", self.statistics, STATISTICS)


@dataclass(frozen=True)
class SamplerConfig:
    """Which steps a sampler takes.

    Attributes:
        sample_type: "generalized" (DDIM at any eta), "ddpm_noisy", "dpm_solver" (DPM-Solver++ 2M) or "plms".
        timesteps: number of steps.
        eta: 0 is deterministic DDIM, 1 is DDPM-like (DDIM, arXiv 2010.02502, eq. 16).
        convention: whose time steps. "ddim" (ermongroup/ddim): 0, k, 2k, ..., and the last step ends at the clean image.
            "ldm" (CompVis latent-diffusion and Stable Diffusion): one later each, and the last step ends at time step 0.
    """

    sample_type: str = "generalized"
    skip_type: str = "uniform"
    timesteps: int = 100
    eta: float = 0.0
    convention: str = "ddim"

    def __post_init__(self) -> None:
        check_choice("sample_type", self.sample_type, SAMPLE_TYPES)
        check_choice("skip_type", self.skip_type, SKIP_TYPES)
        check_choice("convention", self.convention, CONVENTIONS)
        check_int("timesteps", self.timesteps, 1)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta!r}: allowed are numbers from 0 to 1")
        if self.eta and self.sample_type in DETERMINISTIC:
            raise ValueError(f"eta {self.eta!r} with sample_type {self.sample_type}: allowed is 0 (it is deterministic)")


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration set: `samples` trajectories, seen at `steps` of the sampler's time steps.

    Attributes:
        samples: images (trajectories); the set holds samples * steps inputs.
        steps: time steps, spread evenly over the sampler's.
        batch_size: inputs a forward pass.
    """

    samples: int = 64
    steps: int = 10
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "batch_size"):
            check_int(name, getattr(self, name), 1)
        check_int("seed", self.seed, 0)


@dataclass(frozen=True)
class Recipe:
    mode: str = "qncd"
    quant: QuantConfig = QuantConfig()
    smoothing: SmoothingConfig | None = None
    reconstruction: ReconstructionConfig | None = None
    correction: CorrectionConfig | None = None
    offline: str | None = None
    calibration: CalibrationConfig = CalibrationConfig()

    def __post_init__(self) -> None:
        if self.reconstruction is not None and self.quant.gptq:
            raise ValueError("gptq and reconstruction both round the weights: one of them")
        if self.reconstruction is not None and self.reconstruction.act_iterations and self.quant.act_bits is None:
            raise ValueError("act_iterations above 0 with act_bits None: there are no activation scales to learn")

    @property
    def controlled(self) -> CorrectionConfig | None:
        return self.correction if self.correction and (self.correction.control or self.correction.shrink) else None
