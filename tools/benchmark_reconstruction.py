#!/usr/bin/env python3
"""Measure what reconstructing weights costs and brings, against the published loop, side by side in one run.

    python tools/benchmark_reconstruction.py --json reconstruction.json
    python tools/benchmark_reconstruction.py --quality --iterations 100 300 1000 3000 --json quality.json \\
        --settings published default published@20000 0.007:32@4000

Without --quality: the time of one iteration, summed over all blocks of the bundled models, of this package and of a plain
transcription of BRECQ's loop as Q-Diffusion publishes it; medians of alternating runs. With it: the held-out error of blocks
against iterations (W4), relative to rounding to nearest, and the seconds that they took. With --steps: the error of the noise
prediction on trajectories of other seeds, relative to its mean square, before and after the activation scales are learned.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import write_json
from qncd.recipe import ACT_ITERATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from qncd.models.network import Network
    from qncd.ptq.blocks import BlockData
    from qncd.ptq.data import CalibrationSet
    from qncd.recipe import ReconstructionConfig

MODELS = {"ddim": "fashion_mnist.yml", "ldm": "fashion_mnist_ldm.yaml"}
BLOCKS = {
    "ddim": ("down_blocks.2.resnets.0", "up_blocks.1.resnets.0"),
    "ldm": ("down_blocks.0.resnets.0", "down_blocks.1.attentions.0.transformer_blocks.0"),
}
TIMED_INPUTS, TIMED_ITERATIONS = 64, 5


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--model", choices=MODELS, action="append", help="of the bundled models (default: both)")
    parser.add_argument("--rounds", type=int, default=5, help=f"alternating runs of {TIMED_ITERATIONS} iterations (default 5)")
    parser.add_argument("--quality", action="store_true", help="error against iterations instead of the time of an iteration")
    parser.add_argument("--steps", action="store_true", help="what learning activation scales brings (--recon_act)")
    parser.add_argument("--widths", nargs="+", default=["W8A4", "W8A6", "W4A8"], help="with --steps (default %(default)s)")
    parser.add_argument("--block", action="append", help="with --quality: a block by its name (default: two of each model)")
    parser.add_argument("--iterations", type=int, nargs="+", default=[100, 300, 1000, 3000], help="with --quality")
    parser.add_argument(
        "--settings", nargs="+", default=["published", "default"], metavar="NAME",
        help="with --quality: published, default, or LR:BATCH of this package's loop; NAME@N: at N iterations alone, "
        "e.g. 0.007:32@4000",
    )  # fmt: skip
    parser.add_argument("--inputs", type=int, default=512, help="with --quality: calibration inputs (default 512)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


class PublishedRounding:
    """AdaRound's variables of one layer, as the formulas stand: V, h(V), and a weight that is rebuilt in every pass."""

    def __init__(self, layer: Any) -> None:
        import torch

        layer.search_weight_range_()
        self.weight, self.delta = layer.weight.detach(), layer.expanded_scale().detach()
        self.qmin, self.qmax = layer.config.weight_codes.qmin, layer.config.weight_codes.qmax
        rest = self.weight / self.delta - torch.floor(self.weight / self.delta)
        self.alpha = (-torch.log(1.2 / (rest + 0.1) - 1)).requires_grad_(True)

    def soft_targets(self) -> Tensor:
        import torch

        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def soft(self) -> Tensor:
        import torch

        codes = torch.floor(self.weight / self.delta) + self.soft_targets()
        return torch.clamp(codes, self.qmin, self.qmax) * self.delta

    def hard(self) -> Tensor:
        import torch

        codes = torch.floor(self.weight / self.delta) + (self.alpha >= 0).float()
        return (torch.clamp(codes, self.qmin, self.qmax) * self.delta).detach()


def published_loop(
    data: BlockData, roundings: Mapping[str, PublishedRounding], iterations: int, batch_size: int = 32, lr: float = 1e-3
) -> None:
    """BRECQ's loop: a random batch from a full cache, soft weights, squared error and rounding loss, Adam."""
    import torch
    from torch.func import functional_call

    generator = torch.Generator().manual_seed(0)
    args, kwargs = data.calls.batch(torch.arange(data.calls.rows), "cpu")
    outputs = data.targets[torch.arange(data.targets.rows)]
    optimizer = torch.optim.Adam([rounding.alpha for rounding in roundings.values()], lr=lr)
    start = 0.2 * iterations
    for iteration in range(1, iterations + 1):
        index = data.used[torch.randperm(len(data.used), generator=generator)[:batch_size]]
        batch = [arg[index] for arg in args]
        more = {key: value[index] if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        optimizer.zero_grad()
        weights = {f"{name}.weight" if name else "weight": rounding.soft() for name, rounding in roundings.items()}
        loss = (functional_call(data.unit, weights, tuple(batch), more) - outputs[index]).abs().pow(2.0).sum(1).mean()
        if iteration >= start:
            beta = 2 + 18 * max(0.0, 1 - (iteration - start) / (iterations - start))
            for rounding in roundings.values():
                loss = loss + 0.01 * (1 - ((rounding.soft_targets() - 0.5).abs() * 2).pow(beta)).sum()
        loss.backward()
        optimizer.step()


def load(model: str, inputs: int, seed: int = 0) -> tuple[Network, CalibrationSet]:
    """The network of a bundled model, and `inputs` calibration inputs along its own trajectories of 20 steps."""
    from qncd.benchmark.cells import calibration_runs
    from qncd.benchmark.subjects import load_subject
    from qncd.models.configs import CONFIGS
    from qncd.models.loading import load_config
    from qncd.models.schema import COMPVIS, layout_of
    from qncd.recipe import CalibrationConfig, SamplerConfig

    config = load_config(CONFIGS / MODELS[model])
    sampler = SamplerConfig(timesteps=20, convention="ldm" if layout_of(config) is COMPVIS else "ddim")
    subject = load_subject(config, None, sampler, None, "cpu")
    samples = max(1, inputs // (16 if subject.calibration_conditions else 8))  # guidance doubles the inputs
    data = calibration_runs(subject, CalibrationConfig(samples, 8, seed=seed)).calibration_set()
    return subject.sampler.network, data


def block_data(network: Network, reference: Network, name: str, data: CalibrationSet, files: str) -> BlockData:
    from qncd.distributed import OneProcess
    from qncd.ptq.blocks import collect
    from qncd.recipe import ReconstructionConfig

    return collect(network, reference, name, data, ReconstructionConfig(), Path(files), OneProcess())


def time_model(model: str, rounds: int) -> dict[str, Any]:
    """Seconds of one iteration of every block, ours and published, and their ratio."""
    from qncd.ptq.blocks import execution_order, open_layers, reconstruction_units
    from qncd.ptq.stages.prepare import quantize_
    from qncd.recipe import QuantConfig, ReconstructionConfig

    network, data = load(model, TIMED_INPUTS)
    quantize_(network, QuantConfig(4, 8))
    config, rows = ReconstructionConfig(TIMED_ITERATIONS), []
    for name in execution_order(network, data, reconstruction_units(network)):
        with tempfile.TemporaryDirectory() as files:
            block = block_data(network, network, name, data, files)
            times = _times(block, open_layers(block.unit, ()), config, rounds)
        ours, published = (statistics.median(seconds) for seconds in times)
        rows.append({"block": name, "ours_ms": 1e3 * ours, "published_ms": 1e3 * published, "ratio": ours / published})
        print(f"{model} {name}: {1e3 * ours:.1f} ms an iteration, published {1e3 * published:.1f}", flush=True)
    total = {key: sum(row[key] for row in rows) for key in ("ours_ms", "published_ms")}
    return {"blocks": rows, **total, "ratio": total["ours_ms"] / total["published_ms"]}


def _times(
    block: BlockData, layers: Mapping[str, Any], config: ReconstructionConfig, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of an iteration, ours and published, in alternating runs."""
    from qncd.ptq.stages.reconstruction import _optimize
    from qncd.quant.rounding import LearnedRounding

    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(-1, rounds):  # one warm-up
        ours = {key: LearnedRounding(layer) for key, layer in layers.items()}
        published = {key: PublishedRounding(layer) for key, layer in layers.items()}
        start = time.perf_counter()
        _optimize(block, ours, config)
        middle = time.perf_counter()
        published_loop(block, published, config.iterations)
        end = time.perf_counter()
        if round_ >= 0:
            times[0].append((middle - start) / config.iterations)
            times[1].append((end - middle) / config.iterations)
    return times


def settings_of(name: str, iterations: int) -> ReconstructionConfig:
    """The configuration of "default" or LR:BATCH. Raises ValueError for another text."""
    from qncd.recipe import ReconstructionConfig

    if name == "default":
        return ReconstructionConfig(iterations)
    try:
        lr, batch = name.split(":")
        return ReconstructionConfig(iterations, int(batch), float(lr))
    except ValueError:
        raise ValueError(f"--settings {name}: allowed are published, default and LR:BATCH, e.g. 0.01:16") from None


def runs_of(settings: list[str], iterations: list[int]) -> list[tuple[int, str]]:
    """(iterations, name) of every run. Raises ValueError for settings that are none."""
    runs = [(number, name) for number in iterations for name in settings if "@" not in name]
    for pinned in settings:
        name, at, number = pinned.partition("@")
        if name != "published":
            settings_of(name, 1)
        if at and not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"--settings {pinned}: allowed behind @ are whole numbers, 1 or more")
        runs += [(int(number), name)] if at else []
    return runs


def quality(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Held-out error of chosen blocks against iterations, for each of the settings."""
    from qncd.ptq.blocks import execution_order, open_layers, reconstruction_units
    from qncd.ptq.context import copied
    from qncd.ptq.stages.prepare import quantize_
    from qncd.ptq.stages.reconstruction import _optimize
    from qncd.quant.rounding import LearnedRounding
    from qncd.recipe import QuantConfig

    network, data = load(model, args.inputs)
    quantize_(network, QuantConfig(4, 8))
    reference, units = copied(network), reconstruction_units(network)
    order, rows = execution_order(network, data, units), []
    chosen = args.block or BLOCKS[model]
    for name in chosen:
        if name not in order:
            raise ValueError(f"--block {name}: allowed are {', '.join(order)}")
    for name in sorted(chosen, key=order.index):
        for before in order[: order.index(name)]:  # its inputs come from a network that is rounded up to it
            for layer in open_layers(units[before], ()).values():
                layer.quantize_weight_()
        with tempfile.TemporaryDirectory() as files:
            block = block_data(network, reference, name, data, files)
            layers = open_layers(block.unit, ())

            def error(weights: Mapping[str, Tensor]) -> float:
                named = {f"{key}.weight" if key else "weight": weight for key, weight in weights.items()}
                return block.error(named, 32, network.device)  # noqa: B023

            for layer in layers.values():
                layer.search_weight_range_()
            nearest = error({key: layer.rounded_weight() for key, layer in layers.items()})
            for iterations, kind in runs_of(args.settings, args.iterations):
                start = time.perf_counter()
                if kind == "published":
                    made: Any = {key: PublishedRounding(layer) for key, layer in layers.items()}
                    published_loop(block, made, iterations)
                else:
                    made = {key: LearnedRounding(layer) for key, layer in layers.items()}
                    _optimize(block, made, settings_of(kind, iterations))
                seconds = time.perf_counter() - start
                reached = error({key: rounding.hard() for key, rounding in made.items()}) / nearest
                rows.append({
                    "model": model, "block": name, "settings": kind, "iterations": iterations, "seconds": seconds,
                    "nearest": nearest, "of_nearest": reached,
                })  # fmt: skip
                print(f"{model} {name} {kind} {iterations}: {reached:.4f} of nearest in {seconds:.1f} s", flush=True)
                if args.json:
                    write_json(args.json, {"quality": rows})
    return rows


def steps(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Error of the noise prediction on unseen trajectories before and after the activation scales are learned."""
    import torch

    from qncd.benchmark.plan import integer_bits
    from qncd.ptq.context import copied
    from qncd.ptq.observing import call_on
    from qncd.ptq.pipeline import calibrate_
    from qncd.ptq.stages.activation_steps import learn_steps_
    from qncd.ptq.stages.prepare import quantize_
    from qncd.recipe import QuantConfig, ReconstructionConfig

    plain, data = load(model, args.inputs)
    _, unseen = load(model, args.inputs // 2, 1)
    rows = []
    for width in args.widths:
        config = QuantConfig(*integer_bits(width))
        network, reference = (quantize_(copied(plain), config) for _ in range(2))

        @torch.no_grad()
        def error() -> float:
            squared = expected = 0.0
            for x, t, inputs in unseen.batches(32):
                exact, found = (call_on(one, x, t, inputs, unseen.constants) for one in (reference, network))  # noqa: B023
                squared, expected = squared + float((found - exact).square().sum()), expected + float(exact.square().sum())
            return squared / expected

        calibrate_(network, data, config, 32)
        before, start = error(), time.perf_counter()
        results = learn_steps_(network, reference, data, ReconstructionConfig(act_iterations=ACT_ITERATIONS))
        row = {"model": model, "width": width, "before": before, "after": error(), "seconds": time.perf_counter() - start}
        rows.append(row | {"blocks": len(results), "kept": sum(result.kept for result in results)})
        print(f"{model} {width}: {before:.5f} as calibrated, {row['after']:.5f} with learned scales", flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    import torch

    from qncd.benchmark.plan import integer_bits

    cli.check_counts(args, ("rounds", "inputs", "threads"))
    if args.json:
        flags.check_file("--json", args.json, replace=True)
    if min(args.iterations) < 1:
        raise ValueError(f"--iterations {min(args.iterations)}: allowed are whole numbers, 1 or more")
    runs_of(args.settings, args.iterations)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = args.model or list(MODELS)
    if args.block and (len(models) != 1 or not args.quality):
        raise ValueError("--block needs --quality and one --model")
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    for width in args.widths:
        integer_bits(width)
    if args.steps and args.quality:
        raise ValueError("--steps and --quality exclude one another")
    if args.steps:
        figures["steps"] = [row for model in models for row in steps(args, model)]
    elif args.quality:
        figures["quality"] = [row for model in models for row in quality(args, model)]
    else:
        for model in models:
            figures[model] = time_model(model, args.rounds)
            print(f"{model}: one iteration of every block takes {figures[model]['ratio']:.2f} of the published loop's time")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
