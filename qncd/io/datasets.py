"""The data sets of the bundled models, by the name in a config's `data.dataset`, with what they are conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qncd.io.fashion_mnist import load_fashion_mnist
from qncd.io.scenes import scene_dataset

DATASETS = ("FASHION_MNIST", "SCENES")
SCENES_SEEDS = {"train": 1, "test": 2}
SCENES_COUNTS = {"train": 30000, "test": 1000}
# Where "A above B" and "B below A" are equally frequent, neither the order of the objects nor the relation alone says where
# anything is, and 5,000 steps of training learned neither. With one wording rare the order alone says something.
SCENES_INVERSE = {"train": 0.2, "test": 0.5}


def load_conditioned(
    name: str, split: str, count: int | None = None, root: str | Path | None = None
) -> tuple[np.ndarray, Sequence[int] | Sequence[str]]:
    """Images of a data set and the class or caption of each.

    Args:
        name: a member of DATASETS.
        split: "train" or "test"; the test captions of SCENES are scenes that its training split never shows.
        count: only the first `count` images (SCENES are drawn, in any number); by default all.
        root: folder of the files on disk, where the data set has some.

    Returns:
        images uint8 (N, H, W, C), and N class labels or N captions.

    Raises:
        FileNotFoundError: the files of the data set are nowhere.
        ValueError: an unknown data set or split, a count below 1, or damaged files.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r}: allowed are {', '.join(DATASETS)}")
    if count is not None and count < 1:
        raise ValueError(f"count {count}: allowed are whole numbers, 1 or more")
    if name == "FASHION_MNIST":
        images, labels = load_fashion_mnist(split, root)
        return images[:count], labels[:count].tolist()
    if split not in SCENES_SEEDS:
        raise ValueError(f"split {split!r}: allowed are {', '.join(SCENES_SEEDS)}")
    return scene_dataset(count or SCENES_COUNTS[split], SCENES_SEEDS[split], split == "test", inverse=SCENES_INVERSE[split])
