#!/usr/bin/env python3
"""MS-COCO caption annotations -> a prompt file for txt2img.py, one caption an image, and the list of those images.

    python scripts/coco_prompts.py --annotations captions_val2014.json --n 30000 --out val_ann.txt
    python scripts/coco_prompts.py --annotations captions_val2014.json --out val_ann.txt --images val2014 --copy_to real

Writes OUT with a prompt a line and OUT's name with .images.txt, the image of each line. Which images, and which of an
image's captions, follows from --seed alone: not from the order of the annotations.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import prompts as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
