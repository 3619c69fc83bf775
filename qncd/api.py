"""What scripts and users call: load a pipeline, quantize it, save it and load it again, export it, run it on an engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qncd.models.loading import state_dict_hash
from qncd.models.network import network_of
from qncd.modes import DEFAULT_MODE
from qncd.progress import silent
from qncd.ptq.bits import MeanBits
from qncd.ptq.context import NO_GRADIENTS
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import CalibrationRuns, Job, Outcome, quantize_network, sample_calibration
from qncd.ptq.pipeline_calls import calls_for, checked_calls
from qncd.ptq.pipeline_runs import PipelineRuns
from qncd.ptq.runs import BareRuns
from qncd.ptq.stages.smoothing import settled
from qncd.quant.adapters import check_quantizable
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.recipe import Recipe
from qncd.sampling.pipeline import denoiser_of
from qncd.sampling.scheduler_levels import prediction_of, scheduler_settings
from qncd.saving import State, correct, network_and_state, on_engine

log = logging.getLogger("qncd")


@dataclass(frozen=True)
class LayerReport:
    """What one layer got: bits of its weights and of its input, None where they stay in floating point."""

    name: str
    weight_bits: int | None
    act_bits: int | None


@dataclass(frozen=True)
class Report:
    """What quantizing brought.

    Attributes:
        recipe: that was carried out.
        layers: what each layer got.
        left_out: what the mode asks for and could not be done here, in words.
        inputs: of the calibration set.
        found: what stages report, by their names: bits allocated, blocks reconstructed.
        bits: of weights and activations in the mean, first and last layer and softmax outputs included.
        seconds: taken.
    """

    recipe: Recipe
    layers: tuple[LayerReport, ...]
    left_out: tuple[str, ...]
    inputs: int
    found: Mapping[str, Any]
    bits: MeanBits
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.recipe.label}: {len(self.layers)} layers, {self.inputs} calibration inputs, {self.seconds:.0f} s",
            f"bits in the mean: {self.bits}",
        ]
        return "\n".join([*lines, *(f"left out: {text}" for text in self.left_out)])


def load(source: str | Path, **options: Any) -> Any:
    """A diffusers pipeline: a bundled model by its yaml, a checkpoint file, a diffusers folder or a hub id.

    Args:
        source: such as configs/scenes.yaml.
        options: `config`, `ckpt`, `use_pretrained` and `scheduler`, as for `qncd.models.pipelines.load_pipeline`.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or it is damaged.
    """
    from qncd.models.pipelines import load_pipeline

    return load_pipeline(source, **options)


def quantize(
    model: Any,
    width: str | None = None,
    mode: str = DEFAULT_MODE,
    *,
    prompts: Sequence[str] | None = None,
    calls: Sequence[Mapping[str, Any]] | None = None,
    calibration: CalibrationSet | None = None,
    steps: int | None = None,
    **options: Any,
) -> Report:
    """Quantize the denoiser of a diffusers pipeline, or a bare denoiser, in place.

    A pipeline is calibrated by calling it in full precision; afterwards its calls are quantized and corrected. The denoiser is
    put into evaluation mode.

    Args:
        model: a DiffusionPipeline, or a network such as a UNet2DModel.
        width: such as "W4A8", "FP8" or "W4A16" (weights alone); by default W8A8, or that of `recipe`.
        mode: how, a name in qncd.modes.MODES; docs/methods.md describes them.
        prompts: texts to calibrate with, taken in turn for `samples` images.
        calls: arguments of the pipeline's calls, instead of prompts: class labels, images, whatever it takes.
        calibration: inputs of the network; of a bare denoiser all that there is to calibrate with.
        steps: of the sampler, in calibration and afterwards; by default the pipeline's own number.
        options: `recipe=` a Recipe or the path of a YAML file instead of mode and width; `samples=` images to calibrate with;
            `scheduler=` of a bare denoiser, a diffusers scheduler, for methods that need a sampler; `monitor=` for progress;
            `packed=True` to keep weights as codes alone once they are rounded (`qncd.pack_weights`);
            any option of a recipe by its name (gptq=False, iterations=4000, tracking=False, ...).

    Returns:
        what each layer got, and what could not be done.

    Raises:
        ValueError: a setting that is unknown, out of range, contradicts another, or has no effect here; a model that cannot be
            quantized.
    """
    monitor, packed = options.pop("monitor", silent), options.pop("packed", False)
    scheduler = options.pop("scheduler", None)
    recipe = _recipe(options.pop("recipe", None), mode, width, options).decided(8)
    given = frozenset(options)
    module = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    check_quantizable(module)
    module.eval()
    if isinstance(model, nn.Module):
        if prompts is not None or calls is not None:
            raise ValueError("prompts and calls are for pipelines: a bare denoiser takes calibration=CalibrationSet(...)")
        if calibration is None:
            raise ValueError("a bare denoiser is calibrated with calibration=CalibrationSet(...)")
        runs, recipe, left_out = _bare_runs(model, recipe, calibration, scheduler, (steps, given))
    else:
        if scheduler is not None:
            raise ValueError("scheduler is for bare denoisers: a pipeline has its own")
        if prompts is not None and calls is not None:
            raise ValueError("prompts and calls: allowed is one of them")
        chosen = checked_calls(calls) if calls is not None else calls_for(model, prompts, recipe.calibration.samples)
        pipeline = PipelineRuns(model, chosen, recipe.calibration, steps, monitor)
        runs, left_out = pipeline, []
        recipe = recipe.with_calibration(samples=pipeline.samples)
    recipe, base_hash = settled(recipe, runs.network), state_dict_hash(runs.network.module)
    data, record = sample_calibration(runs, recipe, base_hash)
    if isinstance(runs, PipelineRuns) and runs.diffusion is None:
        recipe = _without(recipe, ("bit_allocation", "step_weights"), given, left_out, NO_GRADIENTS)
    outcome = quantize_network(runs, recipe, calibration or data, record, Job(monitor, packed=packed))
    settings: dict[str, Any] = {"times": list(runs.times), "steps": steps}
    if isinstance(runs, PipelineRuns):
        settings |= {"guidance": runs.guidance, "scheduler": scheduler_settings(model.scheduler)}
    state = State(recipe, base_hash, outcome.record, tuple(runs.times), settings)
    state.keep(runs.network.module)
    if isinstance(runs, PipelineRuns):
        correct(model, runs.network, state)
    return _report(runs, recipe, tuple(left_out), len(calibration or data), outcome)


def _recipe(given: Recipe | str | Path | None, mode: str, width: str | None, options: Mapping[str, Any]) -> Recipe:
    if given is None:
        return Recipe.of(mode, width or "W8A8", **options)
    if width is not None or options:
        raise ValueError("recipe says everything: width and other options are not allowed beside it")
    return given if isinstance(given, Recipe) else Recipe.from_yaml(Path(given))


def _bare_runs(
    module: nn.Module, recipe: Recipe, data: CalibrationSet, scheduler: Any, wanted: tuple[int | None, frozenset[str]]
) -> tuple[CalibrationRuns, Recipe, list[str]]:
    """Runs of a bare denoiser, and the recipe without what they cannot do, which is named."""
    steps, given = wanted
    network = network_of(module, prediction_of(scheduler) if scheduler is not None else None)
    runs = BareRuns(network, data, recipe.calibration, scheduler, steps)
    if scheduler is not None:
        return runs, recipe.with_calibration(samples=runs.samples), []
    if steps is not None:
        raise ValueError("steps of a bare denoiser need scheduler=, which says what they are")
    left_out: list[str] = []
    parts = ("bit_allocation", "step_weights", "correction", "offline")
    return runs, _without(recipe, parts, given, left_out, "needs a sampler: give scheduler=, a diffusers scheduler"), left_out


def _without(recipe: Recipe, parts: Sequence[str], given: frozenset[str], left_out: list[str], why: str) -> Recipe:
    """A recipe without those of some parts that nobody asked for, which `left_out` then names.

    Raises:
        ValueError: somebody asked for one.
    """
    for name in parts:
        value = getattr(recipe.quant if hasattr(recipe.quant, name) else recipe, name)
        if not value:
            continue
        asked = name if name in given else "tracking" if name == "offline" and "tracking" in given else None
        if asked:
            raise ValueError(f"{asked} {why}")
        left_out.append(f"{name.replace('_', ' ')} ({value if name == 'offline' else recipe.mode}): {why}")
        log.warning("left out %s", left_out[-1])
        recipe = recipe.without(name)
    return recipe


def _report(runs: CalibrationRuns, recipe: Recipe, left_out: tuple[str, ...], inputs: int, outcome: Outcome) -> Report:
    quantizers = act_quantizers(runs.network.module)
    layers = []
    for name, layer in quant_layers(runs.network.module).items():
        weights, act = layer.config.weight_codes, quantizers.get(f"{name}.act")
        layers.append(
            LayerReport(name, weights.bits if weights else None, act.codes.bits if act is not None and act.codes else None)
        )
    return Report(recipe, tuple(layers), left_out, inputs, outcome.found, outcome.bits, outcome.seconds)


def export(model: Any, folder: str | Path, engine: str = "onnxruntime", shape: Sequence[int] | None = None) -> Path:
    """Write the quantized denoiser for an engine to a folder; returns the file.

    Args:
        shape: (C, H, W) of the latents; by default those of calibration.

    Raises:
        ValueError: the engine is unknown, a package is missing, or a part of the network has no form in it.
    """
    from qncd.engines.engine import check_engine, engine_of
    from qncd.engines.engine import export as export_network

    network, state = network_and_state(model)
    check_engine(engine)
    if not engine_of(engine).file:
        raise ValueError(f"engine {engine} runs no file: open it with qncd.open_engine")
    settings = json.loads(json.dumps(state.settings))
    shape = None if shape is None else network.shape_of(shape)
    return export_network(network, Path(folder), state.recipe.quant, state.base_hash, settings, shape)


def export_gguf(model: Any, file: str | Path) -> Path:
    """Write the denoiser, quantized with weight_grid="gguf", as a GGUF file; returns its path.

    The file holds weights alone: what corrects predictions while sampling has no place in it.

    Args:
        model: a pipeline of Stable Diffusion 1, 2 or XL, or its UNet.

    Raises:
        ValueError: the weights are on another grid, the network is of another kind, or the package gguf is missing.
    """
    from qncd.engines.gguf import type_of, write_gguf

    network, state = network_and_state(model)
    write_gguf(network, Path(file), type_of(state.recipe.quant), state.base_hash)
    return Path(file)


def open_engine(model: Any, folder: str | Path | None, engine: str = "onnxruntime", precision: str = "fp32") -> Any:
    """The pipeline with its denoiser on an engine; of a bare denoiser, what is called in its place. `model` stays as it is.

    Args:
        folder: of `export`; None for an engine that runs no file.

    Raises:
        ValueError: the engine is unknown or not there, or the folder holds another network. FileNotFoundError: no such file.
    """
    from qncd.engines.engine import open_engine as open_network

    network, state = network_and_state(model)
    opened: Any = open_network(network, None if folder is None else Path(folder), engine, precision)
    return opened if isinstance(model, nn.Module) else on_engine(model, opened, state)
