#!/usr/bin/env python3
"""Text to image with Stable Diffusion or the small bundled model, in full precision or quantized (--ptq).

    python scripts/txt2img.py --plms --prompt "a large red circle above a small blue square" --outdir out/txt2img
    python scripts/txt2img.py --plms --cond --ptq --weight_bit 8 --quant_mode qncd --quant_act --act_bit 8 \\
        --cali_st 25 --cali_batch_size 1 --cali_n 128 --no_grad_ckpt --scale_split_static --sample_reverse \\
        --reverse_interval 10 --running_stat --sm_abit 16 --from_file val_ann.txt --n_samples 2
    python scripts/txt2img.py --config configs/sd-v1-inference.yaml --ckpt sd-v1-4.ckpt --plms --prompt "a cat" --outdir out/sd

Without --config and --ckpt it samples the bundled model (configs/scenes.yaml). The output folder holds images/,
prompts.jsonl (which image has which prompt and seed), contact_sheet.png and run.json; the same command line goes on
with a run that was cut off.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, so that a signal during them ends this command as it should
    from qncd.app import stopping

    stopping.install()

import argparse
from collections.abc import Sequence

from qncd.app.commands import txt2img as command
from qncd.app.parser import run_main

main = command.main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command.make_parser(__doc__ or "").parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
