"""What a sampler asks of a noise corrector, and what a kind of correction has to bring: record, fit, correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, isfinite

from qncd.recipe import Recipe, check_int
from qncd.sampling.schedule import Step

# A network call: x (N, C, H, W) and a time step -> noise prediction (N, C, H, W).
Denoiser = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Tentative:
    """A step taken on trial: the earlier sample x_p and the clean image it was built from, (N, C, H, W) each."""

    x_prev: Tensor
    x0: Tensor


Advance = Callable[[Tensor], Tentative]


@dataclass(frozen=True)
class Corrected:
    """A corrected noise prediction and the variance of the error that is left in it, which broadcasts against it."""

    eps: Tensor
    variance: Tensor | None = None


class Corrector(Protocol):
    """Removes quantization noise from noise predictions while sampling."""

    def begin(self, seeds: Sequence[int], device: str) -> None:
        """Start a batch of images; nothing of the last batch survives."""

    def correct(self, step: Step, x: Tensor, eps: Tensor, denoise: Denoiser, advance: Advance) -> Corrected:
        """Correct `eps`, the prediction at `x` and `step`; `advance(e)` takes the sampler's step with e on trial."""


class Record(Protocol):
    """What a correction knows, as a quantized checkpoint holds it.

    One that holds for predictions with C channels alone says so with an attribute `channels`, which is compared with the
    network's where a checkpoint is read.
    """

    def to_tensors(self) -> tuple[dict[str, Tensor], str]:
        """The tensors by name, and the rest as JSON."""

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], head: str) -> Record:
        """The inverse of `to_tensors`. Raises KeyError for what is missing, TypeError or ValueError for something else."""


def check_record(record: Record, shapes: Mapping[str, Sequence[str | int]], images: object) -> None:
    """Look at what was read of a record.

    Args:
        shapes: of its tensors by name; a letter stands for the same length wherever it occurs.
        images: how many it was made from.

    Raises:
        ValueError: names what is not a finite floating point tensor of its shape, or no number of images.
    """
    lengths: dict[str, int] = {}
    for name, wanted in shapes.items():
        tensor: Tensor = getattr(record, name)
        if tensor.ndim == len(wanted):
            for size, found in zip(wanted, tensor.shape, strict=True):
                lengths.setdefault(str(size), found if isinstance(size, str) else size)
        expected = tuple(lengths.get(str(size), size) for size in wanted)
        if tuple(tensor.shape) != expected or not tensor.numel():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}, expected {expected}")
        if not tensor.is_floating_point() or not bool(isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite floating point numbers")
    check_int("images", images, 1)


class Recorder(Corrector, Protocol):
    """A corrector that corrects nothing and watches a full-precision run."""

    def table(self) -> Record:
        """What it has seen."""


# step, x_t, the quantized network's prediction and the full-precision one's at x_t.
See = Callable[[Step, Tensor, Tensor, Tensor], None]


@runtime_checkable
class Kept(Protocol):
    """What a `Recorder` or a `See` may offer, so that several processes share the trajectories that it watches."""

    @property
    def kept(self) -> tuple[dict[int, list[Any]], ...]:
        """All that it has kept: tensors on the CPU by the step's index, batch after batch; parts are joined by lengthening the
        lists, in the order of the trajectories.
        """


Predictions = Mapping[int, Sequence[Tensor]]  # of the network on a full-precision run, on the CPU; in an order that `Runs` knows


class Runs(Protocol):
    """Calibration runs of one sampler, from seeds that no image has: of the network in full precision, and once it is quantized.

    There is one network, so what the quantized one is compared with is kept of runs before: a copy of a network of 2.6 billion
    weights takes more memory than its predictions.
    """

    @property
    def samples(self) -> int:
        """Trajectories of a run, unless another number is asked for."""

    def record(self, recorder: Recorder) -> None:
        """A full-precision run that `recorder` watches."""

    def predictions(self) -> Predictions:
        """What the network predicts on a full-precision run, for `compare`: samples * steps * C * H * W floats."""

    def trajectory(self, samples: int) -> list[Tensor]:
        """A full-precision run of `samples` trajectories: (samples, ...) after each step."""

    def compare(self, exact: Predictions, see: See) -> None:
        """The run of `predictions` once more, at whose every step `see` is shown what the quantized network predicts too."""

    def follow(self, corrector: Corrector, samples: int) -> None:
        """A run of the quantized network from the seeds of `trajectory`, all in one batch, corrected by `corrector`."""


class CorrectorKind:
    """One kind of correction, as `qncd.sampling.correctors.registry` lists it.

    Attributes:
        prefix: of the record's tensors in a quantized checkpoint.
        record: what it knows; None for a correction that knows nothing beforehand.
        calls_network: it calls the network while sampling.
    """

    prefix: ClassVar[str]
    record: ClassVar[type[Any] | None]
    calls_network: ClassVar[bool] = False

    def needs_record(self, recipe: Recipe) -> bool:
        """Whether it cannot correct without a record."""
        return self.record is not None

    def fitted_afterwards(self, recipe: Recipe) -> bool:
        """Whether `fit` makes its record, by comparing with the full-precision network."""
        return self.needs_record(recipe) and self.recorder(recipe) is None

    def recorder(self, recipe: Recipe) -> Recorder | None:
        """What has to watch a full-precision run before the network is quantized; None for nothing."""
        return None

    def before(self, runs: Runs, recipe: Recipe) -> Any:
        """What `fit` needs of full-precision runs, before the network is quantized."""
        return None

    def fit(self, runs: Runs, recipe: Recipe, seen: Any) -> Record | None:
        """The record, by runs after the network is quantized; None where there is nothing to know. `seen` is from `before`."""
        return None

    def corrector(self, recipe: Recipe, record: Any) -> Corrector:
        """The correction. Raises ValueError for a record that does not fit."""
        raise NotImplementedError
