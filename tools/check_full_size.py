#!/usr/bin/env python3
"""Show that a model of full size is quantized, saved, loaded and sampled in a bounded memory.

    python tools/check_full_size.py --json full_size.json
    python tools/check_full_size.py --model sdxl --size 256 --cali_n 2 --scale 1 --weight_range max --json sdxl.json

`--model sd` takes Stable Diffusion v1's UNet (860 M parameters) in float32 and `qncd` with its noise table; allowed is twice the
memory of its weights. `--model sdxl` takes SDXL's (2.57 B) and `--model sd3` the transformer of Stable Diffusion 3 medium (2.03
B), in bfloat16 and with all parts of `qncd+`; allowed are 20 GB. Weights and texts are random, the same each time. A tiny
calibration set along the model's own trajectory, 2 PLMS steps on the schedule of Stable Diffusion v1, which changes neither time
nor memory of the others. Quantizing and using the checkpoint are one process each. A peak is that of the resident set,
interpreter and libraries included; above what is allowed the exit status is 1. Weights are packed once they are rounded, and the
checkpoint is loaded as diffusers' `from_pretrained` loads it: without a base model. With `--engine` it is exported as well, and
sampled on that engine, in a third process. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags
from qncd.app import parser as cli
from qncd.engines.registry import ENGINES
from qncd.io.files import first_line, read_json, regular_file, scratch_folder, write_json
from qncd.models.configs import CONFIGS, find_config
from qncd.recipe import WEIGHT_RANGES, Recipe, SamplerConfig
from qncd.workers import alone

if TYPE_CHECKING:
    from torch import nn

    from qncd.models.network import Network
    from qncd.sampling.diffusion import Diffusion
    from qncd.sampling.guidance import Conditions

LIMIT = 2.0  # times the float32 weights, where a model has no limit of its own
CONTEXT = "encoder_hidden_states"  # what a network that takes text is conditioned on
GB = 1e9
TIMESTEPS = 1000  # of the models' schedules
AUTOENCODER = 8  # pixels of an image to a side of a latent, of models whose config is that of the UNet alone
NETWORKS = ("UNet2DConditionModel", "SD3Transformer2DModel")  # of diffusers
TEXT, SIZES = "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"  # what SDXL takes beside the context
POOLED = "pooled_projections"  # and what SD3 does


@dataclass(frozen=True)
class Model:
    """What `--model` stands for.

    Attributes:
        config: yaml of a latent model, or config.json of a class in NETWORKS.
        dtype: of the weights.
        mode: how it is quantized.
        limit: GB that are allowed; None for LIMIT.
        tokens: of a text.
    """

    config: Path
    dtype: str
    mode: str
    limit: float | None = None
    tokens: int = 77


MODELS = {
    "sd": Model(CONFIGS / "sd-v1-inference.yaml", "float32", "qncd"),
    "sdxl": Model(Path(__file__).with_name("sdxl_unet.json"), "bfloat16", "qncd+", 20.0),
    "sd3": Model(Path(__file__).with_name("sd3_transformer.json"), "bfloat16", "qncd+", 20.0, 333),
}


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--model", choices=tuple(MODELS), default="sd", help="default sd")
    parser.add_argument("--config", type=Path, help="another yaml of a latent model, or config.json of a network")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: the model's own)")
    parser.add_argument("--size", type=int, default=512, help="side of the calibration images in pixels (default 512)")
    parser.add_argument("--sample_size", type=int, help="side of the image that is sampled at last (default: the same)")
    parser.add_argument("--steps", type=int, default=2, help="PLMS steps (default 2)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance (default 7.5; 1: none, half the inputs a call)")
    parser.add_argument("--weight_bit", type=int, default=8, help="2 to 8 (default 8)")
    parser.add_argument("--act_bit", type=int, default=8, help="2 to 8 (default 8)")
    parser.add_argument("--weight_range", choices=WEIGHT_RANGES, default="mse", help="default mse; max saves minutes")
    parser.add_argument("--cali_n", type=int, default=4, help="calibration trajectories (default 4; sd's noise table needs 4)")
    parser.add_argument("--cali_st", type=int, default=1, help="calibration time steps (default 1)")
    parser.add_argument("--no-sample_reverse", dest="no_sample_reverse", action="store_true", help="no noise correction")
    parser.add_argument("--no-gptq", dest="no_gptq", action="store_true", help="weights to nearest: saves most of the time")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="export the checkpoint, too, and sample it on this engine")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def memory(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(field + ":"))


class Phases:
    """Seconds and peak memory of each phase of this process, printed as they end."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at what is resident now
        start, cpu = time.perf_counter(), time.process_time()
        yield
        seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, memory("VmHWM")
        self.rows[name] = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}
        print(f"{name:<38} {seconds:7.1f} s ({cpu:.1f} of CPU), peak {peak / GB:.2f} GB", flush=True)


def state_of(network: Network) -> list[str]:
    """A digest of each tensor of the model."""
    from qncd.models.loading import state_dict_hash
    from qncd.quant.inspection import UnpackedState

    return [state_dict_hash({name: tensor}) for name, tensor in UnpackedState(network.module).items()]


def build(args: argparse.Namespace, weights: bool = True) -> tuple[Diffusion, Diffusion]:
    """The diffusion with a network of fresh weights, the same ones each time: at the calibration's size, and at the image's.

    Args:
        weights: false leaves them without memory.
    """
    import diffusers
    import torch

    from qncd.app.latent import latent_lane
    from qncd.models.loading import load_config
    from qncd.models.network import network_of
    from qncd.models.original.ldm import build_ldm_unet, ldm_betas
    from qncd.sampling.diffusion import Diffusion
    from qncd.sampling.process import Process

    path = config_of(args)
    if path.suffix == ".json":
        config, factor, betas = read_json(path), AUTOENCODER, ldm_betas(load_config(MODELS["sd"].config))
        if not isinstance(config, dict) or (name := config.get("_class_name")) not in NETWORKS:
            raise ValueError(f"--config {path}: allowed are networks of the class {' or '.join(NETWORKS)}")
        make = functools.partial(getattr(diffusers, name).from_config, config)
    else:
        config = load_config(path)
        try:
            factor = 2 ** (len(config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)
        except (KeyError, TypeError):
            raise ValueError(f"--config {path}: no first_stage_config.params.ddconfig.ch_mult") from None
        betas, make = ldm_betas(config), functools.partial(build_ldm_unet, config)
    try:
        with torch.device("meta"):
            module = make()
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"--config {path}: describes no network: {first_line(error)}") from None
    network = network_of(module.eval().requires_grad_(False))
    if network.condition != CONTEXT:
        raise ValueError(f"--config {path}: the model takes no text; allowed are models with cross-attention")
    for flag in ("size", "sample_size"):
        size = getattr(args, flag)
        if size is not None and size % (8 * factor):
            raise ValueError(f"--{flag} {size}: allowed are multiples of {8 * factor}")
    module.to(getattr(torch, args.dtype or MODELS[args.model].dtype))
    if weights:
        fill_(module.to_empty(device="cpu"))
    fill_buffers_(module)
    side, sampled = (size // factor for size in (args.size, args.sample_size or args.size))
    shape = (network.config["in_channels"], side, side)
    diffusion = Diffusion(network, Process.from_betas(betas), sampler_of(args), shape, latent_lane(side, args.scale != 1))
    return diffusion, dataclasses.replace(
        diffusion, shape=(shape[0], sampled, sampled), lane=latent_lane(sampled, args.scale != 1)
    )


def config_of(args: argparse.Namespace) -> Path:
    """The file that describes the network."""
    return args.config or MODELS[args.model].config


def fill_(module: nn.Module) -> None:
    """Give weights to a module that has only memory, one tensor at a time: those of torch's layers, with biases of 0."""
    import torch

    torch.manual_seed(0)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound)
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)


def fill_buffers_(module: nn.Module) -> None:
    """Give values to what is no parameter: sines of positions."""
    import torch

    torch.manual_seed(1)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device="cpu").uniform_(-1, 1))


def sampler_of(args: argparse.Namespace) -> SamplerConfig:
    """PLMS. Raises ValueError for more steps than there are time steps."""
    if args.steps > TIMESTEPS:
        raise ValueError(f"--steps {args.steps}: allowed are 1 to {TIMESTEPS}")
    return SamplerConfig("plms", "uniform", args.steps, 0.0, "ldm")


def steps_of(args: argparse.Namespace) -> str:
    """What is sampled, for the name of a phase."""
    side = args.sample_size or args.size
    return f"{args.steps} PLMS steps, {side}x{side}"


def contexts(args: argparse.Namespace, diffusion: Diffusion) -> Conditions:
    """A random text context for each calibration trajectory, and one for no text."""
    import torch

    from qncd.sampling.guidance import Conditions

    config, generator, count = diffusion.network.config, torch.Generator().manual_seed(1), args.cali_n + 1
    joint = config.get("joint_attention_dim")
    inputs = {CONTEXT: torch.randn(count, MODELS[args.model].tokens, joint or config["cross_attention_dim"], generator=generator)}
    if joint:
        inputs[POOLED] = torch.randn(count, config["pooled_projection_dim"], generator=generator)
    if config.get("addition_embed_type") == "text_time":
        sizes = torch.tensor([args.size, args.size, 0, 0, args.size, args.size], dtype=torch.float32)
        width = config["projection_class_embeddings_input_dim"] - len(sizes) * config["addition_time_embed_dim"]
        inputs |= {TEXT: torch.randn(count, width, generator=generator), SIZES: sizes.expand(count, -1)}
    cond, uncond = (
        {name: value[rows] for name, value in inputs.items()} for rows in (slice(args.cali_n), slice(args.cali_n, count))
    )
    return Conditions(cond, uncond if args.scale != 1 else None, args.scale)


def recipe_of(args: argparse.Namespace, lane: int) -> Recipe:
    """The model's mode without reconstruction; a noise table has an interval that makes an estimate in the first step."""
    mode = MODELS[args.model].mode
    changes: dict[str, Any] = {"interval": 2} if mode == "qncd" else {}
    if args.no_sample_reverse:
        changes = {"correction": False, "tracking": False}
    if args.no_gptq:
        changes["gptq"] = False
    widths = {"weight_bits": args.weight_bit, "act_bits": args.act_bit}
    recipe = Recipe.of(mode, weight_range=args.weight_range, reconstruction=False, **widths, **changes)
    return recipe.with_calibration(samples=args.cali_n, steps=args.cali_st, batch_size=lane)


def quantize_and_save(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """For a separate process: from random weights to the quantized checkpoint. Returns the figures."""
    from qncd.models.loading import state_dict_hash
    from qncd.ptq.checkpoint import save_quantized
    from qncd.ptq.pipeline import Job, quantize_network, sample_calibration
    from qncd.ptq.runs import DiffusionRuns

    phase, baseline = Phases(), memory("VmRSS")
    with phase("random weights, their SHA-256"):
        diffusion, sampler = build(args)
        network = diffusion.network
        base_hash = state_dict_hash(network.module)
    if args.engine:  # to compare with
        with phase(f"{steps_of(args)}, full precision"):
            sampler.sample([0], conditions=contexts(args, sampler)[:1])
    weights = sum(p.numel() * 4 for p in network.module.parameters())
    recipe = recipe_of(args, diffusion.lane)
    runs = DiffusionRuns(diffusion, recipe.calibration, contexts(args, diffusion))
    with phase("calibration set"):
        data, record = sample_calibration(runs, recipe, base_hash)
    with phase(f"quantize to {recipe.label}"):
        outcome = quantize_network(runs, recipe, data, record, Job(packed=True))
    with phase("save"):
        settings = {"sampler": dataclasses.asdict(diffusion.config)}
        save_quantized(network, path, recipe.quant, base_hash, settings, outcome.record)
    return {"baseline_bytes": baseline, "fp32_bytes": weights, "phases": phase.rows, "state": state_of(network)}


def load_and_sample(args: argparse.Namespace, path: Path, engine: str | None = None) -> dict[str, Any]:
    """For a separate process: load the checkpoint and sample one image, on an engine or in PyTorch. Returns the figures."""
    from qncd.engines.engine import export, open_engine
    from qncd.models.network import network_of
    from qncd.ptq.checkpoint import load_quantized_
    from qncd.sampling.correctors.registry import corrector_of, kind_of
    from qncd.saving import materialize_

    phase = Phases()
    with phase(f"load for {engine}" if engine else "load"):
        diffusion, sampler = build(args, weights=False)
        materialize_(diffusion.network.module)
        info = load_quantized_(diffusion.network, path, packed=True)
    state = state_of(diffusion.network)
    if engine:
        with phase("export"):
            export(diffusion.network, path.parent, info.config, info.base_hash, shape=sampler.shape)
        with phase(f"open on {engine}"):
            opened = network_of(open_engine(diffusion.network, path.parent, engine))
            del diffusion  # the engine has weights of its own
            sampler = dataclasses.replace(sampler, network=opened)
    recipe = recipe_of(args, sampler.lane)
    kind = kind_of(recipe)
    corrector = corrector_of(recipe, info.records[kind.prefix] if kind else None)
    for run in (f"{engine}, first run", engine) if engine else ("quantized",):  # an engine prepares itself in the first
        with phase(f"{steps_of(args)}, {run}"):
            sampler.sample([0], corrector, conditions=contexts(args, sampler)[:1])  # raises where it is not finite
    return {"phases": phase.rows, "state": state}


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("size", "sample_size", "steps", "cali_n", "cali_st"))
    if not math.isfinite(args.scale):
        raise ValueError(f"--scale {args.scale}: allowed are finite numbers")
    sampler_of(args)
    recipe_of(args, 1)
    if args.engine:
        from qncd.engines.engine import check_engine, engine_of

        if not engine_of(args.engine).file:
            raise ValueError(f"--engine {args.engine}: runs no exported file")
        check_engine(args.engine)
    regular_file(find_config(config_of(args)))
    if args.json:
        flags.check_file("--json", args.json, replace=True)
    with scratch_folder() as folder:
        path = folder / "quantized.safetensors"
        first = alone(quantize_and_save, args, path)
        size = path.stat().st_size
        runs = [first, alone(load_and_sample, args, path)]
        if args.engine:
            runs.append(alone(load_and_sample, args, path, args.engine))
    weights, phases = first["fp32_bytes"], dict[str, Any]()
    for run in runs:
        phases |= run["phases"]
    if any(run["state"] != first["state"] for run in runs):
        raise ValueError("the loaded model is not the one that was saved")
    print(f"float32 weights {weights / GB:.2f} GB; interpreter and libraries alone {first['baseline_bytes'] / GB:.2f} GB")
    for name, row in phases.items():
        row["peak_over_fp32"] = row["peak_bytes"] / weights
        print(f"{name:<38} {row['peak_over_fp32']:7.2f} x the weights")
    worst = max(row["peak_bytes"] for row in phases.values())
    allowed = (MODELS[args.model].limit or LIMIT * weights / GB) * GB
    print(f"checkpoint {size / GB:.3f} GB, {size / weights:.3f} x the weights; the loaded model holds the saved one's numbers")
    verdict = "ok" if worst <= allowed else "TOO MUCH"
    print(f"largest peak {worst / GB:.2f} GB, {worst / weights:.2f} x the weights; allowed are {allowed / GB:.2f} GB: {verdict}")
    if args.json:
        figures = {"model": args.model, "size": args.size, "steps": args.steps, "fp32_bytes": weights,
                   "baseline_bytes": first["baseline_bytes"], "checkpoint_over_fp32": size / weights,
                   "largest_peak_over_fp32": worst / weights, "phases": phases}  # fmt: skip
        write_json(args.json, figures)
    if worst > allowed:
        sys.exit(1)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
