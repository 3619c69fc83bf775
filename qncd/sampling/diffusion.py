"""A network with its process and sampler: everything that makes images from seeds, in calls of one batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qncd.models.network import Network
from qncd.recipe import SamplerConfig, check_choice
from qncd.sampling.corrector import Corrector, Denoiser
from qncd.sampling.guidance import Conditions, guide
from qncd.sampling.process import Process, noise_of
from qncd.sampling.samplers import Callback, sample
from qncd.sampling.schedule import Step, make_steps


@dataclass(frozen=True)
class Diffusion:
    """A network with its process and sampler.

    Attributes:
        network: full-precision or quantized.
        process: that it was trained on.
        config: of the sampler.
        shape: of one sample, (C, H, W) of images.
        lane: images in every network call, exactly (twice as many inputs with guidance). Kernels chosen for another
            batch size round otherwise, and a quantizer turns the last bit into a whole step: with lanes of one size an
            image depends on its seed and its condition alone.
        precision: "full", or "autocast": torch's mixed precision, float16 on a GPU and bfloat16 on a CPU.
    """

    network: Network
    process: Process
    config: SamplerConfig
    shape: tuple[int, ...]
    lane: int = 16
    precision: str = "full"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("full", "autocast"))

    @property
    def steps(self) -> list[Step]:
        """The steps that the sampler takes."""
        return make_steps(self.config, self.process)

    @property
    def times(self) -> list[float]:
        """The time steps that it visits, the noisiest first."""
        return [step.t for step in self.steps]

    @property
    def step_count(self) -> int:
        """How many steps that are."""
        return len(self.steps)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the images beside the weights and the seeds, as JSON."""
        return dataclasses.asdict(self.config)

    def with_network(self, network: Network) -> Diffusion:
        """The same with another network."""
        return dataclasses.replace(self, network=network)

    def denoiser(self, conditions: Conditions | None = None) -> Denoiser:
        """The network as the samplers call it: any number of images, in lanes of one size, the last one filled up.

        Whatever the network predicts is turned into noise.

        Args:
            conditions: one for each of the images that the denoiser will get, or for the first of them.
        """
        network, lane = self.network, self.lane
        given = None if conditions is None else conditions.to(network.device, network.dtype)

        def predict(x: Tensor, times: Tensor, part: Conditions | None) -> Tensor:
            if part is None:
                return network.predict(x, times)
            if not part.guided or part.uncond is None:
                return network.predict(x, times, part.inputs, **part.constants)
            both = {
                name: torch.cat([part.uncond[name].to(value).expand(lane, *value.shape[1:]), value])
                for name, value in part.inputs.items()
            }
            halves = network.predict(torch.cat([x, x]), torch.cat([times, times]), both, **part.constants)
            half_uncond, half_cond = halves.chunk(2)
            return guide(half_uncond, half_cond, part.scale)

        def denoise(x: Tensor, t: float) -> Tensor:
            with torch.autocast(x.device.type, enabled=self.precision == "autocast"):
                output = in_lanes(x, t).float()
            return output if network.prediction == "epsilon" else noise_of(network.prediction, output, x, *self.process.at(t))

        def in_lanes(x: Tensor, t: float) -> Tensor:
            x = x.to(network.dtype)
            filler = -len(x) % lane
            padded, all_of = fill_up(x, filler), None if given is None else _filled(given[: len(x)], filler)
            times = torch.full((lane,), network.time_at(t), device=x.device)
            lanes = [slice(start, start + lane) for start in range(0, len(padded), lane)]
            parts = [predict(padded[rows], times, None if all_of is None else all_of[rows]) for rows in lanes]
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
            return sample(self.config, self.process, denoise, self.shape, seeds, self.network.device, corrector, callback)


def fill_up(x: Tensor, count: int) -> Tensor:
    """`x` (N, ...) with its last row repeated `count` times more."""
    return torch.cat([x, x[-1:].expand(count, *x.shape[1:])]) if count else x


def _filled(conditions: Conditions, count: int) -> Conditions:
    """The conditions with the last one repeated `count` times more."""
    uncond = conditions.uncond
    inputs = {name: fill_up(value, count) for name, value in conditions.inputs.items()}
    if uncond is not None:
        uncond = {name: value if len(value) == 1 else fill_up(value, count) for name, value in uncond.items()}
    return Conditions(inputs, uncond, conditions.scale, conditions.constants)
