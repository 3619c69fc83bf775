"""Small quantized networks and what they get, for the tests of everything that runs them in integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_pipelines import KINDS, made
from torch import Tensor, nn

import qncd
from qncd.models.calls import Call
from qncd.models.network import Network, network_of
from qncd.progress import Monitor, silent
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import Progress, find_ranges_
from qncd.ptq.pipeline import Job, Outcome, quantize_network
from qncd.ptq.runs import DiffusionRuns
from qncd.ptq.stages.bias_correction import correct_biases_
from qncd.ptq.stages.bit_allocation import free_quantizers
from qncd.ptq.stages.compensation import compensate_
from qncd.ptq.stages.low_rank import add_branches_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.ranges import round_
from qncd.ptq.stages.rotation import rotate_network_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.ptq.stages.smoothing_search import search_smoothing_
from qncd.quant.inspection import quant_layers, set_act_bits_
from qncd.recipe import CalibrationConfig, QuantConfig, Recipe, ReconstructionConfig, SmoothingConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions
from qncd.sampling.pipeline import denoiser_of

TIMES = [1, 251, 501, 751]
CONTEXT = "encoder_hidden_states"

WeightCorrection = Callable[[Network, CalibrationSet, int], None]


def inputs(unet: Any, count: int = 8) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    size, channels = unet.config.sample_size, unet.config.in_channels
    x = torch.randn(count, channels, size, size, generator=generator)
    given = {CONTEXT: torch.randn(count, 5, 12, generator=generator)} if "cross_attention_dim" in unet.config else {}
    return CalibrationSet(x, torch.tensor(TIMES).repeat(-(-count // 4))[:count], given)


def calibrate_with_(
    network: Network | nn.Module,
    data: CalibrationSet,
    batch_size: int = 32,
    correct: WeightCorrection | None = None,
    progress: Progress | None = None,
) -> None:
    """Ranges, one correction of the weights or none, and the switch from floating point: stages that a test chooses."""
    network = network_of(network)
    data.check_model(network)
    find_ranges_(network, data, batch_size, progress)
    if correct:
        correct(network, data, batch_size)
    round_(network)


def weight_correction(config: QuantConfig) -> WeightCorrection | None:
    """The correction that a configuration asks for."""
    return compensate_ if config.gptq else correct_biases_ if config.bias_correction else None


def quantize_diffusion_(
    diffusion: Diffusion,
    config: QuantConfig,
    data: CalibrationSet,
    smoothing: SmoothingConfig | None = None,
    batch_size: int = 32,
    reconstruction: ReconstructionConfig | None = None,
    folder: Path | None = None,
    conditions: Conditions | None = None,
    monitor: Monitor = silent,
) -> Outcome:
    """All stages on the network of a sampler, in place."""
    calibration = CalibrationConfig(batch_size=batch_size, samples=len(conditions) if conditions else 64)
    recipe = Recipe(quant=config, smoothing=smoothing, reconstruction=reconstruction, correction=None, calibration=calibration)
    return quantize_network(DiffusionRuns(diffusion, calibration, conditions), recipe, data, job=Job(monitor, folder))


def prepared(unet: Any, config: QuantConfig, stepwise: Callable[[Network, list[int]], None] | None = None) -> Any:
    network = network_of(unet)
    factors = smoothing_factors(network, TIMES, SmoothingConfig())
    quantize_(network, config)
    smooth_(network, factors)
    if stepwise:
        stepwise(network, TIMES)
    if config.bit_allocation:
        set_act_bits_(unet, {name: 4 + index % 5 for index, name in enumerate(free_quantizers(network, config))})
    if config.rotation:
        rotate_network_(network, config)
    if config.smoothing_search:
        assert any(search_smoothing_(network, inputs(unet), 8).values())
    if config.rank:
        add_branches_(network, config)
    calibrate_with_(network, inputs(unet), 8, weight_correction(config))
    return unet


def call(unet: Any, data: CalibrationSet) -> Tensor:
    """On the network's device, from and to the CPU."""
    given = {name: value.to(unet.device) for name, value in data.inputs.items()}
    with torch.no_grad():
        out: Tensor = unet(data.x.to(unet.device), data.t.to(unet.device), **given).sample.cpu()
    return out


def assert_same_in_integers(full: Any, unet: Any, engine: Any, count: int = 8) -> None:
    """What the engine gives could come of one code more or less at each input of the last layer, and lies nearer to the
    fake-quantized network than that lies to full precision: rounding errors tip ties, as they do in torch between batch sizes."""
    data = inputs(unet, count)
    exact, expected, found = call(full, data), call(unet, data), call(engine, data)
    layer = quant_layers(unet)["conv_out"]
    one_code = float(layer.act.scale.max()) * float(layer.weight.abs().flatten(1).sum(1).max())
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= one_code).float().mean() >= 0.999
    assert (found - expected).square().mean() < (0.9 * (expected - exact)).square().mean()


def called_pipeline(kind: str, width: str, mode: str, device: str = "cpu", **options: Any) -> tuple[Network, Network, Call]:
    """The network of a small pipeline in full precision, quantized, and what the pipeline calls it with."""
    pipe = made(kind).to(device)
    full = network_of(copy.deepcopy(denoiser_of(pipe)[1]))
    qncd.quantize(pipe, width, mode=mode, calls=[KINDS[kind].call] * 2, steps=2, **options)
    calls, network = list[Call](), network_of(denoiser_of(pipe)[1])
    hook = network.module.register_forward_pre_hook(lambda _, args, kw: calls.append(network.bind(args, kw)), with_kwargs=True)
    pipe(**KINDS[kind].call, num_inference_steps=2, output_type="latent")
    hook.remove()
    return full, network, calls[0]
