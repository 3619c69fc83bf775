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
from qncd.sampling.scheduler import (
    PipelineCorrection,
    StepHandler,
    Taken,
    Tap,
    handle,
    needs_tap,
)
from qncd.sampling.scheduler_levels import prediction_of

MOST_CALLS = 8  # of a network between two steps of its scheduler
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
    """The hook on a loaded network that lets its scheduler find it, and notices where there is no such scheduler.

    Args:
        module: the network.
        corrector, times: as for `PipelineCorrection`.
        calls_network: the correction calls the network.
    """

    of_qncd = True

    def __init__(self, module: nn.Module, corrector: Any, times: tuple[float, ...] | None, calls_network: bool) -> None:
        self.module, self.corrector, self.times = weakref.ref(module), corrector, times
        network = network_of(module)
        self.calls_network = calls_network
        self.tap = Tap(network) if needs_tap(network, calls_network) else None
        self.calls = 0
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self.tap is not None and self.tap.silent:
            return
        self.calls += 1
        if self.calls > MOST_CALLS:
            self.calls = 0
            raise ValueError(
                "this quantized network has a noise correction, and the pipeline's scheduler does not apply it: load the "
                "pipeline with the folder's own scheduler, or quantize it with the one that it will sample with"
            )
        _called.network = self

    def remove(self) -> None:
        """The network is as it was."""
        self.handle.remove()
        if self.tap is not None:
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
        waiting.calls = 0
        if taken.index == 0 or self.correction is None:
            network = network_of(module, prediction_of(taken.scheduler))
            self.correction = PipelineCorrection(network, waiting.corrector, waiting.calls_network, waiting.times, waiting.tap)
        return self.correction(taken)
