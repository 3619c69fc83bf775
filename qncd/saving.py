"""Quantized pipelines in folders: written so that diffusers loads them quantized, and read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from qncd.io.files import read_json, whole_folder, write_json
from qncd.models.configs import INDEX
from qncd.models.files.diffusers_folders import check_replaceable
from qncd.models.loading import state_dict_hash
from qncd.models.network import Network, network_of
from qncd.ptq.checkpoint import BARE_FILE, QuantizedInfo, content_of, load_quantized_, peek_quantized, places_in, save_quantized
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.ranges import round_
from qncd.quant.adapters import check_no_adapters, check_quantizable
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer
from qncd.recipe import CalibrationConfig, QuantConfig, Recipe
from qncd.sampling.corrector import Record
from qncd.sampling.correctors.registry import corrector_of, kind_of
from qncd.sampling.pipeline import denoiser_of, with_denoiser
from qncd.sampling.scheduler import Fitted, PipelineCorrection, attach
from qncd.sampling.scheduler_levels import prediction_of, scheduler_settings

IP_ADAPTER = "ip_image_proj"  # encoder_hid_dim_type of a network with one
WITH_IP_ADAPTER = (
    "the pipeline has an IP-Adapter, which folders of diffusers do not hold: qncd.save(pipe.unet, folder), and "
    "qncd.load_quantized into a pipeline after load_ip_adapter"
)
_CORRECTED = ["qncd.corrected", "CorrectedScheduler"]


@dataclass
class State:
    """What a quantized network remembers, for `save` and `open_engine`; an attribute of its module."""

    recipe: Recipe
    base_hash: str
    record: Record | None
    times: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def keep(self, module: nn.Module) -> None:
        """Let a module remember it, and let diffusers save the module quantized."""
        object.__setattr__(module, "_qncd", self)
        if isinstance(module, ModelMixin):
            from qncd.diffusers_quantizer import QNCDQuantizer

            module.__dict__.pop("save_pretrained", None)
            QNCDQuantizer.attach(module, self.recipe.to_json())

    @property
    def fitted(self) -> Fitted:
        """What the correction was fitted for."""
        return Fitted() if self.record is None else Fitted(self.times, self.settings.get("guidance"))

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise ValueError where the correction was fitted with another scheduler, or one set otherwise."""
        if self.record is None or "scheduler" not in self.settings:
            return
        was, given = self.settings["scheduler"], scheduler_settings(scheduler)
        differing = [name for name in was.keys() & given.keys() if was[name] != given[name]]
        if differing:
            told = "; ".join(f"{name} {was[name]}, not {given[name]}" for name in sorted(differing))
            raise ValueError(f"the noise correction was fitted with another scheduler ({told}): give the pipeline that one")

    @classmethod
    def read(cls, info: QuantizedInfo, path: Path) -> State:
        """Of a checkpoint. Raises ValueError where an older version wrote it."""
        if "recipe" not in info.settings:
            raise ValueError(f"{path}: has no recipe: written by an older version; pass it to a script with --cali_ckpt")
        recipe = Recipe.from_json(info.settings["recipe"])
        kind = kind_of(recipe)
        record = info.records.get(kind.prefix) if kind else None
        return cls(recipe, info.base_hash, record, tuple(info.settings.get("times", ())), dict(info.settings))


def state_of(pipe: Any) -> State | None:
    """What a pipeline's denoiser remembers; None where it is not quantized."""
    state = getattr(denoiser_of(pipe)[1], "_qncd", None)
    return state if isinstance(state, State) else None


def network_and_state(model: Any) -> tuple[Network, State]:
    """The denoiser of a quantized pipeline, or a quantized denoiser, and what it remembers.

    Raises:
        ValueError: it is not quantized, or has adapters beside its layers.
    """
    module = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    state = getattr(module, "_qncd", None)
    if not isinstance(state, State):
        raise ValueError(f"{type(module).__name__}: not quantized by qncd.quantize or qncd.load_quantized")
    check_no_adapters(module, "unload_lora_weights() first: files and engines hold the quantized network alone")
    return network_of(module), state


def correct(pipe: Any, network: Network, state: State) -> None:
    """Let the correction of a recipe act in the pipeline."""
    kind, corrector = kind_of(state.recipe), corrector_of(state.recipe, state.record)
    if kind is None or corrector is None:
        return
    if waiting := getattr(network.module, "_qncd_waiting", None):
        waiting.remove()
    attach(pipe, PipelineCorrection.of(network, corrector, kind.calls_network, state.fitted))


def on_engine(pipe: Any, opened: nn.Module, state: State) -> Any:
    """A quantized pipeline with its denoiser on an engine, corrected as it is; `pipe` stays as it is."""
    fast = with_denoiser(pipe, opened)
    object.__setattr__(fast, "scheduler", type(pipe.scheduler).from_config(pipe.scheduler.config))
    correct(fast, network_of(opened), state)
    return fast


def save(model: Any, folder: str | Path) -> Path:
    """Write a quantized pipeline (or denoiser) to a folder, which appears whole or not at all; returns it.

    `DiffusionPipeline.from_pretrained(folder)` loads the pipeline quantized and corrected once `qncd` is imported, and
    `push_to_hub` takes the folder as it is. `load_quantized` puts its codes into a full-precision pipeline.

    Raises:
        ValueError: the model is not quantized, or is a pipeline with an IP-Adapter, or the folder holds something else.
        OSError: the folder can't be written.
    """
    network, state = network_and_state(model)
    folder = Path(folder)
    bare = isinstance(model, nn.Module)
    if not bare and getattr(network.config, "encoder_hid_dim_type", None) == IP_ADAPTER:
        raise ValueError(WITH_IP_ADAPTER)
    of_diffusers = not bare or isinstance(model, ModelMixin)
    check_replaceable(folder, INDEX if not bare else "config.json" if of_diffusers else BARE_FILE)
    with whole_folder(folder) as part:
        if of_diffusers:
            model.save_pretrained(part, safe_serialization=True)
        else:
            save_quantized(network, part / BARE_FILE, state.recipe.quant, state.base_hash, _settings(state), state.record)
        if not bare and kind_of(state.recipe) is not None:
            write_json(part / INDEX, {**read_json(part / INDEX), "scheduler": _CORRECTED})
    return folder


def _settings(state: State) -> dict[str, Any]:
    return {**state.settings, "recipe": state.recipe.to_json()}


def written(module: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a quantized network's file, and its header."""
    network, state = network_and_state(module)
    settings = json.loads(json.dumps(_settings(state)))
    tensors, header = content_of(network, state.recipe.quant, state.base_hash, settings, state.record)
    return {name: value.contiguous() for name, value in tensors.items()}, header


def _file_in(folder: Path, model: Any) -> Path:
    """The quantized network in what `save` or --cali_ckpt wrote."""
    if folder.suffix == ".safetensors":
        return folder
    places = places_in(folder, *(() if isinstance(model, nn.Module) else (denoiser_of(model)[0],)))
    return next((place for place in places if place.is_file()), places[0])


def load_quantized(model: Any, folder: str | Path) -> Recipe:
    """Turn a full-precision pipeline (or denoiser) into the one that `save` wrote, in place; returns its recipe.

    Args:
        folder: of `save`, or a quantized checkpoint that a script wrote with --cali_ckpt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off or of another kind, or was made from another base model. The model is then as before.
    """
    path = _file_in(Path(folder), model)
    module = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    check_quantizable(module)
    scheduler = getattr(model, "scheduler", None)
    network = network_of(module, prediction_of(scheduler) if scheduler is not None else None)
    state = State.read(peek_quantized(path), path)
    if scheduler is not None:
        state.check_scheduler(scheduler)
    load_quantized_(network, path, state_dict_hash(module))
    state.keep(module)
    if not isinstance(model, nn.Module):
        correct(model, network, state)
    return state.recipe


def pack_weights(model: Any) -> None:
    """Keep the weights of a quantized pipeline (or denoiser) as codes alone, in place: one byte each, half of one up to 4 bits.

    Every call makes each layer's float weight anew, the same numbers, which takes a little longer; outputs stay the same bits.
    A network that diffusers loads quantized is packed already.

    Raises:
        ValueError: nothing is quantized.
    """
    for layer in _layers_of(model):
        layer.pack_weight_()


def unpack_weights(model: Any) -> None:
    """The inverse of `pack_weights`: float weights stand beside the codes again, which takes more memory and saves time."""
    for layer in _layers_of(model):
        layer.unpack_weight_()


def _layers_of(model: Any) -> list[QuantLayer]:
    module = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    layers = list(quant_layers(module).values())
    if not layers:
        raise ValueError(f"{type(module).__name__}: has no quantized layer")
    return layers


def read_quantized(module: Any, path: Path) -> None:
    """Turn a network that has no weights yet into the one of a file, in place, packed: what diffusers' loading ends with.

    Raises:
        ValueError: the file holds another network.
    """
    from qncd.corrected_scheduler import Waiting

    materialize_(module)
    network = network_of(module)
    state = State.read(load_quantized_(network, path, packed=True), path)
    state.keep(module)
    kind, corrector = kind_of(state.recipe), corrector_of(state.recipe, state.record)
    if kind is not None and corrector is not None:
        object.__setattr__(module, "_qncd_waiting", Waiting(module, corrector, state.fitted, kind.calls_network))


def materialize_(module: nn.Module) -> None:
    """Give zeros to what has shapes alone: one for each parameter, which takes no memory and is replaced, not written to."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                setattr(part, name, nn.Parameter(zeros, requires_grad=False))
            else:
                parameter.requires_grad_(False)


def quantize_at_once(module: Any, quant: QuantConfig) -> None:
    """Round a network's weights to the nearest codes, in place, and its activations where their scales are found at run time.

    The codes alone are kept.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    base_hash = state_dict_hash(module)
    round_(quantize_(network_of(module), quant), packed=True)
    recipe = Recipe(mode="linear", quant=quant, smoothing=None, correction=None, calibration=CalibrationConfig())
    State(recipe, base_hash, None).keep(module)
