"""What a scheduler of diffusers says of its noise levels: its process, and the steps that it is about to take."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qncd.sampling.process import Process
from qncd.sampling.schedule import Step

FLOW = "FlowMatch"  # in the names of schedulers of rectified flow
# Whose samples are alpha x_0 + sigma eps with the levels of `alphas_cumprod`; others scale them otherwise.
VARIANCE_PRESERVING = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip

# Whose samples are x_0 + sigma eps with the levels of `sigmas`, and are scaled for the network.
VARIANCE_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")

# Whose samples are (1 - sigma) x_0 + sigma eps with the levels of `sigmas`, the shift of the schedule among them. So are
# those of schedulers of the first kind that are set to `use_flow_sigmas`, as Sana's and Wan's are.
RECTIFIED_FLOW = ("FlowMatchEulerDiscreteScheduler",)


def prediction_of(scheduler: Any) -> str:
    """What a network under this scheduler predicts: "epsilon", "v_prediction", "sample" or "flow"."""
    kind = str(scheduler.config.get("prediction_type", "epsilon"))
    return "flow" if FLOW in type(scheduler).__name__ or kind == "flow_prediction" else kind


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """The class of a scheduler and its configuration, as JSON."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    plain = {name: list(v) if isinstance(v, (tuple, np.ndarray)) else v for name, v in config.items()}
    return {"class": type(scheduler).__name__, **plain}


def flows(scheduler: Any) -> bool:
    """Whether a scheduler's samples are (1 - sigma) x_0 + sigma eps."""
    return FLOW in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def process_of(scheduler: Any) -> Process | None:
    """The noise process of a scheduler, in the samples that the network gets, at the time steps that it will visit.

    None for a scheduler that says neither its cumulative alphas nor that it is rectified flow.
    """
    times = tuple(int(t) if float(t).is_integer() else float(t) for t in getattr(scheduler, "timesteps", ()))
    if flows(scheduler):
        count = int(scheduler.config.num_train_timesteps)
        t = np.arange(count + 1) / count  # these schedulers' time steps are 1 to T
        return Process(1 - t, t, None, times)
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        return None
    plain = Process.from_alphas_cumprod(torch.as_tensor(abar).double().cpu().numpy())
    return Process(plain.alpha, plain.sigma, None, times)


def steps_of(scheduler: Any) -> dict[int, Step]:
    """The steps that a scheduler is about to take, by index. Raises ValueError where their noise levels are not known here."""
    name, flow = type(scheduler).__name__, flows(scheduler)
    known = (*VARIANCE_PRESERVING, *VARIANCE_EXPLODING, *RECTIFIED_FLOW)
    if name not in known:
        raise ValueError(
            f"runtime correction with {name}: allowed are {', '.join(known)}; mode qncd+ corrects with any scheduler"
        )
    if flow or name in VARIANCE_EXPLODING:
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        times = [float(t) for t in scheduler.timesteps]
        alphas = [1 - sigma if flow else 1.0 for sigma in sigmas]
        return {
            i: Step(i, t, -1.0, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1], 0.0, 0.0)
            for i, t in enumerate(times[: len(sigmas) - 1])
        }
    process = process_of(scheduler)
    assert process is not None and process.times is not None
    steps = {}
    for index, t in enumerate(process.times):
        following = next((later for later in process.times[index + 1 :] if later != t), -1.0)
        (alpha, noise), (alpha_prev, noise_prev) = process.at(t), process.at(following)
        steps[index] = Step(index, t, following, alpha, noise, alpha_prev, noise_prev, 0.0, 0.0)
    return steps
