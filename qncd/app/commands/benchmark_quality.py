"""Measure what quantization costs a bundled model, and what each part of QNCD gives back.

    qncd benchmark quality --out runs/quality
    qncd benchmark quality --out runs/quality --widths W4A8 --modes linear qncd --seeds 1
    qncd benchmark quality --config configs/scenes.yaml --sample_type plms --out runs/quality_scenes

Rows: full precision, and every mode at every width, each with several calibration seeds. Finished cells are kept in
OUT/cells: the same command goes on with a run that was cut off. Results: OUT/quality.md, quality.json and quality.png.
Other toolkits (modelopt-int8, modelopt-smoothquant, nncf, quanto, torchao) are modes too, with `pip install -e '.[peers]'`;
widths that one cannot do are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qncd.app import flags, messages
from qncd.app import parser as cli
from qncd.benchmark.peers import PEERS, check_peer
from qncd.benchmark.plan import DEFAULT_MODES, UNBIASED_IMAGES, WIDTHS, Cell, Plan, can_do, corrects, make_cells
from qncd.models.configs import CONFIGS
from qncd.modes import MODES
from qncd.recipe import CalibrationConfig, CorrectionConfig, ReconstructionConfig, SamplerConfig

log = logging.getLogger("qncd")
STEPS = 20

if TYPE_CHECKING:
    from qncd.benchmark.subjects import Words


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", type=Path, default=CONFIGS / "fashion_mnist.yml",
        help="yaml of the model: fashion_mnist.yml (default), fashion_mnist_ldm.yaml, fashion_mnist_dit.yaml, scenes.yaml, "
        "scenes_turbo.yaml or scenes_mmdit.yaml in configs/, or alike",
    )  # fmt: skip
    group.add_argument("--ckpt", help="weights (default: what the config names)")
    group.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--widths", nargs="+", metavar="WIDTH", help=f"such as W4A8, W4A16 and FP8 (default {' '.join(WIDTHS)})")
    group.add_argument(
        "--modes", nargs="+", metavar="MODE[,OPTION=VALUE...]", default=list(DEFAULT_MODES),
        help=f"of {', '.join((*MODES, *PEERS))}, the former also with changes such as qncd,smoothing=false,interval=2 "
        f"(default {' '.join(DEFAULT_MODES)})",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, default=3, help="repetitions, each with its own calibration images (default 3)")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--images", type=int, default=UNBIASED_IMAGES,
        help=f"images of each cell (default {UNBIASED_IMAGES}; 10000 for figures to publish)",
    )  # fmt: skip
    cli.add_step_arguments(group, STEPS, "; of a pipeline, what its yaml recommends")
    group.add_argument("--scale", type=float, help="guidance of a conditional model (default: what its yaml recommends)")
    group.add_argument("--seed", type=int, default=1234, help="image i has the seed SEED + i in every cell (default 1234)")
    group.add_argument("--batch_size", type=int, default=64, help="images at a time (default 64); changes no image")
    group = parser.add_argument_group("calibration and correction")
    group.add_argument("--cali_n", type=int, default=64, help="inputs at each calibration time step (default 64)")
    group.add_argument("--cali_st", type=int, default=10, help="calibration time steps (default 10)")
    iterations, inputs = ReconstructionConfig().iterations, ReconstructionConfig().batch_size
    group.add_argument(
        "--cali_iters", type=int, default=iterations, help=f"of modes that reconstruct, a block (default {iterations})"
    )
    group.add_argument("--recon_batch", type=int, default=inputs, help=f"inputs an iteration of theirs (default {inputs})")
    group.add_argument("--interval", type=int, default=CorrectionConfig().interval, help="steps between two noise estimates")
    group = parser.add_argument_group("running")
    group.add_argument("--out", type=Path, default=Path("runs/quality"), help="output folder (default runs/quality)")
    group.add_argument(
        "--engines", nargs="+", metavar="ENGINE", default=[],
        help="also export the network of every width and mode and time it on these engines, e.g. onnxruntime openvino",
    )  # fmt: skip
    group.add_argument("--jobs", type=int, help="worker processes (default: the number of cores; 1 on cuda)")
    group.add_argument("--report", action="store_true", help="compute nothing: write the table of the cells that are there")
    return parser


def command_line() -> str:
    """What this process was called with, for the report."""
    program = Path(sys.argv[0]).name
    words = [program] if program == "qncd" else ["python", f"scripts/{program}"]
    return shlex.join([*words, *(word for word in sys.argv[1:] if word != "--report")])


def main(args: argparse.Namespace) -> None:
    messages.show("info")
    cli.check_counts(
        args, ("images", "seeds", "batch_size", "cali_n", "cali_st", "cali_iters", "recon_batch", "interval", "jobs")
    )
    cli.check_scale(args.scale)
    if not args.report:
        flags.check_output_folder("--out", args.out)
    cells = make_cells(args.widths, args.modes, args.seeds)
    for mode in dict.fromkeys(cell.mode for cell in cells if cell.peer):
        if args.widths and (missing := [width for width in args.widths if not can_do(mode, width)]):
            log.info("note: %s can do %s; left out: %s", mode, PEERS[mode].widths, ", ".join(missing))
        if not args.report:
            check_peer(mode)
    from qncd.engines.engine import check_engine, file_engines

    for name in args.engines:
        if name not in file_engines():
            raise ValueError(f"--engines {name}: allowed are {', '.join(file_engines())}")
        check_engine(name)
    plan, words = make_plan(args, cells)
    from qncd.benchmark.cell_engines import time_engines
    from qncd.benchmark.cells import compute
    from qncd.benchmark.report import write_report
    from qncd.io.runs import RUN_FILE, Run, open_run

    if args.report:
        if not (args.out / RUN_FILE).is_file():
            raise FileNotFoundError(f"{args.out}: no benchmark in this folder (it has no {RUN_FILE})")
        run = Run(args.out)
    else:
        environment = {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in vars(args).items()}
        environment["command"] = command_line()
        room = 2 * plan.images * 64 * 64 * 3 + args.seeds * 4 * args.cali_n * args.cali_st * 32 * 32 + 1_000_000
        run = open_run(args.out, {"benchmark": "quality"}, environment, min_free_bytes=room)
    with run:
        if not args.report:
            compute(run, plan, cells, args.jobs)
            time_engines(plan, cells)
        write_report(command_line(), run, plan, cells, words)


def make_plan(args: argparse.Namespace, cells: Sequence[Cell]) -> tuple[Plan, Words]:
    """All settings, checked: what is wrong shows now and not after hours. Also what the report says of the model."""
    if args.images < 2:
        raise ValueError(f"--images {args.images}: allowed are 2 or more (the FID's covariance needs them)")
    if args.images < UNBIASED_IMAGES:
        log.info("note: FID and sFID are biased upwards at %d images (fewer than %d)", args.images, UNBIASED_IMAGES)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: allowed are whole numbers, 0 or more")
    calibration = CalibrationConfig(args.cali_n, args.cali_st)
    correction, controlled = CorrectionConfig(interval=args.interval), any(map(corrects, cells))
    reconstruction = ReconstructionConfig(args.cali_iters, args.recon_batch)

    from qncd.app.pipelines import recommended
    from qncd.models.loading import load_config
    from qncd.models.schema import COMPVIS, DIFFUSERS, layout_of
    from qncd.ptq.data import CalibrationCollector
    from qncd.sampling.correctors.runtime import check_interval, check_table_images

    model_config = load_config(args.config)
    layout, steps = layout_of(model_config), args.timesteps or STEPS
    if args.scale is not None and layout not in (COMPVIS, DIFFUSERS):
        raise ValueError(f"--scale {args.scale:g}: {args.config} is unconditional")
    if layout is DIFFUSERS:
        for name, own in (("sample_type", "generalized"), ("skip_type", "uniform"), ("eta", 0.0)):
            if getattr(args, name) != own:
                raise ValueError(f"--{name} {getattr(args, name)}: {args.config} is sampled with the scheduler of its folder")
        steps = args.timesteps or recommended(model_config).get("num_inference_steps", STEPS)
    with cli.naming_flags(eta="eta", timesteps="timesteps"):
        sampler = SamplerConfig(args.sample_type, args.skip_type, steps, args.eta, "ldm" if layout is COMPVIS else "ddim")
    plan = Plan(
        args.out, model_config, args.ckpt, {}, args.scale, cli.choose_device(args.device), sampler, calibration, correction,
        reconstruction, controlled, args.images, args.seed, args.batch_size,
    )  # fmt: skip
    subject = plan.subject()
    with cli.naming_flags(timesteps="timesteps", interval="interval"):
        CalibrationCollector(subject.sampler.step_count, args.cali_st)
        if controlled:
            check_interval(args.interval, subject.sampler.step_count)
            check_table_images(args.cali_n)
    engines = tuple(dict.fromkeys(args.engines))
    return dataclasses.replace(plan, subject_settings=subject.settings, engines=engines), subject.words
