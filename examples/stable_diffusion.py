"""Stable Diffusion v1.5 with 8-bit weights and activations, on a CPU.

    python examples/stable_diffusion.py
    python examples/stable_diffusion.py models/my-fine-tune --out out/mine

Writes the quantized pipeline and a picture: full precision, quantized. The same network in integers is
docs/tutorials/export_and_run.ipynb.
"""

import argparse
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


def main(args: argparse.Namespace) -> None:
    pipe = DiffusionPipeline.from_pretrained(args.model)

    def draw():
        return pipe(PROMPT, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0)).images[0]

    exact = draw()
    print(qncd.quantize(pipe, "W8A8", prompts=CALIBRATION, steps=args.steps, samples=args.samples))
    qncd.save(pipe, args.out / "quantized")
    make_image_grid([exact, draw()], rows=1, cols=2).save(args.out / "compared.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="hub id or folder")
    parser.add_argument("--out", type=Path, default=Path("out/stable_diffusion"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="images to calibrate with (default: %(default)s)")
    main(parser.parse_args())
