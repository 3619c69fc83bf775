"""The scheduler of a saved pipeline whose quantization noise is corrected: diffusers loads it by the folder's model_index.json.

The network and the scheduler of a folder are loaded apart. What a correction knows is with the network; the scheduler finds it
at the first step of a run, as the quantized network that was called last in its thread.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin
from torch import Tensor, nn

from qncd.io.files import read_json
from qncd.models.network import network_of
from qncd.sampling.scheduler import Fitted, PipelineCorrection
from qncd.sampling.scheduler_levels import prediction_of
from qncd.sampling.taken import StepHandler, Taken, Tap, handle

NOT_APPLIED = (
    "this quantized network has a noise correction, and the pipeline's scheduler does not apply it: load the pipeline with the "
    "folder's own scheduler, or quantize it with the one that it will sample with"
)
_called = threading.local()


class CorrectedScheduler(SchedulerMixin):
    """Loads the scheduler of a folder as the class that its configuration names, with the correction in front of its steps."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: Any = None, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The scheduler. Raises ValueError where its configuration names none of diffusers."""
        folder = Path(path) / (subfolder or "")
        name = read_json(folder / SCHEDULER_CONFIG_NAME, infinities=True).get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if kind is None or not hasattr(kind, "step"):
            raise ValueError(f"{folder / SCHEDULER_CONFIG_NAME}: _class_name {name!r}: not a scheduler of diffusers")
        scheduler = kind.from_pretrained(folder, **kwargs)
        handle(scheduler, _OfLastNetwork())
        return scheduler


class Waiting:
    """The hook on a loaded network that lets its scheduler find it, and notices where there is no such scheduler: by a call at
    a later time step than that of the call before, without a step in between.

    Args:
        module: the network.
        corrector, fitted: as for `PipelineCorrection`.
        calls_network: the correction calls the network.
    """

    of_qncd = True

    def __init__(self, module: nn.Module, corrector: Any, fitted: Fitted, calls_network: bool) -> None:
        self.module, self.corrector, self.fitted = weakref.ref(module), corrector, fitted
        network = network_of(module)
        self.calls_network = calls_network
        self.times_of, self.rising = network.times_of, network.time_at(1) < network.time_at(0)
        self.tap = Tap(network)
        self.time: float | None = None  # of the last call since the last step
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap.silent:
            return
        before, self.time = self.time, float(self.times_of(args, kwargs).reshape(-1)[0])
        if before is not None and (self.time > before if self.rising else self.time < before):
            self.time = None
            raise ValueError(NOT_APPLIED)
        _called.network = self

    def remove(self) -> None:
        """The network is as it was."""
        self.handle.remove()
        self.tap.remove()

    def __deepcopy__(self, _: Any) -> Waiting:
        return self


class _OfLastNetwork(StepHandler):
    """Corrects by what the quantized network knows that was called last."""

    of_qncd = True

    def __init__(self) -> None:
        self.correction: PipelineCorrection | None = None

    def __call__(self, taken: Taken) -> Tensor:
        waiting: Waiting | None = getattr(_called, "network", None)
        module = waiting.module() if waiting is not None else None
        if waiting is None or module is None:
            raise ValueError("the pipeline's noise correction found no quantized network: was its unet replaced?")
        waiting.time = None
        if taken.index == 0 or self.correction is None:
            network = network_of(module, prediction_of(taken.scheduler))
            self.correction = PipelineCorrection(network, waiting.corrector, waiting.calls_network, waiting.tap, waiting.fitted)
        return self.correction(taken)
