"""MS-COCO caption annotations -> a prompt file for `qncd sample`, one caption an image, and the list of those images.

    qncd prompts --annotations captions_val2014.json --n 30000 --out val_ann.txt
    qncd prompts --annotations captions_val2014.json --out val_ann.txt --images val2014 --copy_to real

Writes OUT with a prompt a line and OUT's name with .images.txt, the image of each line. Which images, and which of an
image's captions, follows from --seed alone: not from the order of the annotations.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

from qncd.app import parser as cli


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("--annotations", type=Path, required=True, help="captions_*.json of MS-COCO")
    parser.add_argument("--out", type=Path, required=True, help="prompt file to write, e.g. val_ann.txt")
    parser.add_argument("--n", type=int, default=30000, help="images to draw (default 30000, as for FID-30k)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--images", type=Path, help="folder with the images: each one is checked to be there")
    parser.add_argument("--copy_to", type=Path, help="copy those images here, for evaluator.py")
    return parser


def read_captions(path: Path) -> dict[str, list[str]]:
    """File name of each image -> its captions, white space made single. Raises ValueError for another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(f"--annotations {path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(names[annotation["image_id"]], []).append(" ".join(str(annotation["caption"]).split()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--annotations {path}: no caption annotations of MS-COCO ({type(error).__name__}: {error})") from None
    return {name: texts for name, found in captions.items() if (texts := [text for text in found if text])}


def draw(captions: dict[str, list[str]], count: int, seed: int) -> list[tuple[str, str]]:
    """`count` images and one caption of each, in the order of the draw."""
    if not 1 <= count <= len(captions):
        raise ValueError(f"--n {count}: allowed are 1 to {len(captions)}, the images with captions")
    generator = random.Random(seed)
    return [(name, generator.choice(sorted(captions[name]))) for name in generator.sample(sorted(captions), count)]


def main(args: argparse.Namespace) -> None:
    if args.copy_to and not args.images:
        raise ValueError("--copy_to needs --images FOLDER")
    chosen = draw(read_captions(args.annotations), args.n, args.seed)
    if args.images:
        missing = [name for name, _ in chosen if not (args.images / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"--images {args.images}: {len(missing)} of {len(chosen)} images are missing, {missing[0]} first"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(f"{caption}\n" for _, caption in chosen), encoding="utf-8")
    listing = args.out.with_suffix(".images.txt")
    listing.write_text("".join(f"{name}\n" for name, _ in chosen), encoding="utf-8")
    if args.copy_to:
        args.copy_to.mkdir(parents=True, exist_ok=True)
        for name, _ in chosen:
            shutil.copyfile(args.images / name, args.copy_to / Path(name).name)
    print(f"{len(chosen)} prompts in {args.out}, their images in {listing}")
