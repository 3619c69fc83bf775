"""Mixed precision: each activation gets its own number of bits, the configured one in the mean (not in the paper).

What rounding an activation a does to the sample x_0 is, to first order, its error d_t at every step t times the derivative of
the sample by it. With v a vector of random signs,

    e = sum over t of < d(v . x_0) / d a_t, d_t >,    E[e^2] = squared error of the sample.

One back-propagation through the whole run of the sampler gives e for every activation, at as many widths as there are. Steps
add up before the square: an error that points the same way at all of them counts as that, one that later steps undo does not,
and guidance weighs its two halves as it does. The error of single noise predictions knows nothing of this.

Widths are then given out where a bit saves most of the error for the multiplications that it widens.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.network import Network, network_of
from qncd.ptq.backpropagation import probe_samples
from qncd.ptq.bits import counting_multiplications
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.edges import edge_layers
from qncd.ptq.observing import Progress, hooked, named, observe_
from qncd.quant.inspection import act_quantizers, set_act_bits_
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.quant.stepwise import StepwiseActQuantizer
from qncd.recipe import WIDEST, QuantConfig, Recipe
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions

INPUTS = 160  # of the calibration set that ranges are found over
SAMPLES = 32  # runs of the sampler at most; no more than the calibration set has trajectories
PROBES = 2  # vectors v for each
NARROWER = 2  # bits below `act_bits` that the narrowest may have, and never fewer than 2
SEED_BASE = 1 << 42  # far from the seeds of calibration and tracking

Trials = Mapping[str, Mapping[int, ActQuantizer]]  # by name and width


def allocate_bits_(
    diffusion: Diffusion,
    config: QuantConfig,
    data: CalibrationSet,
    conditions: Conditions | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Give every activation quantizer its width, in place. Returns the widths by quantizer.

    Takes at most SAMPLES * PROBES runs of the sampler with back-propagation, `batch_size` samples at a time, and memory for the
    activations of one step of them.

    Args:
        diffusion: its network prepared by `quantize_`, stepwise or not, nothing calibrated yet.
        config: with `bit_allocation`.
        data: calibration inputs, for the ranges.
        conditions: of calibration trajectories, where the network takes some.

    Raises:
        ValueError: an activation or what it does to the samples is NaN or infinite; the quantizer is named.
        FloatingPointError: a sample is NaN or infinite.
    """
    assert config.act_bits is not None
    widths = range(max(2, config.act_bits - NARROWER), WIDEST + 1)
    trials = _trials(diffusion.network, config, data.spread(INPUTS), widths, batch_size)
    samples = min(SAMPLES, len(data) // len(data.t.unique()))
    errors, multiplications = sample_errors(diffusion, trials, conditions, batch_size, samples, PROBES, progress)
    for name, by_width in errors.items():
        if not all(bool(torch.isfinite(error).all()) for error in by_width.values()):
            raise ValueError(f"{name}: what its rounding does to the samples is NaN or infinite")
    bits = best_widths(shares_of_loss(errors, config.act_bits), multiplications, config.act_bits)
    set_act_bits_(diffusion.network.module, bits)
    return bits


def free_quantizers(network: Network, config: QuantConfig) -> dict[str, ActQuantizer]:
    """Those that have `act_bits`: none with other bits (edge layers, q, k, v, softmax outputs), no range known from elsewhere."""
    set_apart = {f"{name}.act" for name in edge_layers(network)} if config.edge_bits is not None else set()
    operands = ("softmax",) if config.attention_bits is None else ("q", "k", "v", "softmax")
    return {
        name: quantizer
        for name, quantizer in act_quantizers(network.module).items()
        if name not in set_apart
        and name.rpartition(".")[2] not in operands
        and not (isinstance(quantizer, StepwiseActQuantizer) and quantizer.fixed)
    }


def _trials(network: Network, config: QuantConfig, data: CalibrationSet, widths: Sequence[int], batch_size: int) -> Trials:
    """Calibrated copies of the free quantizers, for each width; the network is left as it was."""
    free = free_quantizers(network, config)
    trials: dict[str, dict[int, ActQuantizer]] = {}
    for name, quantizer in observe_(network, data, batch_size).items():
        if name in free:
            trials[name] = {width: _trial(name, quantizer, width) for width in widths}
        quantizer.observers = []
    return trials


def _trial(name: str, quantizer: ActQuantizer, width: int) -> ActQuantizer:
    trial = copy.deepcopy(quantizer)
    trial.set_bits(width)
    named(name, trial.finish_observing)
    trial.set_stage(Stage.QUANTIZE)
    return trial


def sample_errors(
    diffusion: Diffusion,
    trials: Trials,
    conditions: Conditions | None = None,
    batch_size: int = 32,
    samples: int = 32,
    probes: int = 2,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[int, Tensor]], dict[str, int]]:
    """What each quantizer alone does to samples, by first order, and how many multiplications take what it gives.

    Args:
        diffusion: with the network in floating point.
        trials: calibrated quantizers to try in the place of those of the same names.
        conditions: are used in turn, as many as there are.
        samples: seeds that are sampled.
        probes: random directions v for each.

    Returns:
        e, (samples * probes,) float64, by name and width: the mean of e^2 is the squared error of the sample, summed over its
        elements; and multiplications of one input of the network by name.
    """
    module, device = diffusion.network.module, diffusion.network.device
    size = min(batch_size, diffusion.lane)
    small = dataclasses.replace(diffusion, lane=size)
    found: dict[str, dict[int, list[Tensor]]] = {name: {width: [] for width in trials[name]} for name in trials}
    counts: dict[str, int] = {}

    @contextmanager
    def watching(count: int) -> Iterator[None]:
        sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(size, dtype=torch.float64, device=device))
        with counting_multiplications(module, counts), _watching(module, trials, sums, size):
            yield
        for name, by_width in found.items():
            for width, parts in by_width.items():
                parts.append(sums[name, width][:count].cpu())

    probe_samples(small, conditions, (samples, probes), SEED_BASE, watching, progress=progress)
    errors = {name: {width: torch.cat(parts) for width, parts in by_width.items()} for name, by_width in found.items()}
    return errors, {name: counts[name] for name in trials}


def shares_of_loss(errors: Mapping[str, Mapping[int, Tensor]], uniform: int) -> dict[str, dict[int, float]]:
    """Squared errors as parts of what each sample loses at one width for all, in the mean over the samples.

    So the few samples that lose most do not decide for all.

    Args:
        errors: (N,) of each sample, by name and width.
        uniform: the width for all.
    """
    lost = torch.stack([by_width[uniform].square() for by_width in errors.values()]).sum(0).clamp(min=1e-30)
    return {
        name: {width: float((error.square() / lost).mean()) for width, error in by_width.items()}
        for name, by_width in errors.items()
    }


@contextmanager
def _watching(module: nn.Module, trials: Trials, sums: dict[tuple[str, int], Tensor], lane: int) -> Iterator[None]:
    """While gradients flow, add <gradient, rounding error> of each sample (lane,) to `sums`."""

    network, batch = network_of(module), 0  # samples in the network's call

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal batch
        batch = len(network.bind(args, kwargs).x)

    def watch(name: str) -> Callable[[ActQuantizer, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(quantizer: ActQuantizer, _: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # a checkpoint's first pass
                return None
            # A tensor of its own: layers that share an input would see the sum of their gradients.
            own = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
            x, step = out.detach(), quantizer.rows if isinstance(quantizer, StepwiseActQuantizer) else None

            def add(gradient: Tensor) -> None:
                for width, trial in trials[name].items():
                    if isinstance(trial, StepwiseActQuantizer) and step is not None:
                        trial.select(step)
                    products = ((trial(x) - x) * gradient).reshape(batch, -1).sum(1).double()  # rows may be single tokens
                    sums[name, width] += products.view(-1, lane).sum(0)  # with guidance both halves are the same samples

            own.register_hook(add)
            return own

        return hook

    quantizers = act_quantizers(module)
    handles = [quantizers[name].register_forward_hook(watch(name)) for name in trials]
    with hooked([*handles, module.register_forward_pre_hook(count, with_kwargs=True)]):
        yield


def best_widths(errors: Mapping[str, Mapping[int, float]], costs: Mapping[str, int], mean: float) -> dict[str, int]:
    """Widths of least total error whose mean, weighted by `costs`, is at most `mean`.

    Every quantizer starts at its narrowest; steps to wider ones are taken in the order of what they save for their cost, along
    the lower convex hull of each one's errors (the optimum, but for the last step that fits).

    Args:
        errors: by name and width.
        costs: by name, above 0.
    """
    steps = []
    for name, by_width in errors.items():
        hull = _hull(by_width)
        for (narrow, high), (wide, low) in itertools.pairwise(hull):
            steps.append(((high - low) / (costs[name] * (wide - narrow)), name, narrow, wide))
    steps.sort(key=lambda step: -step[0])
    chosen = {name: min(by_width) for name, by_width in errors.items()}
    room = sum(costs[name] * (mean - width) for name, width in chosen.items())
    for _, name, narrow, wide in steps:
        cost = costs[name] * (wide - narrow)
        if chosen[name] == narrow and cost <= room:
            chosen[name], room = wide, room - cost
    return chosen


def _hull(errors: Mapping[int, float]) -> list[tuple[int, float]]:
    """The (width, error) that no mixture of others beats, errors falling."""
    hull: list[tuple[int, float]] = []
    for point in sorted(errors.items()):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


class BitAllocation:
    """The stage: needs a sampler whose runs can be back-propagated."""

    title = "allocating bits"
    unit = "sample"
    weights = False

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.quant.bit_allocation

    def run(self, context: Context) -> None:
        diffusion = context.sampler("bit_allocation")
        with context.monitor(self.title, self.unit) as update:
            context.found["act_bits"] = allocate_bits_(
                diffusion, context.recipe.quant, context.data, context.conditions, context.batch_size, update
            )
