"""Kernel inception distance: the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qncd.metrics.networks.store import Rows

SUBSETS, SUBSET_SIZE = 100, 1000  # of torch-fidelity and of clean-fid
SEED = 2020  # of torch-fidelity
_PARTNERS = 2048  # points over which the kernel is averaged for the influence of one image


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation (ddof 0) over the subsets."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x.y / D + 1)^3 for x (N, D) and y (M, D)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate for two sets of the same number of samples (m, D), in their dtype.

    Raises:
        ValueError: fewer than 2 samples, or different numbers.
    """
    m = len(x)
    if m < 2 or len(y) != m:
        raise ValueError(f"{m} and {len(y)} samples: expected the same number, at least 2")
    within = sum((kernel.sum() - kernel.diagonal().sum()).item() for kernel in (cubic_kernel(x, x), cubic_kernel(y, y)))
    return within / (m * (m - 1)) - 2 * cubic_kernel(x, y).sum().item() / m**2


def kernel_distance(
    synthetic: Rows, real: Rows, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED
) -> KernelDistance:
    """The estimate averaged over random subsets, drawn as torch-fidelity draws them (its input 1 is `synthetic`).

    Args:
        synthetic, real: features.
        subsets, subset_size: how many of how many images each; smaller sets make smaller subsets.
        seed: of the draws.

    Raises:
        ValueError: fewer than 2 images on a side.
    """
    size = min(subset_size, synthetic.count, real.count)
    if size < 2:
        raise ValueError("KID needs at least 2 images on each side")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = synthetic.take(rng.choice(synthetic.count, size, replace=False)).double()
        y = real.take(rng.choice(real.count, size, replace=False)).double()
        values.append(squared_mmd(x, y))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, size)


def kernel_influence(synthetic: Rows, real: Rows, seed: int = SEED) -> np.ndarray:
    """What each synthetic image adds to KID, (N,) float64 of mean 0: 2 E k(x, x') - 2 E k(x, y), centred.

    The means run over at most 2048 random images of each side.
    """
    rng = np.random.RandomState(seed)
    means = []
    for rows in (synthetic, real):
        partners = rng.permutation(rows.count)[:_PARTNERS]
        points = rows.take(np.sort(partners)).double()
        totals = torch.cat([cubic_kernel(block.double(), points).sum(1) for block in synthetic.blocks(size=1024)])
        others = torch.full((synthetic.count,), float(len(points)), dtype=torch.float64)
        if rows is synthetic:  # an image is no partner of itself
            own = torch.from_numpy(np.sort(partners))
            totals[own] -= (points.square().sum(1) / points.shape[1] + 1) ** 3
            others[own] -= 1
        means.append(totals / others)
    influence = (2 * means[0] - 2 * means[1]).numpy()
    return influence - influence.mean()
