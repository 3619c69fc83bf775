"""Corrections inside diffusers pipelines: they act through the scheduler's `step`, which sees the guided prediction, t and x_t.

The pipeline is called and not imitated: what it does between the network and the scheduler stays its own. A correction that
calls the network (runtime estimation) repeats the last call with another sample, and guides as the pipeline did.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.calls import Call, in_one
from qncd.models.network import Network
from qncd.sampling.corrector import Corrector, Tentative
from qncd.sampling.process import clean_of, noise_of, slope_of
from qncd.sampling.schedule import Step
from qncd.sampling.scheduler_levels import steps_of
from qncd.sampling.taken import Taken, Tap, bare_step, handle

SCALE_DIGITS = (4, 2, 1)  # of a guidance scale: half precision leaves fewer of them
SAME = 1e-3  # largest relative difference between what a pipeline did and what is made of its parts
SAME_TIME = 1e-3  # largest difference between time steps that are the same
SAME_SCALE = 0.02  # largest relative difference between guidance scales that are taken as the same
# Schedulers that add noise in every step.
STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler")
NOISE_OF_ITS_OWN = (
    "%s adds noise of its own at each step: the part of the correction that would make that less is left out, the rest acts"
)

log = logging.getLogger("qncd")


@dataclass(frozen=True)
class Guidance:
    """How a pipeline made one prediction for each sample of what the network gave.

    Attributes:
        parts: of the network's batch for each sample: 1, or 2 with classifier-free guidance (without condition first).
        scale: of the guidance.
        doubled: the pipeline's samples are there twice, as DiT's are, and so are predictions: with condition first.
    """

    parts: int
    scale: float
    doubled: bool = False

    @classmethod
    def seen(cls, output: Tensor, taken: Taken, nearly: bool = False) -> Guidance:
        """From one step.

        Args:
            output: of the network.
            nearly: guidance with something more, such as a rescaled standard deviation, is taken as the nearest plain one.

        Raises:
            ValueError: it is not u + s (c - u).
        """
        parts, rest = divmod(len(output), len(taken.x))
        output, guided = output[:, : taken.x.shape[1]], taken.output[:, : taken.x.shape[1]]
        if rest == 0 and parts == 1 and _near(output, guided):
            return cls(1, 1.0)
        doubled = parts == 1 and len(output) % 2 == 0 and torch.equal(*guided.chunk(2))
        if rest == 0 and (parts == 2 or doubled):
            uncond, cond = reversed(output.chunk(2)) if doubled else output.chunk(2)
            along = (cond - uncond).double()
            length = float(along.square().sum())
            wanted = guided[: len(uncond)]
            scale = float(((wanted - uncond).double() * along).sum()) / length if length else 1.0
            for digits in SCALE_DIGITS:
                found = cls(parts, round(scale, digits), doubled)
                if nearly or _near(found(output), guided):
                    return found
        if rest == 0 and parts == 1 and nearly:
            return cls(1, 1.0)
        raise ValueError(
            "the pipeline's guidance is not e_u + s (e_c - e_u) of one network call (guidance_rescale, several calls a step?): "
            "runtime correction and bit allocation cannot repeat it; allowed are corrections that do not call the network"
        )

    def __call__(self, output: Tensor) -> Tensor:
        """(parts * N, ...) -> (N, ...)."""
        if self.doubled:
            cond, uncond = output.chunk(2)
            return torch.cat([uncond + self.scale * (cond - uncond)] * 2)
        if self.parts == 1:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self.scale * (cond - uncond)


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).double().norm()) <= SAME * max(float(b.double().norm()), 1e-12)


@dataclass(frozen=True)
class Fitted:
    """What a correction was fitted for.

    Attributes:
        times: time steps of the scheduler; None where any will do.
        guidance: scale; None where that is not known.
    """

    times: tuple[float, ...] | None = None
    guidance: float | None = None

    def check_time(self, taken: Taken) -> None:
        """Raise ValueError for a step that it was not fitted for."""
        if self.times is None:
            return
        expected = self.times[taken.index] if taken.index < len(self.times) else None
        if expected is None or abs(expected - taken.time) > SAME_TIME:
            shifted = " and, as its scheduler shifts them by it, the image size" if by_size(taken.scheduler) else ""
            raise ValueError(
                f"step {taken.index + 1} is at time step {taken.time:g}, the correction was fitted for {len(self.times)} steps, "
                f"{'none further' if expected is None else f'with {expected:g} here'}: call the pipeline with the number of "
                f"steps{shifted} that it was quantized with, or quantize it for this one"
            )

    def tell_guidance(self, calls: Sequence[tuple[Call, Tensor]], taken: Taken) -> None:
        """Warn where a run is guided otherwise."""
        seen = None if self.guidance is None else guidance_of(calls, taken)
        if seen is not None and self.guidance is not None and not math.isclose(seen, self.guidance, rel_tol=SAME_SCALE):
            log.warning(
                "guidance %g: the noise correction was fitted with %g, so it is less sure; calls=[{..., 'guidance_scale': %g}] "
                "quantizes for this one",
                seen, self.guidance, seen,
            )  # fmt: skip


@dataclass
class PipelineCorrection:
    """A `StepHandler` that corrects every prediction of a pipeline; `of` makes one.

    Attributes:
        network: of the pipeline.
        corrector: what corrects.
        calls_network: the corrector calls the network too.
        fitted: what the correction was fitted for.
        tap: the network's calls.
    """

    network: Network
    corrector: Corrector
    calls_network: bool
    tap: Tap
    fitted: Fitted = Fitted()
    steps: dict[int, Step] = field(default_factory=dict)
    told: bool = False

    @classmethod
    def of(
        cls, network: Network, corrector: Corrector, calls_network: bool = False, fitted: Fitted = Fitted()
    ) -> PipelineCorrection:
        """One that watches the network's calls until `remove`."""
        return cls(network, corrector, calls_network, Tap(network), fitted)

    def remove(self) -> None:
        """Watch the network's calls no longer."""
        self.tap.remove()

    @torch.no_grad()
    def __call__(self, taken: Taken) -> Tensor:
        self.fitted.check_time(taken)
        calls = self.tap.take()
        if taken.index == 0:
            self.fitted.tell_guidance(calls, taken)
            self.corrector.begin([seed_of(x) for x in taken.x], str(taken.x.device))
        step = self._step(taken)
        if self.calls_network and not step.alpha:
            return taken.output  # pure noise: whatever the network predicts there says nothing of its noise
        kind = self.network.prediction if self.calls_network else "epsilon"
        # What the network gets of a variance-exploding process has the levels of a variance-preserving one.
        scale = 1 / math.hypot(step.alpha, step.noise) if step.alpha == 1 else 1.0
        levels = (scale * step.alpha, scale * step.noise)
        slope = slope_of(kind, *levels) if kind != "epsilon" else 1.0
        call = self.tap.last
        channels = taken.x.shape[1]
        predicted, variance = taken.output[:, :channels], taken.output[:, channels:]  # a learned variance is not corrected

        def images(samples: Tensor) -> Tensor:
            return self.network.to_images(samples, call)

        def noise(output: Tensor, x: Tensor) -> Tensor:
            return noise_of(kind, output, scale * x, *levels)

        x, eps = images(taken.x), images(noise(predicted, taken.x))

        def output(corrected: Tensor) -> Tensor:
            if kind == "epsilon":
                changed = self.network.to_samples(corrected, predicted)
            else:
                changed = predicted + self.network.to_samples(slope * (corrected - eps), predicted)
            whole = torch.cat([changed, variance], 1) if variance.numel() else changed
            return whole.to(taken.output.dtype)

        def advance(corrected: Tensor) -> Tentative:
            x_prev = images(taken.advance(output(corrected)))
            return Tentative(x_prev, clean_of(x, corrected, step.alpha, step.noise) if step.noise else x_prev)

        def denoise(x: Tensor, t: float) -> Tensor:
            if not self.calls_network:
                raise ValueError("this correction calls the network, and was not told so")
            samples = self.network.to_samples(x, taken.x)
            return images(noise(self._again(calls, taken, samples), samples))

        corrected = self.corrector.correct(step, x, eps, denoise, advance)
        if corrected.variance is not None and not self.told and adds_noise(taken):
            log.warning(NOISE_OF_ITS_OWN, type(taken.scheduler).__name__)
            self.told = True
        return output(corrected.eps)

    def _step(self, taken: Taken) -> Step:
        if not self.calls_network:
            return bare_step(taken)
        if taken.index == 0:  # an image that the pipeline was given makes it begin later than with the first
            steps = steps_of(taken.scheduler)
            first = next((index for index, step in steps.items() if abs(step.t - taken.time) <= SAME_TIME), len(steps))
            self.steps = {i - first: dataclasses.replace(step, index=i - first) for i, step in steps.items() if i >= first}
        if taken.index not in self.steps:
            raise ValueError(f"the scheduler takes a step at {taken.time:g} that is none of its time steps")
        return self.steps[taken.index]

    def _again(self, calls: Sequence[tuple[Call, Tensor]], taken: Taken, x: Tensor) -> Tensor:
        """The guided prediction at another sample, by the pipeline's last call of the network."""
        call, output = in_one_call(calls)
        dim = 1 if taken.x.ndim > 3 else -1  # of channels
        further = call.x.tensor_split([taken.x.shape[dim]], dim)[1]  # that the network gets beside those of the sample
        guidance = Guidance.seen(output, taken)

        def network_input(sample: Tensor) -> Tensor:
            scaled = sample
            if hasattr(taken.scheduler, "scale_model_input"):  # those of rectified flow have none
                scaled = taken.scheduler.scale_model_input(sample, taken.time_given)
            return torch.cat([torch.cat([scaled] * guidance.parts), further], dim).to(call.x.dtype)

        if not _near(network_input(taken.x), call.x):
            raise ValueError("the network gets other samples than the scheduler: runtime correction cannot repeat its calls")
        self.tap.silent = True
        try:
            again = self.network.predict(network_input(x), call.t, call.inputs, **call.constants)
        finally:
            self.tap.silent = False
        return guidance(again[:, : taken.x.shape[1]]).to(taken.output.dtype)


def in_one_call(calls: Sequence[tuple[Call, Tensor]]) -> tuple[Call, Tensor]:
    """The network's calls of one step as one, and what it gave. Raises ValueError as `qncd.models.calls.in_one`."""
    made = in_one([call for call, _ in calls])
    return made, torch.cat([output for _, output in reversed(calls)])


def guidance_of(calls: Sequence[tuple[Call, Tensor]], taken: Taken) -> float | None:
    """The scale of the guidance in a step, 1 without one; None where it is another than u + s (c - u)."""
    try:
        return Guidance.seen(in_one_call(calls)[1], taken).scale
    except ValueError:
        return None


def by_size(scheduler: Any) -> bool:
    """Whether the time steps of a scheduler depend on the size of an image."""
    return bool(scheduler.config.get("use_dynamic_shifting"))


def adds_noise(taken: Taken) -> bool:
    """Whether a scheduler adds noise of its own in a step."""
    config, (_, named) = taken.scheduler.config, taken.arguments
    stochastic = type(taken.scheduler).__name__ in STOCHASTIC or str(config.get("algorithm_type", "")).startswith("sde")
    return stochastic or bool(named.get("eta")) or bool(config.get("stochastic_sampling"))


def seed_of(x: Tensor) -> int:
    """A seed that follows from an image's own initial noise, whatever its batch."""
    digest = hashlib.sha256(x.detach().float().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:6], "big")


def attach(pipe: Any, correction: PipelineCorrection) -> None:
    """Let a correction act in every run of a pipeline from now on. A scheduler put in its place is noticed at the next call."""
    handle(pipe.scheduler, correction)
    correction.network.module.register_forward_pre_hook(_WatchScheduler(pipe))


class _WatchScheduler:
    """The hook on the network that notices a scheduler without the correction."""

    of_qncd = True

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        pipe = self.pipe()
        if pipe is not None and not getattr(pipe.scheduler.step, "of_qncd", False):
            raise ValueError(
                f"the pipeline's scheduler was replaced by a {type(pipe.scheduler).__name__}, so its correction would not act: "
                "quantize with the scheduler that it will sample with, or with a recipe without correction"
            )

    def __deepcopy__(self, _: Any) -> _WatchScheduler:
        return self
