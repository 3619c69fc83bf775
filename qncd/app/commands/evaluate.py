"""Figures of synthetic images against real ones, each printed with the convention that it belongs to.

    qncd evaluate REAL SYNTH
    qncd evaluate fashion_mnist samples/ --features fashion_mnist
    qncd evaluate VIRTUAL_imagenet256_labeled.npz samples.npz --device cuda --json scores.json
    qncd evaluate coco/ out/images --convention pytorch-fid --metrics fid clip_score
    qncd evaluate out/fp out/images --compare other/images --bootstrap 1000

REAL and SYNTH are folders of images (any depth), ADM's .npz files of images (arr_0), statistics (mu, sigma) of ADM or
pytorch-fid, or the name of a data set: with --features fashion_mnist, the name fashion_mnist means the statistics of its
bundled training images. REAL may be - where only CLIP metrics are wanted. Folders with the same file names also give
PSNR, SSIM, MSE and, where its weights are at hand, LPIPS. Without --metrics, those that the convention's own package reports
are computed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qncd.app import parser as cli
from qncd.io.files import regular_file, write_json
from qncd.metrics.report.conventions import (
    CLIP_METRICS,
    CONVENTIONS,
    DEFAULT_CONVENTION,
    DISTRIBUTION_METRICS,
    METRICS,
    PAIRED_METRICS,
)
from qncd.progress import silent

# The names of EXTRACTORS and ANTONYMS in qncd.metrics.networks, repeated because these modules take seconds to import; a
# test compares them.
FEATURES = ("inception", "fashion_mnist")
IQA = (
    "quality", "sharpness", "noisiness", "brightness", "contrast", "colorfulness", "natural", "real", "beautiful",
)  # fmt: skip


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("real", metavar="REAL", help="reference images or statistics")
    parser.add_argument("synth", metavar="SYNTH", help="images to judge")
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        help=f"resize, inception score and metrics of a package (default: {DEFAULT_CONVENTION})",
    )
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"any of {', '.join(METRICS)}")
    parser.add_argument("--features", choices=FEATURES, default="inception", help="network (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="weights of the network (default: torch hub's cache, then a download)")
    parser.add_argument("--is_splits", type=int, default=10, help="splits of the inception score (default: %(default)s)")
    parser.add_argument("--precision_recall", action="store_true", help="also precision and recall with 3 neighbours")

    group = parser.add_argument_group("text, quality and pairs")
    group.add_argument("--prompts", type=Path, help="prompts of SYNTH (default: prompts.jsonl beside it); asks for clip_score")
    group.add_argument("--clip_model", help="open_clip's name, local-dir:FOLDER or hf-hub:NAME (default: ViT-B-32)")
    group.add_argument("--clip_weights", help="open_clip's tag or a file (default: openai)")
    group.add_argument("--iqa", nargs="+", choices=IQA, metavar="NAME", help=f"asks for clip_iqa; any of {', '.join(IQA)}")
    group.add_argument("--lpips_weights", type=Path, help="torchvision's AlexNet or VGG16; asks for lpips")

    group = parser.add_argument_group("uncertainty")
    group.add_argument("--bootstrap", type=int, default=0, metavar="N", help="95 %% intervals from N resamples, e.g. 1000")
    group.add_argument("--compare", metavar="BASELINE", help="also judge BASELINE, and print SYNTH less BASELINE")

    group = parser.add_argument_group("running")
    group.add_argument("--batch_size", type=int, default=50, help="images in the network at once (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--devices", type=int, default=1, help="processes on this machine, one a device (default: %(default)s)")
    group.add_argument("--num_nodes", type=int, default=1, help="machines (default: %(default)s)")
    group.add_argument("--cache", type=Path, metavar="DIR", help="folder of cached features (default: ~/.cache/qncd/features)")
    group.add_argument("--no_cache", action="store_true", help="neither read nor keep features")
    group.add_argument("--json", metavar="FILE", help="write the numbers as JSON too; - prints it instead of the text")
    group.add_argument("--save_statistics", type=Path, metavar="FILE", help="save REAL's statistics (.npz) to use as REAL later")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def choose_metrics(args: argparse.Namespace) -> tuple[str, ...]:
    """The metrics that the flags ask for. Raises ValueError for contradicting flags."""
    if args.features != "inception" and args.convention is not None:
        raise ValueError(f"--convention {args.convention} is about Inception, not about --features {args.features}")
    if args.no_cache and args.cache is not None:
        raise ValueError("--cache and --no_cache exclude one another")
    default = (
        CONVENTIONS[args.convention or DEFAULT_CONVENTION].metrics if args.features == "inception" else ("fid", "sfid", "is")
    )
    metrics = list(args.metrics or ([] if args.real == "-" else default))
    for wanted, name in (
        (args.precision_recall, "precision_recall"),
        (args.prompts, "clip_score"),
        (args.iqa, "clip_iqa"),
        (args.lpips_weights, "lpips"),
    ):
        if wanted and name not in metrics:
            metrics.append(name)
    if args.real == "-" and (set(metrics) - set(CLIP_METRICS) or not metrics or args.save_statistics):
        raise ValueError(f"REAL is -: only --metrics {' '.join(CLIP_METRICS)} can be had without real images")
    if (args.clip_model or args.clip_weights) and not set(metrics) & set(CLIP_METRICS):
        raise ValueError(f"--clip_model and --clip_weights are for --metrics {' '.join(CLIP_METRICS)}")
    return tuple(metrics)


def _check_output(path: Path, option: str, inputs: Sequence[str | None]) -> None:
    """Refuse, before hours of work, a file that cannot be written or that would take the place of an input."""
    from qncd.metrics.report.image_files import SUFFIXES

    if path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{option} {path}: {path.suffix} is the name of an image")
    if os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        raise ValueError(f"{option} {path}: not a file in a folder that exists")
    try:
        regular_file(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None
    else:
        if same := next((name for name in inputs if name and os.path.exists(name) and os.path.samefile(name, path)), None):
            raise ValueError(f"{option} {path}: that is {same}, which is read")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {path}: its folder cannot be written")


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("batch_size", "is_splits", "devices", "num_nodes"))
    if args.bootstrap < 0:
        raise ValueError(f"--bootstrap {args.bootstrap}: allowed are whole numbers, 0 or more")
    metrics = choose_metrics(args)
    inputs = (args.real, args.synth, args.compare, args.prompts, args.weights, args.lpips_weights, args.clip_weights)
    if args.json not in (None, "-"):
        _check_output(Path(args.json), "--json", inputs)
    if args.save_statistics is not None:
        _check_output(args.save_statistics, "--save_statistics", (*inputs, args.json))
    logging.getLogger("qncd").setLevel(logging.WARNING)  # what was damaged in the cache

    from qncd.distributed import start_processes
    from qncd.metrics.networks.features import FashionMnistFeatures, InceptionFeatures
    from qncd.metrics.networks.store import FeatureCache, default_cache
    from qncd.metrics.report.evaluate import Evaluator, Settings, check_sources, common_names, paired_folders, prompts_of
    from qncd.metrics.report.sources import open_source
    from qncd.metrics.report.table import differences, differences_to_json
    from qncd.metrics.statistics.paired import Lpips, lpips_obstacle

    convention = CONVENTIONS[args.convention or DEFAULT_CONVENTION] if args.features == "inception" else None
    real = None if args.real == "-" else open_source(args.real, network=args.features)
    sets = [open_source(path, True, args.features) for path in (args.synth, args.compare) if path is not None]
    needs_features = bool(set(metrics) & set(DISTRIBUTION_METRICS)) or args.save_statistics is not None
    if real is not None and needs_features:
        for synth in sets:
            check_sources(real, synth, args.features, convention)

    for synth in sets if set(metrics) & set(PAIRED_METRICS) else ():
        paired_folders(real, synth)
    iqa = tuple(args.iqa or ("quality",))
    settings = Settings(metrics, args.batch_size, args.is_splits, args.bootstrap, args.prompts, iqa, bool(args.metrics))
    for synth in sets:
        prompts_of(synth, settings)

    processes = start_processes(cli.choose_device(args.device), args.devices, args.num_nodes)
    with processes.quiet_failure():
        extractor: InceptionFeatures | FashionMnistFeatures | None = None
        if needs_features:
            if convention is None:
                extractor = FashionMnistFeatures(args.weights, processes.device)
            else:
                extractor = InceptionFeatures(args.weights, processes.device, convention)
        clip = lpips = None
        if set(metrics) & set(CLIP_METRICS):
            from qncd.metrics.networks.text import DEFAULT_MODEL, DEFAULT_WEIGHTS, ClipFeatures

            clip = ClipFeatures(args.clip_model or DEFAULT_MODEL, args.clip_weights or DEFAULT_WEIGHTS, processes.device)
        pairs = not settings.named and any(common_names(real, synth) for synth in sets)
        if "lpips" in metrics or (pairs and lpips_obstacle() is None):
            lpips = Lpips(args.lpips_weights, processes.device)
        cache = FeatureCache(None if args.no_cache else args.cache or default_cache())
        monitor = cli.progress_bar if sys.stderr.isatty() else silent  # elsewhere stderr is for what is wrong
        evaluator = Evaluator(real, extractor, settings, cache, processes, clip, lpips, monitor)
        if args.save_statistics is not None:
            evaluator.save_statistics(args.save_statistics)
        results = [evaluator.judge(synth) for synth in sets]
    found = [result for result in results if result is not None]
    if not found:  # in all processes but the first
        return

    document: dict[str, object] = {"real": args.real, "synth": args.synth, **found[0].to_json()}
    lines = found[0].rows()
    if args.compare is not None:
        rows, how = differences(*found)
        document |= {"baseline": {"synth": args.compare, **found[1].to_json()}, "difference": differences_to_json(rows, how)}
        lines += ["", f"baseline {args.compare}:", *found[1].rows()]
        lines += ["", f"{args.synth} less {args.compare} ({how}):", *(row.row() for row in rows)]
    lines += ["", *dict.fromkeys(line for result in found for line in result.remarks())]
    text, encoding = json.dumps(document, indent=2) if args.json == "-" else "\n".join(lines), sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))  # a path may hold bytes that are no text
    if args.json not in (None, "-"):
        write_json(args.json, document)
