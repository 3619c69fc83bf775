"""Schedulers of diffusers by name, for a pipeline that has another one."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

# Settings of a scheduler that say what the network was trained on: one that does not know them would sample something else.
_MEANING = (
    "prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample",
    "clip_sample_range", "timestep_spacing", "steps_offset",
)  # fmt: skip
_SHORT = {"plms": "PNDM", "dpm": "DPMSolverMultistep", "euler": "EulerDiscrete", "eulerancestral": "EulerAncestralDiscrete"}


def names_for(pipe: Any) -> list[str]:
    """The schedulers that can take the place of a pipeline's own, without "Scheduler" and those of packages that are absent."""
    return sorted(kind.__name__.removesuffix("Scheduler") for kind in pipe.scheduler.compatibles if "_backends" not in vars(kind))


def scheduler_named(pipe: Any, name: str) -> Any:
    """A scheduler of that name with the settings of the pipeline's own.

    Args:
        name: such as DDIM, EulerDiscrete or DPMSolverMultistepScheduler, in letters of any size.

    Raises:
        ValueError: there is none such, or it does not know a setting that the pipeline's scheduler has.
    """
    own, known = pipe.scheduler, names_for(pipe)
    wanted = _SHORT.get(name.lower(), name).lower().removesuffix("scheduler")
    found = next((kind for kind in known if kind.lower() == wanted), None)
    if found is None:
        raise ValueError(f"scheduler {name}: with {type(own).__name__} in the folder, allowed are {', '.join(known)}")
    kind = getattr(diffusers, f"{found}Scheduler")
    parameters, defaults = (inspect.signature(cls.__init__).parameters for cls in (kind, type(own)))
    for setting in _MEANING:
        value = own.config.get(setting)
        default = defaults[setting].default if setting in defaults else None
        if setting not in parameters and value not in (None, False, default):
            raise ValueError(
                f"scheduler {name}: {kind.__name__} has no {setting}, and the folder's {type(own).__name__} has {value!r}"
            )
    extra = {"skip_prk_steps": True} if found == "PNDM" else {}  # PLMS, as Stable Diffusion has it
    return kind.from_config(own.config, **extra)
