"""Every model that this package knows as a pipeline of diffusers: bundled ones, original checkpoints, folders and the hub."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import pipelines
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.import_utils import is_accelerate_available
from torch import nn
from transformers import PreTrainedModel

from qncd.models.class_conditional import ClassConditionalLDMPipeline
from qncd.models.configs import HUB_ID, INDEX, YAML, bundled_folder, names_pipeline
from qncd.models.files.diffusers_folders import CHECKPOINT_SUFFIXES, read_settings
from qncd.models.latent import latent_pipeline, load_latent_model
from qncd.models.loading import ddim_pipeline, load_config, load_ddim
from qncd.models.network import few
from qncd.models.schedulers import scheduler_named
from qncd.models.schema import COMPVIS, DIFFUSERS, PIPELINE, layout_of, shown
from qncd.models.single_files import SingleFile, configs_folder, find_single_file, parts_of, yaml_of

__all__ = ["load_pipeline"]

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)\b.*\.(safetensors|bin)")
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema|ema_only|fp32)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")
_LIBRARIES = ("diffusers", "transformers", "qncd")
# What loading a folder or a hub id of diffusers ends in where something is wrong with it.
_FAULTS = (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError, RuntimeError, IndexError)


def load_pipeline(
    source: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    ckpt: str | Path | None = None,
    use_pretrained: bool = False,
    scheduler: str | None = None,
) -> DiffusionPipeline:
    """A model as a pipeline of diffusers, on the CPU: call it, quantize its UNet, or save it as a folder.

    | source | pipeline |
    |---|---|
    | yaml of a DDIM model (ermongroup/ddim) | DDIMPipeline, which samples as the `ddim` convention does |
    | yaml of an unconditional latent model (CompVis) | LDMPipeline |
    | yaml of a class-conditional latent model | `ClassConditionalLDMPipeline` |
    | yaml of Stable Diffusion v1 or of another text model of that kind | StableDiffusionPipeline, no safety checker |
    | yaml of a bundled pipeline of diffusers | that pipeline |
    | a folder with model_index.json, or a hub id | whatever it names, as diffusers loads it |
    | a checkpoint file of Stable Diffusion 2 or XL, of inpainting, of velocities | that of `config`, with the file's networks |
    | a checkpoint file of Stable Diffusion v1 | as of its yaml: beside it, else configs/sd-v1-inference.yaml |

    The weights of a yaml are `ckpt`, else the published ones (`use_pretrained`), else the bundled ones that it names.
    Networks of a yaml are in float32 and eval mode, without gradients. CLIP's clean-up of prompts (curly quotes, ligatures)
    belongs to the tokenizer of a yaml's pipeline; a folder has diffusers' tokenizer, which does without.

    Args:
        source: a yaml, a diffusers folder, a hub id, a checkpoint file, or a UNet's folder together with `config`.
        config: of a checkpoint that is given as `source`: its yaml (the path, or what is in it), or a folder or hub id of
            diffusers that says how the parts of such a model are made; by default the hub id that diffusers has for it.
        ckpt: the weights, where `source` is a yaml: all that `load_ddim` and `load_latent_model` take.
        use_pretrained: where `source` is a yaml, download the published weights for it.
        scheduler: another scheduler of diffusers with the settings of the model's: DDIM, EulerDiscrete, DPMSolverMultistep, ...

    Raises:
        ValueError: weights and config do not fit, the scheduler lacks a setting of the model's, or the arguments do not go
            together; one line that says which.
        FileNotFoundError: there is no such file, or the hub does not have or give the model.
    """
    path = Path(source)
    is_yaml = path.suffix.lower() in YAML and not path.is_dir()
    file: SingleFile | None = None
    if config is not None:
        if is_yaml or ckpt is not None or use_pretrained:
            raise ValueError(
                f"{source}: config= is the yaml of a checkpoint that is the source: leave out ckpt= and use_pretrained="
            )
        if isinstance(config, Mapping) or not names_pipeline(config):
            pipe = from_config(config if isinstance(config, Mapping) else load_config(config), source, False)
        elif path.is_file():
            pipe, file = _from_file(path, config)
        else:
            raise ValueError(
                f"{source}: config={config} names a pipeline, which says how the parts of a checkpoint file are made"
            )
    elif is_yaml:
        pipe = from_config(load_config(path), ckpt, use_pretrained)
    elif ckpt is not None or use_pretrained:
        raise ValueError(f"{source}: ckpt= and use_pretrained= are for a yaml as the source, and this is none")
    elif path.is_dir():
        pipe = _from_folder(path)
    elif path.is_file():
        pipe, file = _from_file(path, None)
    elif HUB_ID.fullmatch(str(source)) and path.suffix not in CHECKPOINT_SUFFIXES:
        pipe = _from_hub(str(source))
    else:
        raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (OWNER/NAME)")
    if scheduler is not None:
        if getattr(pipe.scheduler.step, "of_qncd", False):
            own = type(pipe.scheduler).__name__
            raise ValueError(f"scheduler {scheduler}: {source} has a noise correction, which acts with its own {own} alone")
        pipe.scheduler = scheduler_named(pipe, scheduler)
    if file is not None:
        _set_prediction(pipe, file)
    return pipe


def from_config(config: Mapping[str, Any], ckpt: str | Path | None, use_pretrained: bool = False) -> DiffusionPipeline:
    """The pipeline of what is in a yaml, with the weights that `load_pipeline` says."""
    layout = layout_of(config)
    if layout is DIFFUSERS:
        if use_pretrained:
            raise ValueError(f"{config['model']['target']}: no published weights are known; its folder is --ckpt, or bundled")
        return _from_folder(Path(ckpt) if ckpt else bundled_folder(config), str(config["model"]["target"]).partition(".")[2])
    if layout is COMPVIS:
        return latent_pipeline(load_latent_model(config, ckpt, use_pretrained))
    return ddim_pipeline(load_ddim(config, ckpt, use_pretrained), config)


def _from_file(path: Path, config: str | Path | None) -> tuple[DiffusionPipeline, SingleFile | None]:
    """The pipeline of a checkpoint file, and the file where it may say how its network predicts."""
    file = find_single_file(path)
    if config is None and (file is None or file.is_original):
        return from_config(load_config(yaml_of(path)), path, False), None
    if file is None:
        raise ValueError(f"{path}: not a checkpoint of Stable Diffusion, and config={config} is for one; others need their yaml")
    folder = configs_folder(file, config)
    index = read_settings(folder / INDEX, PIPELINE)
    parts: dict[str, Any] = dict(parts_of(file, folder, index))
    if "safety_checker" in index:  # as diffusers' `from_single_file`
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    return _from_folder(folder, parts=parts), file


def _set_prediction(pipe: Any, file: SingleFile) -> None:
    """Give the scheduler what the file says about the network's predictions, and tell what is assumed."""
    settings, where = file.prediction()
    kind, folder = type(pipe.scheduler), pipe.name_or_path
    for setting in settings:
        if setting not in inspect.signature(kind.__init__).parameters:
            raise ValueError(
                f"{file.path}: asks for {setting} ({where}), which {kind.__name__} does not have: "
                "choose another scheduler, such as DDIM"
            )
    if settings:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    told = (
        f"by {where} of the file" if "prediction_type" in settings else f"as {folder} says (the file does not: else name another)"
    )
    snr = ", zero terminal SNR" if pipe.scheduler.config.get("rescale_betas_zero_snr") else ""
    logger.info("%s: %s, predicts %s %s%s", file.path, file.kind, pipe.scheduler.config.prediction_type, told, snr)


def _from_folder(folder: Path, wanted: str | None = None, parts: Mapping[str, Any] | None = None) -> DiffusionPipeline:
    """The pipeline of a folder, with `parts` in place of its own. Raises ValueError where its class is not `wanted`."""
    if not (folder / INDEX).is_file():
        what = "a network's folder, which needs its yaml: give config=PATH" if (folder / "config.json").is_file() else "none"
        raise ValueError(f"{folder}: not the folder of a pipeline (no {INDEX} in it; {what})")
    index = read_settings(folder / INDEX, PIPELINE)
    kind = index.get("_class_name")
    if kind is None:
        raise ValueError(f"{folder / INDEX}: has no _class_name, the class of the pipeline")
    if wanted not in (None, kind):
        raise ValueError(f"{folder}: a {kind}, the yaml says {wanted}")
    _check_libraries(folder / INDEX, index)
    ours = ClassConditionalLDMPipeline
    found = ours if kind == ours.__name__ else DiffusionPipeline
    _check_tokenizers(folder, index)
    try:
        loaded = {**_left_out(str(kind), index), **(parts or {})}
        loaded = {**_loading(), **_of_transformers(folder, index, loaded), **loaded}
        pipe = found.from_pretrained(str(folder), local_files_only=True, variant=_variant(folder), **loaded)
    except _MissingWeights:
        raise
    except _FAULTS as error:
        raise ValueError(f"{folder}: diffusers cannot load this {kind} ({_reason(error)})") from error
    return _checked(pipe, folder)


class _MissingWeights(ValueError):
    """A file lacks weights of its network."""


def _of_transformers(folder: Path, index: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    """The text and image encoders of a folder by name, but for those of `without`.

    Raises:
        ValueError: a weight is missing, which transformers draws at random and warns of alone.
    """
    found: dict[str, Any] = {}
    for name, value in index.items():
        kind = _class_of_transformers(value)
        if name in without or not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            continue
        part = folder / name
        loaded: Any = kind.from_pretrained(
            str(part), local_files_only=True, variant=_variant_of(part), output_loading_info=True, dtype=_loading()["dtype"]
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise _MissingWeights(f"{folder}: the weights of its {name} have no {few(missing)}")
        found[name] = model
    return found


def _check_tokenizers(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise ValueError where a tokenizer has no vocabulary: transformers makes one of nothing."""
    for name, value in index.items():
        files = set(getattr(_class_of_transformers(value), "vocab_files_names", {}).values())
        if files and not any((folder / name / file).is_file() for file in (*files, "tokenizer.json")):
            raise ValueError(f"{folder / name}: no vocabulary of a {value[1]} ({', '.join(sorted(files))}) in it")


def _class_of_transformers(value: Any) -> Any:
    """The class that an entry of a pipeline's index names in transformers; None for another one."""
    return getattr(transformers, str(value[1]), None) if _library_of(value) == "transformers" else None


def _library_of(value: Any) -> Any:
    """The library in an entry of a pipeline's index, [library, class]; None where it names none."""
    return value[0] if isinstance(value, list) and len(value) == 2 else None


def _checked(pipe: DiffusionPipeline, source: str | Path) -> DiffusionPipeline:
    """The pipeline. Raises ValueError where a weight is missing, which diffusers says nothing of, or is NaN or infinite."""
    for part, network in pipe.components.items():
        for name, weight in network.named_parameters() if isinstance(network, nn.Module) else ():
            if weight.is_meta:
                raise ValueError(f"{source}: the weights of its {part} have no {name}")
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{source}: in its {part}, {name} holds NaN or infinity")
    levels = getattr(pipe.scheduler, "alphas_cumprod", None)
    if levels is not None and not bool(torch.isfinite(torch.as_tensor(levels)).all()):
        raise ValueError(f"{source}: the noise levels of its {type(pipe.scheduler).__name__} hold NaN or infinity")
    return pipe


def _left_out(kind: str, index: Mapping[str, Any]) -> dict[str, None]:
    """Parts that a folder does without and its pipeline can, which diffusers wants to be told: SD3's third text encoder."""
    parts = ("text_encoder_3", "tokenizer_3") if kind.startswith("StableDiffusion3") else ()
    return {name: None for name in parts if not any(index.get(name) or ())}


def _loading() -> dict[str, Any]:
    """Float32 for all: by themselves transformers' models come as they are stored and diffusers' in float32."""
    return {"dtype": torch.float32, "low_cpu_mem_usage": is_accelerate_available()}


def _variant(folder: Path) -> str | None:
    """The variant of a folder's weights (fp16), where a component has no other; None else."""
    return next(filter(None, map(_variant_of, sorted(path for path in folder.iterdir() if path.is_dir()))), None)


def _variant_of(part: Path) -> str | None:
    """The variant of a component's weights, where it has no other; None else."""
    weights = [path.name for path in part.iterdir() if _WEIGHTS.fullmatch(path.name)] if part.is_dir() else []
    variants = sorted({match.group(1) for name in weights if (match := _VARIANT.search(name))})
    return variants[0] if variants and all(_VARIANT.search(name) for name in weights) else None


def _check_libraries(path: Path, index: Mapping[str, Any]) -> None:
    """Raise ValueError where a component's class is of another library, or of a file of the folder: diffusers would import it."""
    for name, value in index.items():
        library = _library_of(value)
        known = str(library).partition(".")[0] in _LIBRARIES or hasattr(pipelines, str(library))
        if library is None or (known and not (path.parent / name / f"{library}.py").exists()):
            continue
        raise ValueError(f"{path}: {name} {shown(library)}: allowed are classes of {', '.join(_LIBRARIES)}; no other code is run")


def _from_hub(name: str) -> DiffusionPipeline:
    """The pipeline of what the hub gives, looked at as any folder is."""
    try:
        folder = DiffusionPipeline.download(name)
    except _FAULTS as error:
        raise FileNotFoundError(
            f"{name}: no such path here, and not to be had from the hub ({_reason(error)}): download its folder and name that"
        ) from error
    return _from_folder(Path(folder))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
