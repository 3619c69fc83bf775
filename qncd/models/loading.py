"""Load a noise prediction network from an original checkpoint, a diffusers folder, the hub, or the bundled models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from qncd.models.configs import ASSETS, find_config, read_config
from qncd.models.files.diffusers_folders import CHECKPOINT_SUFFIXES, check_told, load_unet_folder, local_path
from qncd.models.files.folder_settings import (
    check_architecture,
    check_parts,
    check_schedule,
    check_scheduler,
    check_unet,
    scheduler_file,
)
from qncd.models.files.registry import check_sha256, fetch, load_registry
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.original.compvis import check_settings
from qncd.models.original.ddim import build_ddim_unet, convert_ddim_state_dict, ddim_unet_config, ddim_weights
from qncd.models.original.key_tables import network_with_weights
from qncd.models.schema import COMPVIS, DDIM, DIFFUSION, Name, Section, check, layout_of

__all__ = ["load_config", "load_ddim", "load_unet_folder", "save_ddim", "state_dict_hash"]


def load_config(path: str | Path) -> dict[str, Any]:
    """A model's yaml as a dict, read as CompVis' code reads it: 1e-05 is a number and ${a.b} a reference, as for OmegaConf.

    Args:
        path: a file, or the name of one that the package carries (`find_config`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not yaml, has no `model` section, or a key of it has another value than a model can have.
    """
    path = find_config(path)
    config = read_config(path)
    layout = layout_of(config)
    try:
        if layout is not None:
            check(config, layout)
        if layout is DDIM:
            ddim_unet_config(config)
        elif layout is COMPVIS:
            check_settings(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def load_ddim(
    config: Mapping[str, Any],
    ckpt: str | Path | None = None,
    use_pretrained: bool = False,
    sample_type: str | None = None,
    sha256: str | None = None,
) -> UNet2DModel:
    """The UNet of a DDIM config with its weights: eval mode, float32, on the CPU, no gradients.

    A folder's scheduler, and its network's config, must describe the config's model: see `check_scheduler` for what the
    samplers compute. `clip_sample: true`, which the google/ddpm-* folders have, is what the sampler `ddpm_noisy` does and the
    others do not: it is refused unless `sample_type` says that this sampler is the one.

    Args:
        config: the yaml of ermongroup/ddim as a mapping.
        ckpt: an original checkpoint, a .safetensors file (original or diffusers names), a diffusers folder (a UNet or a
            pipeline with `unet/`), or a hub id such as google/ddpm-cifar10-32, asked for only if no such path exists.
        use_pretrained: without `ckpt`, the published weights of the config's data set.
            Without both, `config["model"]["weights"]` names a bundled model.
        sample_type: the sampler that the UNet is for, where it is known.
        sha256: hex digest that the file of `ckpt`, or the published one, must have.

    Raises:
        ValueError: weights and config do not fit, the file is damaged, or a weight is NaN or infinite.
        FileNotFoundError: there are no such weights.
    """
    settings = ddim_unet_config(config)
    source = str(ckpt) if ckpt is not None else str(default_weights(config, use_pretrained, sha256))
    path = local_path(source) if sha256 is None else pinned_path(source, sha256)
    if path.is_dir():
        _check_folder(path, source, config, sample_type)
        unet = load_unet_folder(path, ("UNet2DModel",))
        check_unet(unet.config, source)
        with torch.device("meta"):
            expected = build_ddim_unet(config).config
        check_architecture(unet.config, expected, source, first=tuple(settings)[:3])
        return unet
    checkpoint = load_checkpoint(path)
    try:
        state: Mapping[str, Any] = ddim_weights(checkpoint, config)
        if not any(key.startswith(("down_blocks.", "up_blocks.")) for key in state):
            state = convert_ddim_state_dict(checkpoint, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return network_with_weights(lambda: build_ddim_unet(config), state.items(), source)


def _check_folder(folder: Path, source: str, config: Mapping[str, Any], sample_type: str | None) -> None:
    """Raise ValueError where a folder asks for what the samplers do not do, or has another noise schedule than the config."""
    check_parts(folder, source, latent=False)
    if (path := scheduler_file(folder)) is not None:
        settings = check_scheduler(path, "ddim", sample_type)
        if config.get("diffusion") is not None:  # a config that says nothing of it has nothing to contradict
            check_schedule(path, settings, _schedule(config))


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule of a DDIM config under diffusers' names. Raises ValueError where diffusers knows none such."""
    check(config, Section({"diffusion": DIFFUSION}))
    diffusion = config["diffusion"]
    schedule, steps = diffusion["beta_schedule"], diffusion["num_diffusion_timesteps"]
    start, end = float(diffusion["beta_start"]), float(diffusion["beta_end"])
    names = {"linear": "linear", "quad": "scaled_linear"}  # DDIM's names -> diffusers'
    if schedule not in names:
        raise ValueError(f"diffusion.beta_schedule {schedule!r} has no scheduler in diffusers: allowed are {', '.join(names)}")
    return {"beta_schedule": names[schedule], "beta_start": start, "beta_end": end, "num_train_timesteps": steps}


def ddim_pipeline(unet: UNet2DModel, config: Mapping[str, Any]) -> DDIMPipeline:
    """The UNet itself in a DDIMPipeline of diffusers, with the config's noise schedule and DDIM's own time steps.

    Raises:
        ValueError: the config has no noise schedule that diffusers knows.
    """
    schedule = _schedule(config)
    return DDIMPipeline(unet, DDIMScheduler(**schedule, set_alpha_to_one=True, steps_offset=0, clip_sample=False))


def save_ddim(unet: UNet2DModel, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write the folder of a DDIMPipeline: `unet/`, and `scheduler/` with the config's noise schedule.

    Raises:
        ValueError: the config has no noise schedule that diffusers knows, or diffusers' config cannot describe the UNet.
    """
    check_told(unet)
    ddim_pipeline(unet, config).save_pretrained(folder)


def state_dict_hash(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of a model's state: name, dtype, shape and bytes of each tensor, in the order of the names.

    One tensor at a time is brought to the CPU, so no second copy of the model is needed.
    """
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():  # flat first: a tensor without dimensions cannot be viewed as bytes
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pinned_path(source: str, sha256: str) -> Path:
    """The file that a source names, if its SHA-256 is this one.

    Raises:
        ValueError: it is another one, or the source is a folder or a hub id.
        FileNotFoundError: there is no such file.
    """
    path = Path(source)
    if not path.exists() and path.suffix in CHECKPOINT_SUFFIXES:
        raise FileNotFoundError(f"{source}: no such file")
    check_sha256(path, sha256)
    return path


def default_weights(config: Mapping[str, Any], use_pretrained: bool, sha256: str | None) -> Path:
    data, name = config.get("data") or {}, config["model"].get("weights")
    if use_pretrained:
        published = str(data.get("dataset", "")).lower()
        if published == "lsun":  # one data set with many categories; the yaml of churches says church_outdoor
            published += "_" + str(data.get("category", "")).removesuffix("_outdoor")
        if f"ema_diffusion_{published}" in load_registry():
            return fetch(f"ema_diffusion_{published}", sha256=sha256)
        if name is None:
            known = ", ".join(name for name in sorted(load_registry()) if name.startswith("ema_diffusion_"))
            raise ValueError(f"no published weights for the data set {published!r} (there are {known}): give --ckpt PATH")
    if name is None:
        raise ValueError("no weights: give --ckpt PATH or --use_pretrained, or name a bundled model as model.weights")
    check(name, Name(), "model.weights")
    folder = ASSETS / name
    if not (folder / "config.json").is_file():
        bundled = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
        raise ValueError(f"model.weights {name!r} is no bundled model: allowed are {', '.join(bundled) or '(none)'}")
    return folder
