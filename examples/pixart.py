"""PixArt-Sigma, a diffusion transformer, with 4-bit weights and activations of 6 bits in the mean.

    python examples/pixart.py
    python examples/pixart.py PixArt-alpha/PixArt-XL-2-512x512 --out out/alpha

Prints where the bits went and writes a picture: full precision, quantized.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

import qncd

PROMPT = "a lighthouse on a cliff at dawn, oil on canvas"
CALIBRATION = [
    "a bowl of lemons on a wooden table",
    "a street in the rain at night",
    "portrait of an old sailor",
    "a red fox in snow",
]
ARGUMENTS = {"use_resolution_binning": False, "clean_caption": False}  # of every call: the model's own size, prompts as they are


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")

    def draw():
        return pipe(PROMPT, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0), **ARGUMENTS).images[0]

    exact = draw()
    calls = [{"prompt": CALIBRATION, **ARGUMENTS}] * args.calls
    report = qncd.quantize(pipe, "W4A6", calls=calls, steps=args.steps)
    print(report)
    print(
        "layers by bits of their input:",
        dict(sorted(Counter(layer.act_bits for layer in report.layers if layer.act_bits).items())),
    )
    qncd.save(pipe, args.out / "quantized")
    make_image_grid([exact, draw()], rows=1, cols=2).save(args.out / "compared.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", help="hub id or folder")
    parser.add_argument("--out", type=Path, default=Path("out/pixart"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument(
        "--calls", type=int, default=4, help="of the pipeline for calibration, 4 images each (default: %(default)s)"
    )
    main(parser.parse_args())
