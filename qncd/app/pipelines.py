"""Runs of the sampling commands on pipelines of diffusers: flags become arguments of the pipeline's own call, or are refused."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from qncd.app import adapters, job, messages
from qncd.app import parser as cli
from qncd.app.pictures import picture_hashes, pictures
from qncd.distributed import Processes
from qncd.io.files import first_line
from qncd.io.images import to_uint8
from qncd.io.runs import Run
from qncd.models.configs import HUB_ID, INDEX, names_pipeline
from qncd.models.files.diffusers_folders import CHECKPOINT_SUFFIXES
from qncd.models.files.registry import check_sha256
from qncd.models.loading import load_config, state_dict_hash
from qncd.models.pipelines import load_pipeline
from qncd.models.safety import image_finisher
from qncd.models.schema import DIFFUSERS, layout_of
from qncd.models.single_files import is_pipeline_file
from qncd.ptq.stages.smoothing import settled
from qncd.recipe import Recipe
from qncd.sampling.correctors.registry import kind_of
from qncd.sampling.pipeline import PipelineSampler, Row, denoiser_of, parameters_of
from qncd.saving import state_of

log = logging.getLogger("qncd")
# Arguments of a call that other flags give, or that decide what comes back.
RESERVED = (
    "prompt", "class_labels", "batch_size", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt",
    "callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "self", "image", "mask_image",
    "ip_adapter_image", "ip_adapter_image_embeds",
)  # fmt: skip
CONTROL = "control_image"  # what some pipelines call the image that --image gives
TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")


def is_pipeline(source: str | None, config: Path | None = None) -> bool:
    """Whether a checkpoint flag names a pipeline of diffusers: a folder with model_index.json, a hub id, or a single file.

    A single file is one where --config names a pipeline too, and without --config where only a pipeline samples its model.

    Raises:
        ValueError: the file is damaged, or a part of a model.
    """
    if source is None:
        return False
    path = Path(source)
    if path.is_file():
        return names_pipeline(config) if config is not None else is_pipeline_file(path)
    if path.exists():
        return (path / INDEX).is_file()
    return HUB_ID.fullmatch(source) is not None and path.suffix not in CHECKPOINT_SUFFIXES


# In a yaml's section sampling.
RECOMMENDED = {"num_inference_steps": "timesteps", "guidance_scale": "scale", "max_sequence_length": "max_sequence_length"}


def pipeline_config(path: Path | None) -> dict[str, Any] | None:
    """The yaml of a pipeline of diffusers; None where a yaml is of an original model, or there is none."""
    config = load_config(path) if path is not None and not names_pipeline(path) else {}
    return config if layout_of(config) is DIFFUSERS else None


def means_pipeline(args: argparse.Namespace) -> bool:
    """Whether --config or --ckpt names a pipeline of diffusers."""
    return pipeline_config(args.config) is not None or is_pipeline(args.ckpt, args.config)


@dataclass(frozen=True)
class Request:
    """What a command asks of a pipeline.

    Attributes:
        arguments: of the call by name, each with the flag that gives it; those of None are the pipeline's own.
        refused: flags of original models that are given, and why no pipeline does what they say.
        scheduler: the name of another scheduler than the pipeline's own.
        count: images.
        seed_of: the seed of image i.
        batch_size: images at a time.
        output: folder.
        rows: of images by their indices, for a pipeline, and of the calibration trajectories; None where it takes none.
        describe: writes what belongs beside the images.
        columns: of the contact sheet.
        grid: whether there is one.
        settings: further ones for run.json.
        finish: safety checker and watermark.
    """

    arguments: Mapping[str, tuple[str, Any]]
    refused: Mapping[str, str]
    scheduler: str | None
    count: int
    seed_of: Callable[[int], int]
    batch_size: int
    output: Path
    rows: Callable[[Any, int], Rows | None]
    describe: Callable[[Run, job.ImagePlan], None] = lambda run, plan: None
    columns: int = 8
    grid: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    finish: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class Rows:
    """What images are conditioned on: of image i, and of all calibration trajectories."""

    of_image: Callable[[int], Row]
    calibration: Sequence[Row]

    def plus(self, further: Callable[[int], Row]) -> Rows:
        """The same with further arguments of image, or calibration trajectory, i."""
        calibration = [{**row, **further(i)} for i, row in enumerate(self.calibration)]
        return Rows(lambda i: {**self.of_image(i), **further(i)}, calibration)


def recommended(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a pipeline's calls that its yaml recommends."""
    section = (config or {}).get("sampling") or {}
    return {argument: section[key] for argument, key in RECOMMENDED.items() if key in section}


def _arguments(args: argparse.Namespace, request: Request, pipe: Any) -> dict[str, Any]:
    """The arguments of every call. Raises ValueError for a flag that this pipeline cannot honour."""
    name, parameters = type(pipe).__name__, parameters_of(pipe)
    for flag, reason in request.refused.items():
        raise ValueError(f"--{flag}: {reason}")
    found = recommended(pipeline_config(getattr(args, "config", None)))
    for argument, (flag, value) in request.arguments.items():
        if value is None:
            continue
        if argument not in parameters:
            raise ValueError(f"--{flag} {value}: {name} takes no {argument}")
        if argument == "eta" and value and "eta" not in inspect.signature(type(pipe.scheduler).step).parameters:
            raise ValueError(f"--{flag} {value}: {type(pipe.scheduler).__name__} has no eta; allowed is 0, or --scheduler DDIM")
        found[argument] = value
    for text in args.argument:
        argument, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--argument {text}: expected NAME=VALUE")
        if argument in RESERVED or argument not in parameters:
            allowed = ", ".join(key for key in parameters if key not in RESERVED and parameters[key].kind.name != "VAR_KEYWORD")
            raise ValueError(f"--argument {text}: allowed with {name} are {allowed}")
        try:
            found[argument] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--argument {text}: not a value in YAML ({first_line(error)})") from None
    return found


def _with_texts(call: dict[str, Any], rows: Rows | None) -> Rows | None:
    """The rows with the further texts of a call (a negative prompt): pipelines take one for each image, as they do prompts."""
    texts = {name: call.pop(name) for name in TEXTS if isinstance(call.get(name), str)}
    return rows.plus(lambda i: texts) if texts and rows is not None else rows


def _with_images(args: argparse.Namespace, pipe: Any, rows: Rows | None) -> Rows | None:
    """The rows with the images of --image and --mask_image in turn."""
    parameters = parameters_of(pipe)
    only_control = "image" not in parameters and CONTROL in parameters
    given = {CONTROL if only_control else "image": args.image, "mask_image": args.mask_image}
    found = {name: pictures(path, "image" if name == CONTROL else name) for name, path in given.items()}
    for name, images in found.items():
        flag = "image" if name == CONTROL else name
        if images and name not in parameters:
            raise ValueError(f"--{flag}: {type(pipe).__name__} takes none")
        needed = name in ("mask_image", CONTROL) or "strength" in parameters or _controlled(pipe)
        if not images and name in parameters and needed:
            raise ValueError(f"{type(pipe).__name__} needs --{flag}")
    if not any(found.values()):
        return rows
    if rows is None:
        raise ValueError(f"--image: {type(pipe).__name__} makes images of nothing else than seeds")
    return rows.plus(lambda i: {name: images[i % len(images)] for name, images in found.items() if images})


def _controlled(pipe: Any) -> bool:
    return getattr(pipe, "controlnet", None) is not None


def _check_required(pipe: Any, given: set[str]) -> None:
    """Raise ValueError where a call needs an argument that no flag gives."""
    for name, parameter in parameters_of(pipe).items():
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if needed and name != "self" and name not in given:
            raise ValueError(
                f"{type(pipe).__name__} needs {name}, which this command cannot give: sample it from Python (qncd.quantize)"
            )


def load(args: argparse.Namespace, request: Request, device: str) -> Any:
    """The pipeline of --ckpt with the scheduler and the adapters that are asked for, on `device`, ready to be called."""
    config = pipeline_config(args.config)
    taken = ("config", "sha256") if args.ckpt and Path(args.ckpt).is_file() else ("config",) if config else ()
    for flag in ("config", "use_pretrained", "sha256", "cali_data_path", "sequence"):
        if getattr(args, flag, None) and flag not in taken:
            raise ValueError(f"--{flag}: allowed with original checkpoints; {source_name(args)} is a pipeline of diffusers")
    if args.sha256:
        check_sha256(Path(args.ckpt), args.sha256)
    pipe = opened(args, config is not None, request.scheduler)
    if "num_frames" in parameters_of(pipe):
        raise ValueError(f"{type(pipe).__name__} makes videos, which no command saves: sample it from Python (qncd.quantize)")
    adapters.take_in(args, pipe)
    pipe = pipe.to(device)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def opened(args: argparse.Namespace, of_yaml: bool, scheduler: str | None = None) -> Any:
    """The pipeline that --config and --ckpt name.

    Args:
        of_yaml: --config is the yaml of a pipeline (`pipeline_config`).
        scheduler: the name of another one than its own.
    """
    messages.hide_loading_bars()
    if of_yaml:
        return load_pipeline(args.config, ckpt=args.ckpt, use_pretrained=args.use_pretrained, scheduler=scheduler)
    return load_pipeline(args.ckpt, config=args.config, scheduler=scheduler)


def source_name(args: argparse.Namespace) -> str:
    """What the flags call the pipeline."""
    return str(args.ckpt or args.config)


def check_takes(pipe: Any, argument: str, what: str, instead: str) -> None:
    """Raise ValueError where a pipeline does not take what a command's images are made of."""
    if argument not in parameters_of(pipe):
        raise ValueError(f"{type(pipe).__name__} takes no {what}: {instead} samples it")


def class_labels(pipe: Any) -> list[int] | None:
    """The classes that a pipeline draws, without the one that stands for none; None where it takes no class labels.

    Raises:
        ValueError: it takes some, and how many there are is not known.
    """
    if "class_labels" not in parameters_of(pipe):
        return None
    module: Any = denoiser_of(pipe)[1]
    embedder, config = getattr(pipe, "class_embedder", None), module.config
    if named := getattr(pipe, "labels", None):  # DiTPipeline: words -> class
        count = len(set(named.values()))
    elif embedder is not None:
        count = embedder.n_classes - 1
    else:
        count = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if not count:
        raise ValueError(f"{type(pipe).__name__}: how many classes there are is not known")
    return list(range(count))


def default_lane(pipe: Any, height: int) -> int:
    """Images in every call by what the network sees: those of latents of 16x16 are as many as of images of 64x64."""
    return 16 if height <= 16 or (height <= 64 and not hasattr(pipe, "vae")) else 4 if height <= 64 else 2


def sample(request: Request, args: argparse.Namespace, recipe: Recipe | None, processes: Processes) -> None:
    """The run, in each of the processes."""
    from qncd.app import quantizing

    quantizing.check_engine_arguments(args, recipe)
    device = str(processes.device)
    finish = image_finisher(*request.finish, device)
    pipe = load(args, request, device)
    state = state_of(pipe)
    if state is not None:
        if recipe is not None:
            raise ValueError(f"{source_name(args)}: is quantized already: sample it without --ptq")
        quantizing.check_engine_arguments(args, state.recipe)
    call = {**_arguments(args, request, pipe), **adapters.guiding_images(args)}
    rows = _with_texts(call, _with_images(args, pipe, request.rows(pipe, recipe.calibration.samples if recipe else 0)))
    given = set(call) | (set(rows.of_image(0)) if rows else {"batch_size"})
    _check_required(pipe, given)
    kind = kind_of(recipe) if recipe else None
    precision = getattr(args, "precision", "full")
    sampler = PipelineSampler(pipe, call, 1, bool(kind and kind.calls_network), precision)
    sampler = dataclasses.replace(sampler, lane=args.lane or default_lane(pipe, max(sampler.shape[1:])))
    if recipe is not None:
        batch_size = cli.default_calibration_batch(4 * max(sampler.shape[1:]))
        recipe = settled(recipe.decided(batch_size, sampler.step_count), sampler.network)
    factor = int(getattr(pipe, "vae_scale_factor", 1))
    model_hash = state_dict_hash(sampler.network.module)
    own = denoiser_of(pipe)[0]
    hashes = {
        name: state_dict_hash(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and name != own
    }
    settings = {
        "model": model_hash,
        "components": hashes,
        "seed": args.seed,
        "lane": sampler.lane,
        "sampler": sampler.settings,
        "precision": precision,
        "pictures": picture_hashes(args),
        **adapters.settings_of(args),
        "texts": {name: value for name, value in (rows.of_image(0) if rows else {}).items() if name in TEXTS},
        "finish": list(request.finish),
        **request.settings,
    }
    needed = 12 * request.count * sampler.shape[1] * sampler.shape[2] * factor**2
    conditions = list(rows.calibration) if rows else None
    task = job.Task(sampler, state.base_hash if state else model_hash, recipe, conditions, state=state)
    run = processes.first(lambda: job.open_folder(args, task, request.output, settings, request.batch_size, needed))
    kinds = type(pipe).__name__, type(pipe.scheduler).__name__
    log.info("model: %s (%s, %s), %d steps", source_name(args), *kinds, sampler.step_count)

    def of_images(indices: Sequence[int]) -> list[Row]:
        assert rows is not None
        return [rows.of_image(i) for i in indices]

    plan = job.ImagePlan(
        request.count, request.seed_of, of_images if rows else None, lambda images: finish(to_uint8(images)), request.columns
    )
    if processes.is_first:
        request.describe(run, plan)
    job.SamplingJob(run, plan, request.batch_size, processes).sample_and_finish(args, task, request.grid)
