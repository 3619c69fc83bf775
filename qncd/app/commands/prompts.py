"""MS-COCO caption annotations -> a prompt file for `qncd sample`, one caption an image, and the list of those images.

    qncd prompts --annotations captions_val2014.json --n 30000 --out val_ann.txt
    qncd prompts --annotations captions_val2014.json --out val_ann.txt --images val2014 --copy_to real

Writes OUT with a prompt a line and OUT's name with .images.txt, the image of each line. Which images, and which of an
image's captions, follows from --seed alone: not from the order of the annotations.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from pathlib import Path, PureWindowsPath
from typing import Any

from qncd.app import parser as cli
from qncd.io.files import read_json, regular_file, whole_file, write_text
from qncd.io.prompts import check_text

_TYPES = {dict: "an object", list: "a list", int: "a whole number", str: "text"}


def make_parser(description: str = __doc__ or "") -> argparse.ArgumentParser:
    parser = cli.make_parser(description)
    parser.add_argument("--annotations", type=Path, required=True, help="captions_*.json of MS-COCO")
    parser.add_argument("--out", type=Path, required=True, help="prompt file to write, e.g. val_ann.txt")
    parser.add_argument("--n", type=int, default=30000, help="images to draw (default 30000, as for FID-30k)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--images", type=Path, help="folder with the images: each one is checked to be there")
    parser.add_argument("--copy_to", type=Path, help="copy those images here, with their sub-folders, for evaluator.py")
    return parser


def read_captions(path: Path) -> dict[str, list[str]]:
    """File name of each image -> its captions, white space made single.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or an image's path leads out of its folder.
    """
    try:
        content = read_json(path)
        names: dict[int | str, str] = {}
        for i, image in enumerate(_field(content, "the file", "images", list)):
            where = f"images[{i}]"
            key, name = _field(image, where, "id", int, str), _field(image, where, "file_name", str)
            if names.setdefault(key, check_file_name(name, where)) != name:
                raise ValueError(f"{where}: id {key!r} is that of another image")
        captions: dict[str, list[str]] = {}
        for i, annotation in enumerate(_field(content, "the file", "annotations", list)):
            where = f"annotations[{i}]"
            key, caption = _field(annotation, where, "image_id", int, str), _field(annotation, where, "caption", str)
            if key not in names:
                raise ValueError(f"{where}: image_id {key!r} is no id of images")
            text = " ".join(check_text(caption, where).removeprefix("\ufeff").split())  # else the list would begin with a BOM
            captions.setdefault(names[key], []).append(text)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--annotations {error}") from None
    except ValueError as error:
        raise ValueError(f"--annotations {path}: no caption annotations of MS-COCO ({error})") from None
    return {name: texts for name, found in captions.items() if (texts := [text for text in found if text])}


def _field(value: Any, where: str, key: str, *kinds: type) -> Any:
    """A value of a JSON object, of one of these types. Raises ValueError naming the key."""
    words = " or ".join(_TYPES[kind] for kind in kinds)
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"{where} has no {key}, expected {words}")
    found = value[key]
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise ValueError(f"{where}: {key} is {ascii(found)[:40]}, expected {words}")
    return found


def check_file_name(name: str, where: str) -> str:
    """The path of an image below a folder. Raises ValueError for one that leads out of it, or is more than a line of text."""
    check_text(name, where)
    parts = name.replace("\\", "/").split("/")
    if not name.isprintable() or not parts[-1] or ".." in parts or PureWindowsPath(name).anchor:
        raise ValueError(f"{where}: file_name {name!a}, expected a path below the folder of the images")
    return name


def _find_image(folder: Path, name: str) -> Path | None:
    """The image's file, None where there is none. Raises ValueError for a link that leads out of the folder."""
    path = folder / name
    if not os.path.exists(path):
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--images {path}: a link that leads out of {folder}, to {path.resolve()}")
    return regular_file(path)


def draw(captions: dict[str, list[str]], count: int, seed: int) -> list[tuple[str, str]]:
    """`count` images and one caption of each, in the order of the draw."""
    if not 1 <= count <= len(captions):
        raise ValueError(f"--n {count}: allowed are 1 to {len(captions)}, the images with captions")
    generator = random.Random(seed)
    return [(name, generator.choice(sorted(captions[name]))) for name in generator.sample(sorted(captions), count)]


def main(args: argparse.Namespace) -> None:
    if args.copy_to and not args.images:
        raise ValueError("--copy_to needs --images FOLDER")
    listing = args.out.with_suffix(".images.txt")
    for path in (args.out, listing):
        if path.resolve() == args.annotations.resolve():
            raise ValueError(f"--out {path}: that is the file of --annotations")
        if os.path.isdir(path):
            raise ValueError(f"--out {path}: a folder, expected a file")
    if args.copy_to and args.copy_to.resolve() == args.images.resolve():
        raise ValueError(f"--copy_to {args.copy_to}: that is the folder of --images")
    chosen = draw(read_captions(args.annotations), args.n, args.seed)
    if args.images:
        files = [_find_image(args.images, name) for name, _ in chosen]
        missing = [name for (name, _), file in zip(chosen, files, strict=True) if file is None]
        if missing:
            raise FileNotFoundError(
                f"--images {args.images}: {len(missing)} of {len(chosen)} images are missing, {missing[0]} first"
            )
    if args.copy_to:
        for name, _ in chosen:
            target = args.copy_to / name
            if not target.resolve().is_relative_to(args.copy_to.resolve()):
                raise ValueError(f"--copy_to {target}: a link that leads out of {args.copy_to}")
            with whole_file(target) as part:
                shutil.copyfile(args.images / name, part)
    write_text(args.out, "".join(f"{caption}\n" for _, caption in chosen))
    write_text(listing, "".join(f"{name}\n" for name, _ in chosen))
    print(f"{len(chosen)} prompts in {args.out}, their images in {listing}")
