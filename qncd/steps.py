"""Which steps a sampler takes."""

from __future__ import annotations

from dataclasses import dataclass

from qncd.options import Limits, OptionError, check_options, option

SAMPLE_TYPES = ("generalized", "ddpm_noisy", "dpm_solver", "plms")
DETERMINISTIC = ("dpm_solver", "plms")
SKIP_TYPES = ("uniform", "quad")
CONVENTIONS = ("ddim", "ldm")


@dataclass(frozen=True)
class SamplerConfig:
    """Which steps a sampler takes.

    Attributes:
        sample_type: "generalized" (DDIM at any eta), "ddpm_noisy", "dpm_solver" (DPM-Solver++ 2M) or "plms".
        skip_type: spacing of the time steps, "uniform" or "quad".
        timesteps: number of steps.
        eta: 0 is deterministic DDIM, 1 is DDPM-like (DDIM, arXiv 2010.02502, eq. 16).
        convention: whose time steps. "ddim" (ermongroup/ddim): 0, k, 2k, ..., and the last step ends at the clean image.
            "ldm" (CompVis latent-diffusion and Stable Diffusion): one later each, and the last step ends at time step 0.
    """

    sample_type: str = option("generalized", choices=SAMPLE_TYPES)
    skip_type: str = option("uniform", choices=SKIP_TYPES)
    timesteps: int = option(100, limits=Limits(1))
    eta: float = option(0.0, limits=Limits(0, 1))
    convention: str = option("ddim", choices=CONVENTIONS)

    def __post_init__(self) -> None:
        check_options(self)
        if self.eta and self.sample_type in DETERMINISTIC:
            raise OptionError("eta", f"eta {self.eta!r} with sample_type {self.sample_type}: allowed is 0 (it is deterministic)")
