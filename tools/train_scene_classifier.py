#!/usr/bin/env python3
"""Train the classifier that reads pictures of scenes, to measure how often the bundled text-to-image model is right.

    python tools/train_scene_classifier.py --first_stage runs/scenes/first_stage

About 3 minutes on one CPU core. Half of the pictures that it learns from are blurred and noisy, and with --first_stage a
third has been through that autoencoder, with a little noise on the latents, as generated pictures have. Writes
OUT/scene_classifier.safetensors (half precision, accuracies on held-out scenes in its metadata).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qncd.app import flags
from qncd.app import parser as cli

if TYPE_CHECKING:
    import numpy as np
    import torch

ASSETS = Path(__file__).resolve().parents[1] / "qncd" / "assets"


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the file")
    parser.add_argument("--first_stage", type=Path, help="diffusers folder of the autoencoder that decodes the model's pictures")
    parser.add_argument("--images", type=int, default=20000, help="training pictures (default: %(default)s)")
    parser.add_argument("--test_images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the one-cycle schedule (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=functools.partial(cli.seed, high=2**32 - 1), default=0)
    return parser.parse_args()


def clutter(count: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures that no caption describes, uint8 (count, 64, 64, 3): no object, or three, away from one another."""
    import numpy as np

    from qncd.io.scenes import IMAGE_SIZE, all_objects, blank_canvas, draw_object_, to_uint8

    objects, pictures = all_objects(), []
    for _ in range(count):
        canvas, centres = blank_canvas(rng), np.empty((0, 2))
        while len(centres) < 3 and rng.random() > 0.1:
            centre = rng.uniform(10, IMAGE_SIZE - 10, 2)
            if not len(centres) or np.hypot(*(centres - centre).T).min() > 20:
                centres = np.vstack([centres, centre])
        for x, y in centres if len(centres) == 3 else ():
            draw_object_(canvas, objects[rng.integers(len(objects))], (x, y), rng)
        pictures.append(to_uint8(canvas))
    return np.stack(pictures)


def through_first_stage(images: torch.Tensor, folder: Path, latent_noise: float) -> torch.Tensor:
    """uint8 NHWC images, encoded, disturbed by noise of `latent_noise` standard deviations of the latents, decoded."""
    import torch

    from qncd.models.files.diffusers_folders import load_component

    autoencoder = load_component(folder, ("AutoencoderKL",))
    parts = []
    with torch.no_grad():
        for batch in images.split(100):
            latents = autoencoder.encode(batch.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
            latents = latents + latent_noise * torch.rand(len(batch), 1, 1, 1) * latents.std() * torch.randn_like(latents)
            decoded = autoencoder.decode(latents).sample
            parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(parts)


def disturb(batch: torch.Tensor) -> torch.Tensor:
    """Blur half of the batch (one width for all) and make the same half noisy; [-1, 1] float NCHW."""
    import torch
    from torchvision.transforms.functional import gaussian_blur

    half = len(batch) // 2
    blurred = gaussian_blur(batch[:half], 5, float(torch.empty(()).uniform_(0.2, 1.2)))
    return torch.cat([blurred + 0.15 * torch.rand(half, 1, 1, 1) * torch.randn_like(blurred), batch[half:]])


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("images", "test_images", "epochs", "batch_size", "threads"))
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr {args.lr}: allowed are numbers above 0")
    flags.check_output_folder("--out", args.out)
    import numpy as np
    import torch

    from qncd.io.scenes import parse_caption, scene_dataset
    from qncd.metrics.networks.scene_classifier import SceneClassifier, caption_accuracy, scene_targets
    from qncd.training.classifiers import save_classifier, train_classifier_

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    array, captions = scene_dataset(args.images, args.seed + 10)
    others = clutter(args.images // 20, np.random.default_rng(args.seed))
    images = torch.from_numpy(np.concatenate([array, others]))
    if args.first_stage:
        chosen = torch.randperm(len(images))[: len(images) // 3]
        images[chosen] = through_first_stage(images[chosen], args.first_stage, latent_noise=0.2)
    targets = torch.tensor([scene_targets(parse_caption(c)) for c in captions] + len(others) * [scene_targets(None)])

    def loss(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        groups = zip(logits, labels.unbind(1), strict=True)
        return torch.stack([torch.nn.functional.cross_entropy(g, label, ignore_index=-1) for g, label in groups]).sum()

    network = SceneClassifier()
    train_classifier_(network, images, targets, loss, disturb, args.epochs, args.batch_size, args.lr)
    array, captions = scene_dataset(args.test_images, args.seed + 11, held_out=True)
    test = {"rendered": torch.from_numpy(array)}
    if args.first_stage:
        test["through the first stage"] = through_first_stage(test["rendered"], args.first_stage, latent_noise=0.0)
    metadata = {"epochs": str(args.epochs), "seed": str(args.seed), "images": str(args.images)}
    for name, pictures in test.items():
        scores = vars(caption_accuracy(pictures, captions, network))
        rates = {key: round(100 * value, 2) for key, value in scores.items() if key != "count"}
        metadata[name] = json.dumps(rates)
        print(f"held-out scenes, {name}, per cent right of {len(captions)}: {json.dumps(rates)}")
    save_classifier(network, args.out / "scene_classifier.safetensors", metadata)
    print(f"wrote {args.out / 'scene_classifier.safetensors'}")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
