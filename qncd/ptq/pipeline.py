"""The whole of QNCD's calibration: sample, record the control, smooth, observe, round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qncd.config import CalibrationConfig, CorrectionConfig, QuantConfig, SamplerConfig, SmoothingConfig
from qncd.ptq.calibration import CalibrationCollector, CalibrationSet, Progress, calibrate_, call_unet
from qncd.ptq.smoothing import smooth_, smoothing_factors
from qncd.quant.convert import UNet, quantize_
from qncd.sampling.correctors import Corrector, Denoiser
from qncd.sampling.runtime_noise import NoiseRecorder, NoiseTable
from qncd.sampling.samplers import Callback, sample
from qncd.sampling.schedule import Step, alphas_cumprod, make_steps

# Seeds of calibration images: far from those that users number their images with.
CALIBRATION_SEED_BASE = 1 << 40


@dataclass(frozen=True)
class Diffusion:
    """A network with its schedule and sampler: everything that makes images from seeds.

    Attributes:
        unet: full-precision or quantized.
        betas: (T,) float64.
        config: of the sampler.
        shape: (C, H, W) of one sample.
        lane: inputs in every network call, exactly. Kernels chosen for another batch size round otherwise, and a
            quantizer turns the last bit into a whole step: with lanes of one size an image depends on its seed alone.
    """

    unet: UNet
    betas: np.ndarray
    config: SamplerConfig
    shape: tuple[int, int, int]
    lane: int = 16

    @property
    def steps(self) -> list[Step]:
        """The steps that the sampler takes."""
        return make_steps(self.config, alphas_cumprod(self.betas))

    def denoiser(self, cond: Tensor | None = None) -> Denoiser:
        """The network as the samplers call it: any number of inputs, in lanes of one size, the last one filled up."""

        def denoise(x: Tensor, t: int) -> Tensor:
            filler = -len(x) % self.lane
            padded, context = _fill(x, filler), None if cond is None else _fill(cond, filler)
            times = torch.full((self.lane,), t, device=x.device)
            parts = []
            for start in range(0, len(padded), self.lane):
                lane = slice(start, start + self.lane)
                parts.append(call_unet(self.unet, padded[lane], times, None if context is None else context[lane]))
            return torch.cat(parts)[: len(x)]

        return denoise

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        corrector: Corrector | None = None,
        callback: Callback | None = None,
        wrap: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Tensor:
        """Samples (N, C, H, W) for `seeds`; `wrap` may count or time the network's calls."""
        denoise = wrap(self.denoiser()) if wrap else self.denoiser()
        return sample(
            self.config, denoise, self.shape, seeds, self.steps, list(self.betas), self.unet.device, corrector, callback
        )


def _fill(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(count, *x.shape[1:])]) if count else x


def sample_calibration(
    diffusion: Diffusion,
    config: CalibrationConfig,
    correction: CorrectionConfig | None,
    model_hash: str | None = None,
    progress: Progress | None = None,
) -> tuple[CalibrationSet, NoiseTable | None]:
    """One full-precision run: the calibration set along its trajectories, and the control table beside it.

    Args:
        diffusion: with the full-precision network.
        correction: record the noise table of this estimator, or None.
        progress: called with (images done, images in all).
    """
    collector = CalibrationCollector(len(diffusion.steps), config.steps)
    recorder = NoiseRecorder(correction, config.samples) if correction else None
    _run(diffusion, config, recorder, collector, progress)
    return collector.result(model_hash=model_hash), recorder.table() if recorder else None


def record_noise_table(
    diffusion: Diffusion, config: CalibrationConfig, correction: CorrectionConfig, progress: Progress | None = None
) -> NoiseTable:
    """The control table alone, for a calibration set or a quantized checkpoint that came without a fitting one."""
    recorder = NoiseRecorder(correction, config.samples)
    _run(diffusion, config, recorder, None, progress)
    return recorder.table()


def _run(
    diffusion: Diffusion,
    config: CalibrationConfig,
    recorder: NoiseRecorder | None,
    collector: CalibrationCollector | None,
    progress: Progress | None,
) -> None:
    for start in range(0, config.samples, config.batch_size):
        count = min(config.batch_size, config.samples - start)
        first = CALIBRATION_SEED_BASE + (config.seed << 20) + start
        diffusion.sample(range(first, first + count), recorder, collector)
        if progress:
            progress(start + count, config.samples)


def quantize_with_(
    diffusion: Diffusion,
    config: QuantConfig,
    data: CalibrationSet,
    smoothing: SmoothingConfig | None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> float:
    """Prepare, smooth and calibrate the network in place. Returns the seconds that calibration took.

    Args:
        smoothing: None for none; else from the time steps that this sampler visits.
    """
    data.check_model(diffusion.unet)
    factors = smoothing_factors(diffusion.unet, [s.t for s in diffusion.steps], smoothing) if smoothing else {}
    quantize_(diffusion.unet, config)
    smooth_(diffusion.unet, factors)
    return calibrate_(diffusion.unet, data, batch_size, progress, config.bias_correction)
