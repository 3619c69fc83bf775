"""Scores from features alone: Frechet distance, inception score, precision and recall, PSNR. No network is called here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of one feature over a set of images.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, the unbiased covariance (divided by N - 1), as `numpy.cov` gives it.
        count: number of images N; None where a file does not say it.

    Raises:
        ValueError: the shapes do not belong together, or a value is NaN or infinite.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.mu.size == 0 or self.sigma.shape != (self.mu.size, self.mu.size):
            raise ValueError(f"mu of shape {self.mu.shape} and sigma of shape {self.sigma.shape}: expected (D,) and (D, D)")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("the statistics hold NaN or infinite values")

    @property
    def dimension(self) -> int:
        return self.mu.size


class StatisticsAccumulator:
    """Mean and covariance of a stream of features, in float64 and in memory of D x D whatever the number of images.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which does not subtract large sums.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, features: torch.Tensor) -> None:
        """Add a batch of features (N, D).

        Raises:
            ValueError: the batch is not (N, D) with the D of the batches before, or holds NaN or infinite values.
        """
        if features.ndim != 2:
            raise ValueError(f"features of shape {tuple(features.shape)}: expected (N, D)")
        batch = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(batch).all():
            raise ValueError("the features hold NaN or infinite values")
        if len(batch) == 0:
            return
        if self.count == 0:
            self._mean = torch.zeros(batch.shape[1], dtype=torch.float64)
            self._scatter = torch.zeros(batch.shape[1], batch.shape[1], dtype=torch.float64)
        if batch.shape[1] != len(self._mean):
            raise ValueError(f"features of {batch.shape[1]} dimensions after features of {len(self._mean)}")
        total = self.count + len(batch)
        mean = batch.mean(0)
        centred = batch - mean
        delta = mean - self._mean
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(delta, delta, alpha=self.count * len(batch) / total)
        self._mean += delta * (len(batch) / total)
        self.count = total

    def finish(self) -> FeatureStatistics:
        """The statistics of all batches.

        Raises:
            ValueError: fewer than 2 images: their covariance is undefined.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} image{'s' * (self.count != 1)}: a covariance needs at least 2")
        return FeatureStatistics(self._mean.numpy().copy(), (self._scatter / (self.count - 1)).numpy(), self.count)


def features_to_statistics(features: torch.Tensor) -> FeatureStatistics:
    """Statistics of features (N, D) that are in memory; see `StatisticsAccumulator`."""
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    return accumulator.finish()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    S_a S_b has the eigenvalues of A^T S_b A for any A with A A^T = S_a, and that matrix is symmetric: two symmetric
    eigenproblems take the place of the square root of a general matrix, which on singular covariances (fewer images
    than dimensions) loses digits, turns complex or fails. Source: Heusel et al. 2017, eq. 6.

    Raises:
        ValueError: the statistics have different dimensions.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"statistics of {a.dimension} and of {b.dimension} dimensions cannot be compared")
    # The distance is symmetric. Factoring the set of fewer images makes A narrow, and A^T S_b A regular, when it is
    # singular: rounding noise of an eigenvalue 0 would add its square root, 1e-8 of the largest one.
    if b.count is not None and (a.count is None or b.count < a.count):
        a, b = b, a
    values, vectors = np.linalg.eigh((a.sigma + a.sigma.T) / 2)
    keep = values > max(values[-1], 0.0) * a.dimension * np.finfo(np.float64).eps
    factor = vectors[:, keep] * np.sqrt(values[keep])  # (D, rank)
    trace_root = 0.0
    if factor.shape[1]:
        product = factor.T @ ((b.sigma + b.sigma.T) / 2) @ factor  # (rank, rank)
        trace_root = float(np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum())
    difference = a.mu - b.mu
    distance = float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_root)
    return max(distance, 0.0)  # equal sets give 0 up to rounding, of either sign


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (ddof 0) of the score over the splits."""

    mean: float
    std: float
    splits: int


def _split_scores(logits: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> InceptionScore:
    if logits.ndim != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}: expected (N, classes)")
    logits = logits.detach().to("cpu", torch.float64)
    p = logits.softmax(1)
    if torch.isnan(p).any():
        raise ValueError("the logits hold NaN or infinite values")
    scores = []
    for start, stop in bounds:
        part = p[start:stop]
        # entr and xlogy take 0 log 0 as 0: a class of probability 0 adds nothing.
        divergence = -torch.special.entr(part).sum(1) - torch.special.xlogy(part, part.mean(0, keepdim=True)).sum(1)
        scores.append(math.exp(divergence.mean().item()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores))


def inception_score(logits: torch.Tensor, splits: int = 10) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))) over contiguous splits, in the order of the images (Salimans et al. 2016).

    Args:
        logits: (N, classes); for probabilities p pass log(p), whose softmax is p.
        splits: number of contiguous parts, 10 by convention; part i holds the images i N // splits to (i + 1) N // splits.

    Raises:
        ValueError: fewer images than splits, or NaN.
    """
    count = len(logits)
    if splits < 1 or count < splits:
        raise ValueError(f"{count} images in {splits} splits: every split needs at least one image")
    return _split_scores(logits, [(i * count // splits, (i + 1) * count // splits) for i in range(splits)])


def inception_score_adm(logits: torch.Tensor, split_size: int = 5000) -> InceptionScore:
    """The same score as ADM's evaluator takes it: parts of `split_size` images, the last one may be shorter.

    Args:
        logits: (N, classes), see `inception_score`.
        split_size: images in a part; ADM uses 5000 and reports the mean alone.

    Raises:
        ValueError: no images, a split size below 1, or NaN.
    """
    if split_size < 1 or len(logits) == 0:
        raise ValueError(f"{len(logits)} images in splits of {split_size}: both have to be at least 1")
    return _split_scores(logits, [(i, min(i + split_size, len(logits))) for i in range(0, len(logits), split_size)])


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, M) squared Euclidean distances of a (N, D) and b (M, D), in their dtype."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
    return squares.clamp_(min=0)


def neighbour_radii(features: torch.Tensor, k: int = 3, block: int = 1000) -> torch.Tensor:
    """Squared distance of every sample to its k-th neighbour, itself not counted, (N,) float64.

    Raises:
        ValueError: there are not more than k samples.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} images: the neighbour number {k} needs at least {k + 1}")
    features = features.double()
    return torch.cat([_squared_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(block)])


def precision_recall(real: torch.Tensor, synthetic: torch.Tensor, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Args:
        real, synthetic: features (N, D) and (M, D).
        k: the ball around a sample reaches its k-th neighbour; ADM uses 3.
        block: rows of the distance matrix in memory at once.

    Returns:
        precision, the share of synthetic samples in a ball of a real one, and recall, the reverse.
    """

    def covered(samples: torch.Tensor, centres: torch.Tensor) -> float:
        centres = centres.double()
        radii = neighbour_radii(centres, k, block)
        inside = [(_squared_distances(rows, centres) <= radii).any(1) for rows in samples.double().split(block)]
        return float(torch.cat(inside).double().mean())

    return covered(synthetic, real), covered(real, synthetic)


def paired_mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared error of each pair of images.

    Args:
        a, b: uint8 NHWC of one shape.

    Returns:
        (N,) float64, on the scale of 0 to 255.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images of shape {a.shape} and {b.shape}: expected two batches NHWC of one shape")
    return np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))


def mse_to_psnr(mse: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """10 log10(peak^2 / MSE) in dB; infinite where two images are equal."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / np.asarray(mse, np.float64))


def paired_psnr(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images uint8 NHWC, (N,) float64 in dB."""
    return mse_to_psnr(paired_mse(a, b), peak)
