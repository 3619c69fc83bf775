"""The whole of QNCD's calibration: sample, record the control, smooth, observe, round."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qncd.distributed import Processes
from qncd.ptq.calibration import (
    CalibrationCollector,
    CalibrationSet,
    Progress,
    WeightCorrection,
    calibrate_,
    call_unet,
    correct_biases_,
)
from qncd.ptq.stages.activation_steps import learn_steps_
from qncd.ptq.stages.bit_allocation import allocate_bits_
from qncd.ptq.stages.compensation import compensate_
from qncd.ptq.stages.reconstruction import BlockProgress, reconstruct_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.ptq.stages.smoothing_search import search_smoothing_
from qncd.ptq.stages.temporal import reconstruct_temporal_, set_all_stepwise_, set_stepwise_ranges_, temporal_layers
from qncd.quant.convert import UNet, quantize_
from qncd.quant.layers import QuantLayer
from qncd.recipe import (
    TRACKING,
    CalibrationConfig,
    CorrectionConfig,
    QuantConfig,
    ReconstructionConfig,
    SamplerConfig,
    SmoothingConfig,
    check_choice,
)
from qncd.sampling.corrector import Corrector, Denoiser
from qncd.sampling.correctors.offline_noise import OfflineRecorder, OfflineStatistics
from qncd.sampling.correctors.registry import OfflineRecord
from qncd.sampling.correctors.runtime import NoiseRecorder, NoiseTable
from qncd.sampling.correctors.tracking import TrackingFilters, TrackingFitter
from qncd.sampling.guidance import Conditions, guide
from qncd.sampling.samplers import Callback, StepState, sample
from qncd.sampling.schedule import Step, alphas_cumprod, make_steps

# Seeds of calibration images: far from those that users number their images with.
CALIBRATION_SEED_BASE = 1 << 40
TRACKING_SEED_BASE = 1 << 41  # and from calibration's: what a network was fitted to says less about its errors
TRACKED = 64  # trajectories that filters are fitted to, where twice the calibration set's are as many


@dataclass(frozen=True)
class Diffusion:
    """A network with its schedule and sampler: everything that makes images from seeds.

    Attributes:
        unet: full-precision or quantized.
        betas: (T,) float64.
        config: of the sampler.
        shape: (C, H, W) of one sample.
        lane: images in every network call, exactly (twice as many inputs with guidance). Kernels chosen for another
            batch size round otherwise, and a quantizer turns the last bit into a whole step: with lanes of one size an
            image depends on its seed and its condition alone.
        precision: "full", or "autocast": torch's mixed precision, float16 on a GPU and bfloat16 on a CPU.
    """

    unet: UNet
    betas: np.ndarray
    config: SamplerConfig
    shape: tuple[int, int, int]
    lane: int = 16
    precision: str = "full"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("full", "autocast"))

    @property
    def steps(self) -> list[Step]:
        """The steps that the sampler takes."""
        return make_steps(self.config, alphas_cumprod(self.betas))

    def denoiser(self, conditions: Conditions | None = None) -> Denoiser:
        """The network as the samplers call it: any number of images, in lanes of one size, the last one filled up.

        Args:
            conditions: one for each of the images that the denoiser will get, or for the first of them.
        """
        cond = uncond = None
        if conditions is not None:
            cond = conditions.cond.to(self.unet.device)
            if conditions.uncond is not None and conditions.guided:
                uncond = conditions.uncond.to(cond).expand(self.lane, *cond.shape[1:])

        def predict(x: Tensor, times: Tensor, context: Tensor | None) -> Tensor:
            if context is None or uncond is None or conditions is None:
                return call_unet(self.unet, x, times, context)
            both = call_unet(self.unet, torch.cat([x, x]), torch.cat([times, times]), torch.cat([uncond, context]))
            half_uncond, half_cond = both.chunk(2)
            return guide(half_uncond, half_cond, conditions.scale)

        def denoise(x: Tensor, t: int) -> Tensor:
            with torch.autocast(x.device.type, enabled=self.precision == "autocast"):
                return in_lanes(x, t).float()

        def in_lanes(x: Tensor, t: int) -> Tensor:
            filler = -len(x) % self.lane
            padded, context = fill_up(x, filler), None if cond is None else fill_up(cond[: len(x)], filler)
            times = torch.full((self.lane,), t, device=x.device)
            lanes = [slice(start, start + self.lane) for start in range(0, len(padded), self.lane)]
            parts = [predict(padded[lane], times, None if context is None else context[lane]) for lane in lanes]
            return torch.cat(parts)[: len(x)]

        return denoise

    def sample(
        self,
        seeds: Sequence[int],
        corrector: Corrector | None = None,
        callback: Callback | None = None,
        wrap: Callable[[Denoiser], Denoiser] | None = None,
        conditions: Conditions | None = None,
        gradients: bool = False,
    ) -> Tensor:
        """Samples (N, C, H, W) for `seeds` and as many `conditions`; `wrap` may count or time the network's calls.

        With `gradients`, the samples can be back-propagated through all steps.

        Raises:
            ValueError: as many seeds as conditions are needed; a network with cross-attention needs conditions.
        """
        if conditions is not None and len(conditions) != len(seeds):
            raise ValueError(f"{len(conditions)} conditions for {len(seeds)} seeds")
        denoise = self.denoiser(conditions)
        denoise = wrap(denoise) if wrap else denoise
        with torch.set_grad_enabled(gradients):
            return sample(
                self.config, denoise, self.shape, seeds, self.steps, list(self.betas), self.unet.device, corrector, callback
            )


def fill_up(x: Tensor, count: int) -> Tensor:
    """`x` (N, ...) with its last row repeated `count` times more."""
    return torch.cat([x, x[-1:].expand(count, *x.shape[1:])]) if count else x


def sample_calibration(
    diffusion: Diffusion,
    config: CalibrationConfig,
    correction: CorrectionConfig | None,
    model_hash: str | None = None,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
) -> tuple[CalibrationSet, NoiseTable | None]:
    """One full-precision run: the calibration set along its trajectories, and the control table beside it.

    Args:
        diffusion: with the full-precision network.
        conditions: one for each of the `config.samples` trajectories.
        correction: record the noise table of this estimator, or None.
        progress: called with (images done, images in all).
    """
    collector = CalibrationCollector(len(diffusion.steps), config.steps)
    recorder = NoiseRecorder(correction, config.samples) if correction else None
    _run(diffusion, config, recorder, collector, progress, conditions)
    cond = conditions.cond.cpu() if conditions else None
    uncond = conditions.uncond.cpu() if conditions and conditions.uncond is not None and conditions.guided else None
    return collector.result(cond, uncond, model_hash), recorder.table() if recorder else None


def record_noise_table(
    diffusion: Diffusion,
    config: CalibrationConfig,
    correction: CorrectionConfig,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
) -> NoiseTable:
    """The control table alone, for a calibration set or a quantized checkpoint that came without a fitting one."""
    recorder = NoiseRecorder(correction, config.samples)
    _run(diffusion, config, recorder, None, progress, conditions)
    return recorder.table()


def _run(
    diffusion: Diffusion,
    config: CalibrationConfig,
    recorder: NoiseRecorder | None,
    callback: Callback | None,
    progress: Progress | None,
    conditions: Conditions | None,
    begin: Callable[[Conditions | None], None] | None = None,
    base: int = CALIBRATION_SEED_BASE,
) -> None:
    if conditions is not None and len(conditions) != config.samples:
        raise ValueError(f"{len(conditions)} conditions for {config.samples} calibration trajectories")
    # Whole lanes: a trajectory does not depend on its batch, and a lane that is not full costs as much as one that is.
    size = max(1, config.batch_size // diffusion.lane) * diffusion.lane
    for start in range(0, config.samples, size):
        count = min(size, config.samples - start)
        first = base + (config.seed << 20) + start
        part = conditions[start : start + count] if conditions else None
        if begin:
            begin(part)
        diffusion.sample(range(first, first + count), recorder, callback, conditions=part)
        if progress:
            progress(start + count, config.samples)


def record_offline(
    kind: str,
    reference: Diffusion,
    quantized: Diffusion,
    config: CalibrationConfig,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
) -> OfflineRecord:
    """What an offline correction needs to know, by runs of both models.

    Args:
        kind: of `qncd.sampling.correctors.registry.KINDS`.
        reference: the full-precision model.
        quantized: the same with the quantized network.
        conditions: one for each of the `config.samples` calibration trajectories.
    """
    record = fit_tracking if kind == TRACKING else record_statistics
    return record(reference, quantized, config, progress, conditions)


def record_statistics(
    reference: Diffusion,
    quantized: Diffusion,
    config: CalibrationConfig,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
) -> OfflineStatistics:
    """What quantization did to the noise prediction, at every step of the full-precision model's trajectories."""
    recorder = OfflineRecorder()

    def attach(part: Conditions | None) -> None:
        recorder.quantized = quantized.denoiser(part)

    _run(reference, config, None, recorder, progress, conditions, attach)
    return recorder.statistics()


def fit_tracking(
    reference: Diffusion,
    quantized: Diffusion,
    config: CalibrationConfig,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
) -> TrackingFilters:
    """Filters that lead the quantized model's runs back to the full-precision ones', by runs of both from the same seeds.

    Takes as many trajectories as calibration, twice as many where it has fewer than TRACKED, and holds all their steps:
    trajectories * steps * C * H * W floats.

    Args:
        conditions: one for each of the `config.samples` calibration trajectories.
    """
    samples = max(config.samples, min(2 * config.samples, TRACKED))
    given = conditions[[row % config.samples for row in range(samples)]] if conditions else None
    trajectory: list[list[Tensor]] = [[] for _ in quantized.steps]  # parts of the batch by step

    def keep(state: StepState) -> None:
        trajectory[state.step.index].append(state.x_prev.cpu())

    half = (lambda done, total: progress(done, 2 * total)) if progress else None
    tracked = dataclasses.replace(config, samples=samples)
    _run(reference, tracked, None, keep, half, given, base=TRACKING_SEED_BASE)
    fitter = TrackingFitter([torch.cat(parts) for parts in trajectory])
    first = TRACKING_SEED_BASE + (config.seed << 20)
    quantized.sample(range(first, first + samples), fitter, conditions=given)
    if progress:
        progress(2 * samples, 2 * samples)
    return fitter.filters()


def weight_correction(config: QuantConfig) -> WeightCorrection | None:
    """What `calibrate_` does about rounding errors under a configuration."""
    return compensate_ if config.gptq else correct_biases_ if config.bias_correction else None


def set_stepwise_(diffusion: Diffusion, config: QuantConfig) -> None:
    """Give activations a range for each of the sampler's time steps, those that the configuration says, in place."""
    times = [s.t for s in diffusion.steps]
    if config.act_bits is not None and config.stepwise_activations:
        set_all_stepwise_(diffusion.unet, times)
    elif config.act_bits is not None and config.stepwise_embedding:
        set_stepwise_ranges_(diffusion.unet, times)


def quantize_with_(
    diffusion: Diffusion,
    config: QuantConfig,
    data: CalibrationSet,
    smoothing: SmoothingConfig | None,
    batch_size: int = 32,
    progress: Progress | None = None,
    reconstruction: ReconstructionConfig | None = None,
    block_progress: BlockProgress | None = None,
    folder: Path | None = None,
    step_progress: BlockProgress | None = None,
    processes: Processes | None = None,
    conditions: Conditions | None = None,
    width_progress: Progress | None = None,
) -> float:
    """Prepare, smooth, reconstruct and calibrate the network in place. Returns the seconds that it took.

    Args:
        smoothing: None for none; else from the time steps that this sampler visits.
        reconstruction: of the weights' rounding, or None for rounding to nearest.
        block_progress: called with (blocks done, blocks in all, seconds left) while reconstructing.
        folder: for reconstructed blocks, so that a run that was cut off goes on.
        step_progress: as `block_progress`, while activation scales are learned.
        processes: who shares the reconstruction, all with the same arguments; alone by default.
        conditions: of calibration trajectories; bit allocation samples with them.
        width_progress: called with (runs done, runs in all) while bits are allocated.
    """
    start = time.perf_counter()
    learns_steps = reconstruction is not None and reconstruction.act_iterations > 0
    if reconstruction is not None and config.gptq:
        raise ValueError("gptq and reconstruction both round the weights: one of them")
    if learns_steps and config.act_bits is None:
        raise ValueError("act_iterations above 0 with act_bits None: there are no activation scales to learn")
    data.check_model(diffusion.unet)
    factors = smoothing_factors(diffusion.unet, [s.t for s in diffusion.steps], smoothing) if smoothing else {}
    quantize_(diffusion.unet, config)
    smooth_(diffusion.unet, factors)
    set_stepwise_(diffusion, config)
    if config.smoothing_search and config.act_bits is not None:
        search_smoothing_(diffusion.unet, data, batch_size)
    if config.bit_allocation:
        allocate_bits_(diffusion, config, data, conditions, batch_size, width_progress)
    reference = copy.deepcopy(diffusion.unet) if reconstruction is not None else None
    if reconstruction is not None and reference is not None and config.weight_bits is not None:
        rounded = list[QuantLayer]()
        if config.stepwise_embedding:
            reconstruct_temporal_(diffusion.unet, reference, [s.t for s in diffusion.steps], reconstruction)
            rounded = list(temporal_layers(diffusion.unet).values())
        reconstruct_(diffusion.unet, reference, data, reconstruction, block_progress, folder, rounded, processes)
    calibrate_(diffusion.unet, data, batch_size, progress, weight_correction(config))
    if reconstruction is not None and reference is not None and learns_steps:
        learn_steps_(diffusion.unet, reference, data, reconstruction, step_progress, folder, processes)
    return time.perf_counter() - start
