"""FLUX.1 or Z-Image, transformers under rectified flow, with 4-bit weights and 8-bit activations.

    python examples/flux.py
    python examples/flux.py black-forest-labs/FLUX.1-schnell --steps 4 --guidance 0 --out out/schnell
    python examples/flux.py Tongyi-MAI/Z-Image-Turbo --steps 9 --guidance 0 --out out/z_image

Writes the quantized pipeline and a picture: full precision, quantized.
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
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to("cuda" if torch.cuda.is_available() else "cpu")
    arguments = {"height": args.size, "width": args.size, "guidance_scale": args.guidance, "max_sequence_length": args.tokens}

    def draw():
        return pipe(PROMPT, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0), **arguments).images[0]

    exact = draw()
    calls = [{"prompt": prompt, **arguments} for prompt in CALIBRATION]  # calibrated as it will be called: size, guidance, tokens
    print(qncd.quantize(pipe, "W4A8", calls=calls, steps=args.steps, packed=True))  # codes alone: a quarter of bfloat16 weights
    qncd.save(pipe, args.out / "quantized")
    make_image_grid([exact, draw()], rows=1, cols=2).save(args.out / "compared.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="black-forest-labs/FLUX.1-dev", help="hub id or folder")
    parser.add_argument("--out", type=Path, default=Path("out/flux"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="of the image in pixels (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.5, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of the longest prompt (default: %(default)s)")
    main(parser.parse_args())
