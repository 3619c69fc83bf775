"""SDXL with 4-bit weights and 8-bit activations, in bfloat16 on a GPU where there is one; then loaded by diffusers alone.

    python examples/sdxl.py
    python examples/sdxl.py SG161222/RealVisXL_V5.0 --out out/realvis

Writes the quantized pipeline and a picture: full precision, quantized.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

import qncd  # what DiffusionPipeline needs to load a quantized folder

PROMPT = "a lighthouse on a cliff at dawn, oil on canvas"
CALIBRATION = [
    "a bowl of lemons on a wooden table",
    "a street in the rain at night",
    "portrait of an old sailor",
    "a red fox in snow",
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(DEVICE)

    def draw(pipe):
        return pipe(PROMPT, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0)).images[0]

    exact = draw(pipe)
    print(qncd.quantize(pipe, "W4A8", prompts=CALIBRATION, steps=args.steps, samples=args.samples))
    qncd.save(pipe, args.out / "quantized")

    again = DiffusionPipeline.from_pretrained(args.out / "quantized", dtype=torch.bfloat16).to(DEVICE)
    make_image_grid([exact, draw(again)], rows=1, cols=2).save(args.out / "compared.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="stabilityai/stable-diffusion-xl-base-1.0", help="hub id or folder")
    parser.add_argument("--out", type=Path, default=Path("out/sdxl"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of the sampler (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="images to calibrate with (default: %(default)s)")
    main(parser.parse_args())
