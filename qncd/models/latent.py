"""Latent diffusion models as a whole: UNet, first stage, conditioning, noise schedule; from any source, to diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from qncd.models import loading
from qncd.models.files.diffusers_folders import UNETS, check_told, load_component, load_unet_folder, local_path, read_settings
from qncd.models.files.folder_settings import SCHEDULER, check_parts, check_scheduler, check_unet, scheduler_betas
from qncd.models.files.registry import fetch, load_registry
from qncd.models.original.autoencoders import FirstStage, scale_factor
from qncd.models.original.compvis import Conditioner, check_config, networks_of
from qncd.models.original.conditioning import ClassConditioner, TextConditioner, load_class_folder, load_text_folder
from qncd.models.original.ldm import LdmUNet, build_ldm_unet, ldm_betas
from qncd.models.schema import NETWORK, Name, check

_SD_SCALE = 0.18215  # of AutoencoderKL where its config, of an old diffusers, does not hold it


@dataclass(frozen=True)
class LatentModel:
    """A latent diffusion model.

    Args:
        unet: predicts the noise in latents; takes (x, t), or (x, t, context) where there is a conditioner.
        first_stage: between latents and images.
        conditioner: makes the contexts, None for an unconditional model.
        betas: variances (T,) float64 of the noise schedule.
        latent_shape: (C, H, W) of a latent.
        source: where the weights come from.
    """

    unet: LdmUNet
    first_stage: FirstStage
    conditioner: Conditioner | None
    betas: np.ndarray
    latent_shape: tuple[int, int, int]
    source: str

    @property
    def image_size(self) -> int:
        """Side of an image."""
        return self.latent_shape[1] * self.first_stage.factor

    def to(self, device: torch.device | str) -> LatentModel:
        """Move the networks to a device; returns the model."""
        networks: tuple[Any, ...] = (self.unet, self.first_stage.model, self.conditioner)
        for network in networks:
            if network is not None:
                network.to(device)
        return self


def load_latent_model(
    config: Mapping[str, Any],
    ckpt: str | Path | None = None,
    use_pretrained: bool = False,
    sha256: str | None = None,
) -> LatentModel:
    """A latent diffusion model with its weights: eval mode, float32, on the CPU, no gradients.

    Args:
        config: the original yaml as a mapping.
        ckpt: an original checkpoint (.ckpt, .pth, .safetensors); a diffusers folder or a hub id of the yaml's model, which must
            ask for nothing that the original's samplers do not do.
        use_pretrained: without `ckpt`, the published weights that `config["model"]["pretrained"]` names.
            Without both, `config["model"]["weights"]` names a bundled model.
        sha256: hex digest that the file of `ckpt`, or the published one, must have.

    Averaged weights (`model_ema.*`) are used where the file has them and `use_ema` is not false, as the original does.

    Raises:
        ValueError: weights and config do not fit, the model is not supported, a file is damaged, or a weight is not finite.
        FileNotFoundError: there are no such weights.
    """
    check_config(config)
    source = str(ckpt) if ckpt is not None else str(default_weights(config, use_pretrained, sha256))
    path = local_path(source) if sha256 is None else loading.pinned_path(source, sha256)
    if path.is_dir():
        model = _load_folder(path, source)
        _check_against(model, config)
        return model
    unet, first_stage, conditioner = networks_of(path, config)
    return _latent_model(unet, first_stage, conditioner, ldm_betas(config), source)


def default_weights(config: Mapping[str, Any], use_pretrained: bool, sha256: str | None) -> Path:
    model = config["model"]
    if use_pretrained:
        if (name := model.get("pretrained")) is None:
            known = ", ".join(name for name in sorted(load_registry()) if not name.startswith("ema_diffusion_"))
            raise ValueError(f"the config names no published weights (model.pretrained; there are {known}): give --ckpt PATH")
        return fetch(str(name), sha256=sha256)
    if (name := model.get("weights")) is None:
        raise ValueError("no weights: give --ckpt PATH or --use_pretrained, or name a bundled model as model.weights")
    check(name, Name(), "model.weights")
    assets = loading.ASSETS
    candidates = (assets / name, assets / f"{name}.safetensors", assets / f"{name}.ckpt")
    found = next((path for path in candidates if path.is_file() or (path / "unet" / "config.json").is_file()), None)
    if found is None:
        files = [path.stem for path in assets.glob("*.safetensors") if not path.stem.endswith("_classifier")]
        bundled = sorted([path.parents[1].name for path in assets.glob("*/unet/config.json")] + files)
        raise ValueError(f"model.weights {name!r} is no bundled model: allowed are {', '.join(bundled) or '(none)'}")
    return found


def _latent_model(
    unet: LdmUNet, first_stage: FirstStage, conditioner: Conditioner | None, betas: np.ndarray, source: str
) -> LatentModel:
    channels, size = unet.config["in_channels"], unet.config["sample_size"]
    if channels != first_stage.latent_channels:
        raise ValueError(f"{source}: the UNet has {channels} channels, the first stage's latents {first_stage.latent_channels}")
    if not size:
        raise ValueError(f"{source}: the UNet's config has no sample_size, the side of the latent")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    wanted = unet.config.get("cross_attention_dim")
    if (conditioner is None) != (wanted is None):
        raise ValueError(f"{source}: {'no' if conditioner is None else 'a'} conditioning for a UNet with contexts of {wanted}")
    if conditioner is not None and wanted != (found := _context_channels(conditioner)):
        raise ValueError(f"{source}: contexts of {found} channels, the UNet takes {wanted}")
    return LatentModel(unet, first_stage, conditioner, betas, (int(channels), int(height), int(width)), source)


def _context_channels(conditioner: Conditioner) -> int:
    if isinstance(conditioner, ClassConditioner):
        return conditioner.embedding.embedding_dim
    return int(conditioner.text_model.config.hidden_size)  # type: ignore[union-attr, arg-type]


def _load_folder(folder: Path, source: str) -> LatentModel:
    if not (folder / "unet").is_dir():
        raise ValueError(f"{source}: not the folder of a latent diffusion pipeline (no unet/ in it)")
    stage = next((folder / name for name in ("vqvae", "vae") if (folder / name).is_dir()), None)
    if stage is None:
        raise ValueError(f"{source}: not the folder of a latent diffusion pipeline (no vqvae/ or vae/ in it)")
    check_parts(folder, source, latent=True)
    scheduler = folder / "scheduler" / SCHEDULER
    if not scheduler.is_file():
        raise ValueError(f"{scheduler}: no such file, it holds the noise schedule")
    betas = scheduler_betas(scheduler, check_scheduler(scheduler, "ldm"))
    first = read_settings(stage / "config.json", NETWORK)
    channels = first.get("vq_embed_dim") or first.get("latent_channels")
    check_unet(read_settings(folder / "unet" / "config.json", NETWORK), source, channels)  # before the weights are read
    conditioner: Conditioner | None = None
    if (folder / "text_encoder").is_dir():
        conditioner = load_text_folder(folder / "text_encoder", folder / "tokenizer").eval()
    elif (folder / "class_embedder").is_dir():
        conditioner = load_class_folder(folder / "class_embedder")
    unet = load_unet_folder(folder, UNETS)
    autoencoder = load_component(stage, ("VQModel", "AutoencoderKL"))
    # Folders without the factor are from before diffusers divided by it: LDM's own, 1 with a codebook.
    default = 1.0 if isinstance(autoencoder, VQModel) else _SD_SCALE
    scale = default if first.get("scaling_factor") is None else float(first["scaling_factor"])
    autoencoder.register_to_config(scaling_factor=scale)
    return _latent_model(unet, FirstStage(autoencoder, scale), conditioner, betas, source)


def _check_against(model: LatentModel, config: Mapping[str, Any]) -> None:
    """Raise ValueError where a folder is another model than the config's."""
    with torch.device("meta"):
        expected = build_ldm_unet(config)
    kind = type(expected).__name__
    if type(model.unet).__name__ != kind:
        raise ValueError(f"{model.source}: the UNet is a {type(model.unet).__name__}, the config's a {kind}")
    for key in ("in_channels", "out_channels", "sample_size", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        found, wanted = model.unet.config.get(key), expected.config.get(key)
        if found != wanted and (not isinstance(wanted, list | tuple) or list(found or ()) != list(wanted)):
            raise ValueError(f"{model.source}: {key} is {found}, the config says {wanted}")
    betas = ldm_betas(config)
    if len(model.betas) != len(betas) or not np.allclose(model.betas, betas, rtol=1e-4, atol=0):
        raise ValueError(f"{model.source}: its noise schedule is not the config's")
    measured = config["model"]["params"].get("scale_by_std", False)  # in training: a yaml does not have it
    if not measured and not np.isclose(model.first_stage.scale, wanted := scale_factor(config), rtol=1e-4, atol=0):
        raise ValueError(f"{model.source}: scaling_factor is {model.first_stage.scale:g}, the config says {wanted:g}")


def scheduler_of(betas: np.ndarray) -> DDIMScheduler:
    """diffusers' DDIM scheduler that samples as LDM does with these variances."""
    start, end = (float(f"{value:.12g}") for value in (betas[0], betas[-1]))
    scaled = np.linspace(start**0.5, end**0.5, len(betas), dtype=np.float64) ** 2
    schedule: dict[str, Any] = {"trained_betas": betas.tolist()}
    if np.allclose(scaled, betas, rtol=1e-9, atol=0):
        schedule = {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
    return DDIMScheduler(
        num_train_timesteps=len(betas), set_alpha_to_one=False, steps_offset=1, clip_sample=False, **schedule
    )  # fmt: skip


def latent_pipeline(model: LatentModel) -> Any:
    """The model as a pipeline of diffusers, whose networks are the model's own, not copies.

    Unconditional: an LDMPipeline. Text: a StableDiffusionPipeline without a safety checker. Classes: this package's
    `ClassConditionalLDMPipeline`, since diffusers has none.
    """
    stage, conditioner = model.first_stage.model, model.conditioner
    stage.register_to_config(scaling_factor=model.first_stage.scale)
    parts: dict[str, Any] = {"unet": model.unet, "scheduler": scheduler_of(model.betas)}
    if isinstance(conditioner, TextConditioner):
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        parts |= {"vae": stage, "text_encoder": conditioner.text_model, "tokenizer": conditioner.tokenizer}
        unchecked: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **unchecked)
        # The tokenizer's files are transformers' own, so that diffusers alone loads a saved pipeline.
        pipeline.register_to_config(tokenizer=("transformers", "CLIPTokenizer"))
        return pipeline
    if isinstance(conditioner, ClassConditioner):
        from qncd.models.class_conditional import ClassConditionalLDMPipeline

        return ClassConditionalLDMPipeline(vqvae=stage, class_embedder=conditioner, **parts)
    from diffusers import LDMPipeline

    return LDMPipeline(vqvae=stage, **parts)


def save_latent_model(model: LatentModel, folder: str | Path) -> None:
    """Write the folder of `latent_pipeline(model)`; diffusers loads it without this package, unless it has a class embedding.

    Raises:
        ValueError: diffusers' config cannot describe a network of the model.
    """
    for network in (model.unet, model.first_stage.model):
        check_told(network)
    latent_pipeline(model).save_pretrained(folder)
