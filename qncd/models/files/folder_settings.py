"""What the folder of a diffusers pipeline asks for, against what this package's samplers do: the difference is refused by name.

A folder describes more than its networks: a scheduler with a noise schedule and time steps, further components, further
inputs of the UNet. Whoever samples its UNet with another sampler and leaves them out gets other images, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qncd.models.files.diffusers_folders import read_settings
from qncd.models.schema import PIPELINE
from qncd.models.schema import SCHEDULER as SCHEDULER_RULES

Settings = Mapping[str, Any]

SCHEDULER = "scheduler_config.json"
SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")  # noise schedules and predictions as the samplers' own
_LATENT_PARTS = frozenset(
    ("unet", "vae", "vqvae", "scheduler", "text_encoder", "tokenizer", "class_embedder", "safety_checker", "feature_extractor")
)
_PIXEL_PARTS = frozenset(("unet", "scheduler"))
# Folders of components that pipelines load whether or not a model_index.json names them.
_OTHER_PARTS = (
    "controlnet",
    "image_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer_2",
    "adapter",
    "bert",
    "transformer",
)

# The one value that each setting may have where a file names it, in any convention.
_FIXED: Settings = {
    "prediction_type": "epsilon",
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
}
_CONVENTIONS: Mapping[str, Settings] = {
    "ddim": {"set_alpha_to_one": True, "steps_offset": 0},
    "ldm": {"set_alpha_to_one": False, "steps_offset": 1},
}
_LEARNED = ("learned", "learned_range")  # variances that the network predicts beside the noise

# Inputs of a UNet beside the sample, the time step and the context; without such a setting, it does not have the input.
_UNET_INPUTS: Mapping[str, str] = {
    "time_cond_proj_dim": "an embedding of the guidance scale, as latent consistency models have",
    "addition_embed_type": "an additional embedding, as SDXL and image prompts have",
    "encoder_hid_dim_type": "an additional projection of the context",
    "class_embed_type": "a class embedding",
    "num_class_embeds": "a class embedding",
}

# diffusers' defaults, for a scheduler whose file leaves them out.
_SCHEDULE: Settings = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_RELATIVE = 1e-6  # of numbers that may have been float32 on their way


def scheduler_file(folder: Path) -> Path | None:
    """The scheduler's settings that belong to a UNet's or a pipeline's folder, None where there is nothing of that name.

    Looked for in `scheduler/`, in the folder itself (as in the first folders of diffusers), and beside a folder named `unet`.
    """
    candidates = [folder / "scheduler" / SCHEDULER, folder / SCHEDULER]
    if folder.resolve().name == "unet":
        candidates.append(folder.resolve().parent / "scheduler" / SCHEDULER)
    return next((path for path in candidates if _is_there(path)), None)


def _is_there(path: Path) -> bool:
    """Whether there is something of that name: what is no file, or a link to nothing, is for the reader to refuse."""
    return path.exists() or path.is_symlink()


def check_scheduler(path: Path, convention: str, sample_type: str | None = None) -> dict[str, Any]:
    """The settings of a scheduler_config.json that the samplers of a convention compute.

    A setting that the file leaves out is taken as the samplers have it, also where diffusers' default is another value:
    diffusers writes every setting, and the published files without some of them are older than those defaults. The exception
    is PNDM's `skip_prk_steps`, which must be there and true.

    Args:
        path: the file.
        convention: "ddim" (the last step ends at the clean image, time steps from 0) or "ldm" (it ends at time step 0, time
            steps from 1).
        sample_type: the sampler, where it is known. `ddpm_noisy` clips the predicted image to [-1, 1] and adds the larger of
            DDPM's two variances; all others do not clip, and nothing is clipped where the sampler is not known.

    Raises:
        ValueError: one line that names the file, the setting, its value and what is allowed.
    """
    settings = read_settings(path, SCHEDULER_RULES)
    kind = settings["_class_name"]
    if kind not in SCHEDULERS:
        raise ValueError(
            f"{path}: _class_name {kind} is not supported: allowed are {', '.join(SCHEDULERS)} "
            "(qncd.load of the pipeline's folder samples it with its own scheduler)"
        )
    wanted = {**_FIXED, **_CONVENTIONS[convention]}
    if sample_type == "ddpm_noisy":
        wanted |= {"clip_sample": True, "variance_type": "fixed_large"}
    for key, allowed in wanted.items():
        if key in settings and settings[key] != allowed:
            raise _refusal(path, key, settings[key], _value(allowed) + _hint(key, sample_type))
    if kind == "PNDMScheduler" and settings.get("skip_prk_steps") is not True:
        raise _refusal(path, "skip_prk_steps", settings.get("skip_prk_steps", False), "true")
    if settings.get("variance_type") in _LEARNED:
        raise _refusal(path, "variance_type", settings["variance_type"], "fixed_small, fixed_large")
    return settings


def _hint(key: str, sample_type: str | None) -> str:
    return ", or true with sample_type ddpm_noisy, which clips" if key == "clip_sample" and sample_type != "ddpm_noisy" else ""


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refusal(path: Path, key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{path}: {key} {_value(value)} is not supported: allowed is {allowed}")


def scheduler_betas(path: Path, settings: Settings) -> np.ndarray:
    """The variances (T,) float64 of the noise schedule in a scheduler_config.json.

    Raises:
        ValueError: another schedule than diffusers' linear, scaled_linear and trained_betas.
    """
    settings = {**_SCHEDULE, **settings}
    if settings.get("trained_betas") is not None:
        return np.asarray(settings["trained_betas"], dtype=np.float64)
    start, end, steps = float(settings["beta_start"]), float(settings["beta_end"]), settings["num_train_timesteps"]
    if settings["beta_schedule"] == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if settings["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    raise ValueError(f"{path}: beta_schedule {settings['beta_schedule']} is not supported: allowed are linear, scaled_linear")


def check_schedule(path: Path, settings: Settings, schedule: Settings) -> None:
    """Raise ValueError where a scheduler's noise schedule is not the yaml's.

    Args:
        path, settings: the scheduler_config.json and what is in it.
        schedule: the yaml's, under diffusers' names: beta_schedule, beta_start, beta_end, num_train_timesteps.
    """
    if settings.get("trained_betas") is not None:
        found, wanted = scheduler_betas(path, settings), scheduler_betas(path, schedule)
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=_RELATIVE, atol=0):
            raise ValueError(f"{path}: trained_betas are not the config's noise schedule")
        return
    for key, wanted in schedule.items():
        value = settings.get(key, _SCHEDULE[key])
        if value != wanted if isinstance(wanted, str) else not np.isclose(float(value), wanted, rtol=_RELATIVE, atol=0):
            raise ValueError(f"{path}: {key} is {_value(value)}, the config says {wanted}")


def check_parts(folder: Path, source: str, latent: bool) -> None:
    """Raise ValueError where a pipeline has a component that the samplers would leave out.

    Args:
        folder: of the pipeline.
        latent: whether it is one of latent diffusion, with a first stage and conditioning.
    """
    index = read_settings(folder / "model_index.json", PIPELINE) if _is_there(folder / "model_index.json") else {}
    listed = [
        name for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and None not in value and all(isinstance(part, str) for part in value)
    ]  # fmt: skip
    known = _LATENT_PARTS if latent else _PIXEL_PARTS
    there = [name for name in (*_OTHER_PARTS, *(sorted(_LATENT_PARTS) if not latent else ())) if (folder / name).is_dir()]
    if others := sorted({*listed, *there} - known):
        raise ValueError(
            f"{source}: the pipeline's {others[0]} is not supported: allowed are {', '.join(sorted(known))} "
            "(qncd.load of the folder samples it with the pipeline itself)"
        )


def check_unet(unet_config: Settings, source: str, channels: int | None = None) -> None:
    """Raise ValueError where a UNet takes or gives something that the samplers do not know.

    Args:
        unet_config: diffusers' config of it.
        channels: of the samples that it denoises, where known.
    """
    for key, meaning in _UNET_INPUTS.items():
        if unet_config.get(key) is not None:
            raise ValueError(f"{source}: unet: {key} {unet_config[key]} ({meaning}) is not supported: allowed is none")
    for key in ("in_channels", "out_channels"):
        found = unet_config.get(key, channels)
        if channels is not None and found != channels:
            inpainting = ", as for inpainting" if key == "in_channels" and found == 2 * channels + 1 else ""
            raise ValueError(
                f"{source}: unet: {key} {found}{inpainting} is not supported: allowed is {channels}, "
                f"the first stage's latents have {channels} channels"
            )


def check_architecture(found: Settings, expected: Settings, source: str, first: Sequence[str] = ()) -> None:
    """Raise ValueError where two configs of diffusers describe networks that compute differently.

    Args:
        found: of the folder's network.
        expected: of the network that the yaml describes.
        first: keys to compare first, so that the error names what says most.
    """
    ignored = {"dropout", "num_train_timesteps"}  # of training; of a time embedding that the originals do not have
    keys = [*first, *(key for key in expected if key not in first and key not in ignored and not key.startswith("_"))]
    for key in keys:
        value, wanted = found.get(key), expected[key]
        if isinstance(wanted, list | tuple) and isinstance(value, list | tuple):
            value, wanted = list(value), list(wanted)
        if value != wanted:
            raise ValueError(f"{source}: {key} is {value}, the config says {wanted}")
