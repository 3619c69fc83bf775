"""What each synthetic image adds to FID and to the inception score, to first order: the base of their intervals.

Resampling images with replacement and computing FID again does not work: fewer distinct images raise FID by more than its
noise, so the interval misses the figure that it belongs to. The weighted mean of influences has no such bias, and a
thousand resamples cost one pass over the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qncd.metrics.networks.store import Rows
from qncd.metrics.statistics.moments import FeatureStatistics, covariance_factor

_SMALLEST = 1e-10  # singular values below it, relative to the largest, count as 0


def frechet_influence(rows: Rows, statistics: FeatureStatistics, reference: FeatureStatistics) -> np.ndarray:
    """d FID / d weight of each image, times N, centred, with the reference held fixed.

    With the centred features c_i and S_ref = B B^T: 2 (mu - mu_ref).c_i + (|c_i|^2 - N [K^(1/2)]_ii (N - 1) / N) N / (N - 1),
    where K = C S_ref C^T / (N - 1) has the eigenvalues whose roots FID sums. For N > D its diagonal comes from
    B^T S B = V L V^T: [K^(1/2)]_ii = |L^(-1/4) V^T B^T c_i|^2 / (N - 1).

    Args:
        rows: features (N, D) of the synthetic images.
        statistics: their mean and covariance.
        reference: of the real images.

    Returns:
        (N,) float64; the standard error of FID is about its standard deviation over sqrt(N), rather more than less.

    Raises:
        ValueError: the eigenvectors of the covariances cannot be found.
    """
    n = rows.count
    mean = torch.from_numpy(statistics.mu)
    difference = torch.from_numpy(statistics.mu - reference.mu)
    factor = torch.from_numpy(np.ascontiguousarray(covariance_factor(reference)))  # B (D, rank)
    if n <= rows.dimension:
        projected = (rows.read().double() - mean) @ factor / (n - 1) ** 0.5
        values, vectors = _eigenvectors(projected @ projected.T)
        diagonal = vectors.square() @ values.clamp(min=0).sqrt()
    else:
        values, vectors = _eigenvectors(factor.T @ torch.from_numpy(statistics.sigma) @ factor)
        roots = values.clamp(min=0).sqrt()
        largest = roots.max() if len(roots) else 0.0  # constant reference images have a factor of rank 0
        weights = torch.where(roots > _SMALLEST * largest, 1 / roots, 0.0)
        turn = factor @ vectors  # (D, rank)
        parts = [((block.double() - mean) @ turn).square() @ weights for block in rows.blocks()]
        diagonal = torch.cat(parts) / (n - 1)
    linear = []
    for block in rows.blocks():
        centred = block.double() - mean
        linear.append(2 * centred @ difference + centred.square().sum(1) * n / (n - 1))
    influence = (torch.cat(linear) - n * diagonal).numpy()
    return influence - influence.mean()


def _eigenvectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"no interval of FID: {' '.join(str(error).split())[:160]}") from None
    return values, vectors


def score_influence(logits: Rows, parts: Sequence[np.ndarray]) -> np.ndarray:
    """d IS / d weight of each image, times N: the score of its part times (KL(p_i || p) - mean), p the part's mean.

    Args:
        logits: (N, classes).
        parts: the images of each part of the score; together all of them.

    Returns:
        (N,) float64 of mean 0.
    """
    influence = np.zeros(logits.count)
    for part in parts:
        p = logits.take(part).double().softmax(1)
        divergence = -torch.special.entr(p).sum(1) - torch.special.xlogy(p, p.mean(0)).sum(1)
        score = divergence.mean().exp()
        scale = logits.count / (len(parts) * len(part))
        influence[part] = (scale * score * (divergence - divergence.mean())).numpy()
    return influence
