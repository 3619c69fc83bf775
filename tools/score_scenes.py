#!/usr/bin/env python3
"""How often pictures of the bundled text-to-image model show what their captions say, by the bundled classifier.

    python tools/score_scenes.py --write_captions held_out.txt -n 200
    python scripts/txt2img.py --plms --from_file held_out.txt --outdir out/scenes
    python tools/score_scenes.py out/scenes

The first line draws captions of scenes that training never saw. The last one reads the folder's prompts.jsonl; --images fp
scores the full-precision pictures of a run with --compare_fp.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qncd.app import flags
from qncd.app import parser as cli
from qncd.io.files import read_lines, reading, regular_file, write_json, write_text


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("folder", type=Path, nargs="?", help="output folder of txt2img.py")
    parser.add_argument("--images", default="images", help="the pictures' folder inside of it (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--write_captions", type=Path, metavar="FILE", help="draw held-out captions instead, one a line")
    parser.add_argument("-n", type=int, default=200, help="captions to draw (default: %(default)s)")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the draw (default: %(default)s)")
    return parser.parse_args()


def draw_captions(count: int, seed: int) -> list[str]:
    """Different held-out captions. Raises ValueError where there are not so many."""
    import numpy as np

    from qncd.io.scenes import all_scenes, caption_of, is_held_out

    held_out = [caption_of(scene) for scene in all_scenes() if is_held_out(scene)]
    if not 1 <= count <= len(held_out):
        raise ValueError(f"-n {count}: allowed are 1 to {len(held_out)}, the held-out captions")
    return [held_out[i] for i in np.random.default_rng(seed).permutation(len(held_out))[:count]]


def read_run(folder: Path, images: str) -> tuple[list[Path], list[str]]:
    """Picture files and their captions. Raises FileNotFoundError or ValueError where the folder is no run of txt2img.py."""
    listing = folder / "prompts.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing}: no such file: expected an output folder of txt2img.py")
    try:
        lines = [json.loads(line) for line in read_lines(listing)]
        paths = [folder / images / Path(line["file"]).name for line in lines]
        captions = [str(line["prompt"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{listing}: not a list of prompts ({type(error).__name__}: {error})") from None
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} pictures are missing, {missing[0]} first")
    return paths, captions


def main(args: argparse.Namespace) -> None:
    if (args.folder is None) == (args.write_captions is None):
        raise ValueError("give either a folder, or --write_captions FILE")
    if args.json:
        flags.check_file("--json", args.json, replace=True)
    if args.write_captions:
        flags.check_file("--write_captions", args.write_captions, replace=True)
        captions = draw_captions(args.n, args.seed)
        write_text(args.write_captions, "".join(f"{caption}\n" for caption in captions))
        print(f"{len(captions)} held-out captions in {args.write_captions}")
        return
    import dataclasses

    import numpy as np
    from PIL import Image

    from qncd.metrics.networks.scene_classifier import caption_accuracy

    paths, captions = read_run(args.folder, args.images)
    pictures = []
    for path in paths:
        with reading(path, "an image"):
            pictures.append(np.asarray(Image.open(regular_file(path)).convert("RGB")))
    if not pictures:
        raise ValueError(f"{args.folder / 'prompts.jsonl'}: no pictures")
    if len(shapes := {picture.shape for picture in pictures}) > 1:
        raise ValueError(f"{args.folder}: pictures of several sizes: {sorted(shapes)}")
    scores = dataclasses.asdict(caption_accuracy(np.stack(pictures), captions))
    print(f"{scores['count']} pictures of {args.folder / args.images}, per cent right by the bundled classifier:")
    for name, value in scores.items():
        if name != "count":
            print(f"  {name:12}{100 * value:6.1f}")
    if args.json:
        write_json(args.json, scores)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
