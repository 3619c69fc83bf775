"""Show what each layer of a quantized model got, and where its error comes from.

    qncd inspect out/w4a8 --sort own --top 20
    qncd inspect out/w4a8.safetensors --out out/pictures
    qncd inspect models/sdxl_w4a8
    qncd inspect configs/fashion_mnist.yml --width W8A8 --mode qncd --layer mid_block.resnets.0.conv2 --out out/pictures

SOURCE is the folder of a run, a quantized checkpoint (--cali_ckpt), a folder of `qncd.save`, or a model: a yaml, a folder of
diffusers or what else `qncd.load` takes. A model is quantized first, on a few calibration images, and measured before and after.
--out writes pictures as PNG and SVG: layers, map and steps of any source; of a model also smoothing, noise and with --layer the
rounding of one layer. `qncd report` takes that folder, too.
"""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import flags, messages
from qncd.app import parser as cli
from qncd.modes import DEFAULT_MODE, MODES

if TYPE_CHECKING:
    from qncd.inspection.measuring import Inspection
    from qncd.inspection.record import Inspected
    from qncd.recipe import Recipe

log = logging.getLogger("qncd")
SORTS = ("own", "gathered", "bits", "weights")
SAMPLES = 16
OF_MODELS = ("width", "mode", "samples", "steps", "prompt", "layer")  # flags that no other source takes
NEAREST = 3  # names that are offered instead of an unknown one


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a run, quantized checkpoint, or model")
    parser.add_argument("--sort", choices=SORTS, help="order of layers: largest first, of bits the fewest (default: as they run)")
    parser.add_argument("--top", type=int, metavar="N", help="so many of the layers (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for pictures, PNG and SVG")
    group = parser.add_argument_group("of a model")
    group.add_argument("--width", help="bits of weights and activations, such as W4A8")
    group.add_argument("--mode", choices=MODES, metavar="MODE", help=f"{', '.join(MODES)} (default {DEFAULT_MODE})")
    group.add_argument("--samples", type=int, metavar="N", help=f"calibration images (default {SAMPLES})")
    group.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the pipeline's own number)")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="of a text-to-image model, several times for more")
    group.add_argument("--layer", metavar="NAME", help="layer whose rounding and range search is drawn")
    return parser


def main(args: argparse.Namespace) -> None:
    messages.show("info")
    cli.check_counts(args, ("top", "samples", "steps"))
    if args.out is not None:
        flags.check_output_folder("--out", args.out)

    from qncd.inspection.drawing import draw_all, write_all
    from qncd.report.terminal import closing_line, lines_of, ordered

    found = _opened(args)
    record = found.record
    if not record.times:
        lack = f"{args.source}: has no record of its layers' errors, which the sampling commands write: bits and ranges alone"
        if args.out is not None:
            raise ValueError(f"{lack}, nothing that --out {args.out} could hold")
        log.warning(lack)
    for line in [*lines_of(ordered(record.layers, args.sort, args.top)), closing_line(record)]:
        print(line)
    if args.out is not None:
        write_all(draw_all(found), args.out)
        found.save(args.out)


def _opened(args: argparse.Namespace) -> Inspected:
    """What the layers got, and what else was measured."""
    from qncd.inspection.record import Inspected
    from qncd.inspection.sources import checkpoint_in, is_run, record_of_checkpoint, record_of_run

    source: Path = args.source
    run = is_run(source)
    checkpoint = None if run else checkpoint_in(source)
    if run or checkpoint is not None:
        kind = "the folder of a run" if checkpoint is None else "a quantized checkpoint"
        if given := next((name for name in OF_MODELS if getattr(args, name) is not None), None):
            raise ValueError(f"--{given} is for a model, and {source} is {kind}")
        record = record_of_run(source) if checkpoint is None else record_of_checkpoint(checkpoint)
        return Inspected(source.name, record, settings={"source": str(source)})
    if args.width is None:
        raise ValueError(
            f"{source}: neither the folder of a run (run.json) nor a quantized checkpoint; a model needs --width, such as W4A8"
        )
    return _measured(args)


def _measured(args: argparse.Namespace) -> Inspected:
    """A model, quantized and measured."""
    from qncd.recipe import Recipe

    if args.layer is not None and args.out is None:
        raise ValueError(f"--layer {args.layer} is drawn: name a folder for its picture with --out")
    try:
        recipe = Recipe.of(args.mode or DEFAULT_MODE, args.width, samples=args.samples or SAMPLES)
    except ValueError as error:
        raise ValueError(f"--width {args.width}: {error}") from None
    inspection = _inspection(args, recipe)
    found = inspection.table() if args.out is None else inspection.look()
    around = {"source": str(args.source), "prompts": args.prompt, "sampler": {"timesteps": len(inspection.runs.times)}}
    return replace(found, settings=inspection.recipe.settings() | around)


def _inspection(args: argparse.Namespace, recipe: Recipe) -> Inspection:
    from qncd.api import load
    from qncd.app.quantizing import bars
    from qncd.inspection.measuring import Inspection
    from qncd.models.configs import YAML, find_config
    from qncd.models.network import network_of
    from qncd.sampling.pipeline import denoiser_of

    messages.hide_loading_bars()
    is_yaml = args.source.suffix.lower() in YAML and not args.source.is_dir()
    pipe = load(find_config(args.source) if is_yaml else args.source)
    if args.layer is not None:
        _check_layer(args.layer, list(network_of(denoiser_of(pipe)[1]).layers()))
    calls = _calls(args, pipe, recipe.calibration.samples)
    return Inspection(f"{args.source.stem}: {recipe.label}", pipe, recipe, calls, args.steps, args.layer, bars)


def _check_layer(name: str, names: Sequence[str]) -> None:
    """Raise ValueError where no layer that is quantized has this name."""
    if name not in names:
        near = difflib.get_close_matches(name, names, NEAREST, 0.0)
        raise ValueError(f"--layer {name}: no layer of this model that is quantized; the nearest are {', '.join(near)}")


def _calls(args: argparse.Namespace, pipe: Any, samples: int) -> list[dict[str, Any]]:
    """Calls of the pipeline to calibrate with. Raises ValueError where it needs prompts and got none, or takes none."""
    from qncd.app.pipelines import class_labels
    from qncd.ptq.pipeline_calls import calls_for, calls_of
    from qncd.sampling.pipeline import parameters_of

    takes = "prompt" in parameters_of(pipe)
    if takes and not args.prompt:
        raise ValueError(f"{args.source}: a text-to-image model is calibrated on prompts: name some with --prompt TEXT")
    if args.prompt and not takes:
        raise ValueError(f"--prompt: {type(pipe).__name__} takes no prompts")
    labels = class_labels(pipe)
    if labels is not None:
        return calls_of({}, [{"class_labels": labels[i % len(labels)]} for i in range(samples)], samples)
    return calls_for(pipe, args.prompt, samples)
