"""What the stages of quantization work on, and what a stage is."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qncd.distributed import OneProcess, Processes
from qncd.models.network import Network, network_of
from qncd.progress import Monitor, silent
from qncd.ptq.data import CalibrationSet
from qncd.recipe import Recipe
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions

NO_GRADIENTS = (
    "goes back through the sampler's steps, which is done for samples that network and scheduler have in one shape, and guidance "
    "of the form u + s (c - u)"
)
OFF = {"bit_allocation": "--no-allocate_bits", "step_weights": "--no-step_weights"}  # flags


@dataclass
class Context:
    """One network on its way from floating point to integers.

    Attributes:
        network: changed in place by the stages.
        recipe: what is asked for.
        data: the calibration set.
        times: time steps that the sampler visits.
        diffusion: sampler of the network, for stages that sample with gradients; None where there is none.
        conditions: of calibration trajectories, for the same.
        monitor: is told of progress.
        folder: for finished blocks of long stages, so that a run that was cut off goes on; None for none.
        processes: who shares the work, all with the same arguments.
        reference: the network in floating point, prepared as `network` was before its weights were rounded; made on first use.
        found: what stages report, by their names.
        packed: whoever rounds a weight keeps its codes alone.
    """

    network: Network
    recipe: Recipe
    data: CalibrationSet
    times: tuple[Any, ...] = ()
    diffusion: Diffusion | None = None
    conditions: Conditions | None = None
    monitor: Monitor = silent
    folder: Path | None = None
    processes: Processes = field(default_factory=OneProcess)
    reference: Network | None = None
    found: dict[str, Any] = field(default_factory=dict)
    packed: bool = False

    @property
    def batch_size(self) -> int:
        """Inputs a forward pass."""
        return self.recipe.calibration.batch_size

    def keep_reference(self) -> Network:
        """A copy of the network as it is now, for stages that compare with it; made once."""
        if self.reference is None:
            self.reference = copied(self.network)
        return self.reference

    def sampler(self, asked: str) -> Diffusion:
        """The sampler, for an option that needs one with gradients. Raises ValueError where there is none."""
        if self.diffusion is None:
            raise ValueError(f"{asked} {NO_GRADIENTS}: leave it out, by {asked}=False or {OFF[asked]}")
        return self.diffusion

    def visited(self) -> tuple[Any, ...]:
        """The sampler's time steps, those of the calibration set where the sampler is not known."""
        return self.times or tuple(dict.fromkeys(self.data.t.tolist()))


class Stage(Protocol):
    """One method, in its place in the order of `qncd.ptq.stages.STAGES`.

    Attributes:
        title, unit: of its progress.
        weights: it makes weights; left out where they come from a checkpoint.
    """

    title: str
    unit: str
    weights: bool

    def wanted(self, recipe: Recipe) -> bool:
        """Whether a recipe asks for it."""

    def run(self, context: Context) -> None:
        """Do it, in place."""


def copied(network: Network) -> Network:
    """A copy of a network with a memory of its own."""
    return network_of(copy.deepcopy(network.module), network.prediction)
