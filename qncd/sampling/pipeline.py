"""A pipeline of diffusers as what samples images from seeds: it is called, with its own scheduler, and not imitated."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qncd.models.network import Network, network_of
from qncd.recipe import check_choice
from qncd.rng import ImageNoise
from qncd.sampling.corrector import Corrector
from qncd.sampling.scheduler import PipelineCorrection
from qncd.sampling.scheduler_levels import prediction_of, scheduler_settings
from qncd.sampling.taken import handled

DEFAULT_SIZE = 128  # of latents, of pipelines that say nothing
COMPONENTS = ("unet", "transformer", "prior")  # names that pipelines have for their denoiser
STEP = ("model_output", "timestep", "sample")  # what a scheduler's step begins with
Row = Mapping[str, Any]  # arguments of a call that one image has: its prompt, its class, the image that it begins with


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """(name, module) of a pipeline's denoiser. Raises ValueError where it has none of the known names."""
    for name in COMPONENTS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise ValueError(f"{type(pipe).__name__}: no denoiser among its components (looked for {', '.join(COMPONENTS)})")


def check_calibratable(pipe: Any) -> None:
    """Raise ValueError for a pipeline whose calls are not those of one denoiser between steps of its scheduler."""
    kind = type(pipe).__name__
    if not hasattr(pipe.scheduler, "step"):
        raise ValueError(f"{kind}: its {type(pipe.scheduler).__name__} has no step that calls could be told apart by")
    takes = tuple(inspect.signature(type(pipe.scheduler).step).parameters)[1 : len(STEP) + 1]
    if takes != STEP:
        raise ValueError(
            f"{kind}: its {type(pipe.scheduler).__name__}.step takes {', '.join(takes)}: allowed is {', '.join(STEP)}"
        )
    if isinstance(getattr(pipe, "transformer_2", None), nn.Module):
        raise ValueError(f"{kind}: has two denoisers, transformer and transformer_2: only pipelines with one are quantized")
    if hasattr(pipe, "set_pag_applied_layers"):
        raise ValueError(f"{kind}: its guidance replaces attention at each call: quantized attention cannot be replaced")


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a call of a pipeline takes, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def with_denoiser(pipe: Any, module: nn.Module) -> Any:
    """A copy of the pipeline that runs another denoiser; `pipe` stays as it is."""
    other = copy.copy(pipe)
    object.__setattr__(other, denoiser_of(pipe)[0], module)  # diffusers' own would write it into the configuration
    return other


@contextmanager
def replaced(pipe: Any, module: nn.Module) -> Iterator[None]:
    """Within it, the pipeline runs another denoiser."""
    name, own = denoiser_of(pipe)
    object.__setattr__(pipe, name, module)  # diffusers' own would write it into the configuration
    try:
        yield
    finally:
        object.__setattr__(pipe, name, own)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Within it, the pipeline draws no progress bar."""
    settings = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **settings})


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """The arguments of one call for several images."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


@dataclass(frozen=True)
class PipelineSampler:
    """A pipeline with the arguments of its calls; samples as `qncd.sampling.diffusion.Diffusion` does.

    Attributes:
        pipe: the pipeline, with the scheduler that it samples with.
        call: arguments of every call.
        lane: images in every call, exactly, so that an image does not depend on the others of its batch.
        corrects_by_calls: the correction calls the network while sampling.
        precision: "full", or "autocast": torch's mixed precision.
    """

    pipe: Any
    call: Mapping[str, Any]
    lane: int = 4
    corrects_by_calls: bool = False
    precision: str = "full"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("full", "autocast"))

    @property
    def network(self) -> Network:
        """The pipeline's denoiser."""
        return network_of(denoiser_of(self.pipe)[1], prediction_of(self.pipe.scheduler))

    @property
    def step_count(self) -> int:
        """The scheduler's steps of a call."""
        steps = self.call.get("num_inference_steps")
        steps = int(parameters_of(self.pipe)["num_inference_steps"].default if steps is None else steps)
        return max(1, int(steps * float(self.call["strength"]))) if "strength" in self.call else steps

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the network's samples as images, by the height and width of a call where it has them."""
        network = self.network
        size = network.config.get("sample_size") or getattr(self.pipe, "default_sample_size", DEFAULT_SIZE)
        height, width = (size, size) if isinstance(size, int) else size
        factor = int(getattr(self.pipe, "vae_scale_factor", 1))
        if "height" in self.call:
            height = int(self.call["height"]) // factor
        if "width" in self.call:
            width = int(self.call["width"]) // factor
        return max(network.image_channels), height, width

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the images beside the weights and the seeds, as JSON."""
        config = scheduler_settings(self.pipe.scheduler)
        call = {name: value for name, value in self.call.items() if _is_plain(value)}
        return {
            "pipeline": type(self.pipe).__name__,
            "scheduler": config.pop("class"),
            "scheduler_config": config,
            "call": call,
        }

    def with_network(self, network: Network) -> PipelineSampler:
        """The same with another denoiser; this one stays as it is."""
        return dataclasses.replace(self, pipe=with_denoiser(self.pipe, network.module))

    def sample(
        self, seeds: Sequence[int], corrector: Corrector | None = None, *, conditions: Sequence[Row] | None = None
    ) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] for `seeds` and as many rows; latents where the call's `output_type` is "latent".

        Raises:
            ValueError: as many seeds as rows are needed, or what the pipeline raises.
        """
        if conditions is not None and len(conditions) != len(seeds):
            raise ValueError(f"{len(conditions)} conditions for {len(seeds)} seeds")
        parts = []
        for start in range(0, len(seeds), self.lane):
            part, rows = list(seeds[start : start + self.lane]), list(conditions or ())[start : start + self.lane]
            missing = self.lane - len(part)
            filled = part + part[-1:] * missing, rows + rows[-1:] * missing
            parts.append(self._called(*filled, corrector)[: len(part)])
        return torch.cat(parts)

    def _called(self, seeds: Sequence[int], rows: Sequence[Row], corrector: Corrector | None) -> Tensor:
        """One call of the pipeline."""
        arguments: dict[str, Any] = {"output_type": "np", **self.call, **columns(rows), "generator": ImageNoise(seeds).generators}
        if not rows:
            arguments["batch_size"] = len(seeds)
        network = self.network
        correction = None if corrector is None else PipelineCorrection.of(network, corrector, self.corrects_by_calls)
        correcting = nullcontext() if correction is None else handled(self.pipe.scheduler, correction)
        try:
            autocast = torch.autocast(network.device.type, enabled=self.precision == "autocast")
            with quiet(self.pipe), correcting, torch.no_grad(), autocast:
                out = self.pipe(**arguments)
        finally:
            if correction is not None:
                correction.remove()
        images = out.images if hasattr(out, "images") else out[0]
        if arguments["output_type"] == "latent":
            return images
        return torch.as_tensor(np.asarray(images)).permute(0, 3, 1, 2).float() * 2 - 1


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, (list, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, int, float, bool))
