"""Quantize a model and write the quantized checkpoint; sample images only where their number is asked for.

    qncd quantize --config configs/fashion_mnist.yml --weight_bit 4 --quant_mode qncd+ --cali_ckpt out/w4a8.safetensors
    qncd sample --config configs/fashion_mnist.yml --weight_bit 4 --quant_mode qncd+ --ptq --cali_ckpt out/w4a8.safetensors -l out
    qncd quantize --prompt "a large red circle above a small blue square" --cali_ckpt out/scenes.safetensors

The flags are those of `qncd sample --ptq` for the same model, and --cali_ckpt is required. Calibration runs along the sampler's
own steps: give it the flags that the images will be sampled with. A text-to-image model is calibrated on the prompts.
--max_images, -n or --n_samples (--n_iter) also samples images. run.json, and what a run that was cut off goes on with, lie in
-l; without it in a folder beside the checkpoint, out/w4a8_run here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qncd.app.commands.sample import Choice, choose_sampler, take_flags


def choose(words: Sequence[str]) -> Choice:
    """Parser, main and words for the model that the words mean.

    Raises:
        ValueError, FileNotFoundError: as `qncd sample` does, or --cali_ckpt is not given.
    """
    sampler, rest = choose_sampler(words)
    given, _ = take_flags(rest, checkpoint=("--cali_ckpt",), folder=(sampler.output,), images=sampler.image_flags)
    if given.checkpoint is None and not {"-h", "--help", "--help-all"} & set(rest):
        raise ValueError("quantize writes the quantized network: name its file with --cali_ckpt")
    if given.checkpoint is not None and given.folder is None:
        checkpoint = Path(given.checkpoint)
        rest += [sampler.output, str(checkpoint.with_name(f"{checkpoint.stem}_run"))]
    module = sampler.load()
    parser = module.make_parser(__doc__ or "")
    parser.set_defaults(ptq=True)

    def quantize(args: argparse.Namespace) -> None:
        setattr(args, sampler.count, 0)
        module.run(args)

    return parser, quantize if given.images is None else module.main, rest
