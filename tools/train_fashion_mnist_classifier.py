#!/usr/bin/env python3
"""Train the Fashion-MNIST classifier that the evaluator uses for --features fashion_mnist.

    python tools/train_fashion_mnist_classifier.py --out qncd/assets

Some minutes on one CPU core. Writes two files into OUT: fashion_mnist_classifier.safetensors (half precision, with its
test accuracy in the metadata) and fashion_mnist_statistics.npz (its features over the 60,000 training images).
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from qncd.app import flags
from qncd.app import parser as cli

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parents[1] / "qncd" / "assets"


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the two files")
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST idx files (default: where Debian puts them)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the one-cycle schedule (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=functools.partial(cli.seed, high=2**32 - 1), default=0)
    parser.add_argument("--statistics_only", action="store_true", help="keep the weights in OUT, write the statistics again")
    return parser.parse_args()


def flip_and_shift(batch: torch.Tensor) -> torch.Tensor:
    """Mirror half of the batch (N, 1, 32, 32) and move all of it by up to one pixel."""
    import torch

    flip = torch.rand(len(batch)) < 0.5
    batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    # One shift a batch: the black border of 2 pixels makes a roll by 1 the same as a translation.
    dx, dy = torch.randint(-1, 2, (2,)).tolist()
    return batch.roll((dy, dx), (2, 3))


def train(args: argparse.Namespace) -> None:
    """Train, measure the accuracy of the half-precision weights on the test split, write them."""
    import torch

    from qncd.io.fashion_mnist import load_fashion_mnist
    from qncd.metrics.networks.fashion_mnist_classifier import FashionMnistClassifier
    from qncd.training.classifiers import save_classifier, train_classifier_

    torch.manual_seed(args.seed)
    images, labels = (torch.from_numpy(array) for array in load_fashion_mnist("train", args.data))
    network = FashionMnistClassifier()
    train_classifier_(
        network, images, labels, lambda outputs, labels: torch.nn.functional.cross_entropy(outputs[2], labels),
        flip_and_shift, args.epochs, args.batch_size, args.lr,
    )  # fmt: skip
    images, labels = (torch.from_numpy(array) for array in load_fashion_mnist("test", args.data))
    with torch.no_grad():
        correct = sum(
            int((network(x.permute(0, 3, 1, 2).float() / 127.5 - 1)[2].argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    accuracy = 100 * correct / len(images)
    metadata = {"test_accuracy": f"{accuracy:.2f}", "epochs": str(args.epochs), "seed": str(args.seed)}
    save_classifier(network, args.out / "fashion_mnist_classifier.safetensors", metadata)
    print(f"accuracy on {len(images):,} test images: {accuracy:.2f} %")


def write_statistics(args: argparse.Namespace) -> None:
    """Features of the training images by the weights in OUT."""
    import torch

    from qncd.io.fashion_mnist import load_fashion_mnist
    from qncd.metrics.networks.features import FashionMnistFeatures
    from qncd.metrics.report.sources import SavedStatistics
    from qncd.metrics.statistics.moments import StatisticsAccumulator

    extractor = FashionMnistFeatures(args.out / "fashion_mnist_classifier.safetensors")
    features, spatial = StatisticsAccumulator(), StatisticsAccumulator()
    images, _ = load_fashion_mnist("train", args.data)
    for batch in torch.from_numpy(images).split(500):
        outputs = extractor(batch)
        features.update(outputs["features"])
        spatial.update(outputs["spatial"])
    path = args.out / "fashion_mnist_statistics.npz"
    SavedStatistics(path, features.finish(), spatial.finish(), extractor.name).save(path)
    print(f"wrote {path}")


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("epochs", "batch_size", "threads"))
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr {args.lr}: allowed are numbers above 0")
    flags.check_output_folder("--out", args.out)
    import torch

    torch.set_num_threads(args.threads)
    if not args.statistics_only:
        train(args)
    write_statistics(args)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
