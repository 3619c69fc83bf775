"""Scores from features alone: mean and covariance, Frechet distance, inception score, PSNR. No network is called here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

SYMMETRIC = 1e-4  # of the largest variance: what float16 and float32 may have left of a symmetric matrix
POSITIVE = 1e-3  # of the largest eigenvalue: a smaller negative one is rounding, e.g. of a singular sigma in float16
POOR = 20.0  # dB: an image below it is another picture
REGULAR = 1e-6  # of the diagonal of a Cholesky factor, least over largest: below it, sigma counts as singular


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of one feature over a set of images.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, the unbiased covariance (divided by N - 1), as `numpy.cov` gives it.
        count: number of images N; None where a file does not say it.
        factor: (D, N) with factor factor^T = sigma, kept where N is not larger than D: it makes distances exact and quick.

    Raises:
        ValueError: the shapes do not belong together, a value is NaN or infinite, or sigma is not symmetric or has a negative
            variance.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    factor: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.mu.size == 0 or self.sigma.shape != (self.mu.size, self.mu.size):
            raise ValueError(f"mu of shape {self.mu.shape} and sigma of shape {self.sigma.shape}: expected (D,) and (D, D)")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("the statistics hold NaN or infinite values")
        variances = np.diagonal(self.sigma)
        if variances.min() < 0:
            raise ValueError(f"sigma has a variance of {variances.min():.3g}, allowed are 0 and more")
        if np.abs(self.sigma - self.sigma.T).max() > SYMMETRIC * variances.max():
            raise ValueError("sigma is not symmetric")

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
    """Statistics of features (N, D) that are in memory, with their factor where N <= D; see `StatisticsAccumulator`."""
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    statistics = accumulator.finish()
    if len(features) > statistics.dimension:
        return statistics
    centred = features.detach().cpu().double().numpy() - statistics.mu
    return replace(statistics, factor=np.ascontiguousarray(centred.T) / math.sqrt(len(features) - 1))


def covariance_factor(a: FeatureStatistics) -> np.ndarray:
    """A (D, rank or N) with A A^T = sigma: the one at hand, Cholesky's where sigma is regular, else from eigenvectors."""
    if a.factor is not None:
        return a.factor
    sigma = a.sigma / 2 + a.sigma.T / 2
    if a.count is None or a.count > a.dimension:
        try:
            lower = np.linalg.cholesky(sigma)
        except np.linalg.LinAlgError:
            pass
        else:
            diagonal = np.diagonal(lower)
            if diagonal.min() > REGULAR * diagonal.max():
                return lower
    values, vectors = np.linalg.eigh(sigma)
    _check_positive(values)
    keep = values > max(values[-1], 0.0) * a.dimension * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance of two Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    S_a S_b has the eigenvalues of A^T S_b A for any A with A A^T = S_a, and that matrix is symmetric: a Cholesky factor
    and one symmetric eigenproblem take the place of the square root of a general matrix, which on singular covariances
    (fewer images than dimensions) loses digits, turns complex or fails. Source: Heusel et al. 2017, eq. 6.

    Raises:
        ValueError: the statistics have different dimensions, are no covariances, or are too large for float64.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"statistics of {a.dimension} and of {b.dimension} dimensions cannot be compared")
    # The distance is symmetric. Factoring the set of fewer images makes A narrow, and A^T S_b A regular, when it is
    # singular: rounding noise of an eigenvalue 0 would add its square root, 1e-8 of the largest one.
    if b.count is not None and (a.count is None or b.count < a.count):
        a, b = b, a
    if a.factor is not None and b.factor is not None:
        trace_root = float(np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum())
        return assemble_frechet(a, b, trace_root)
    factor = covariance_factor(a)  # (D, rank)
    trace_root = 0.0
    if factor.shape[1]:
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.linalg.eigvalsh(factor.T @ (b.sigma / 2 + b.sigma.T / 2) @ factor)  # (rank,)
        _check_positive(values)
        trace_root = float(np.sqrt(values.clip(min=0)).sum())
    return assemble_frechet(a, b, trace_root)


def _check_positive(values: np.ndarray) -> None:
    """Raise ValueError where a covariance has eigenvalues, in ascending order, that are negative beyond rounding."""
    if values[0] < -POSITIVE * abs(values[-1]):
        raise ValueError(f"sigma has a negative eigenvalue ({values[0]:.3g}, the largest is {values[-1]:.3g}): no covariance")


def assemble_frechet(a: FeatureStatistics, b: FeatureStatistics, trace_root: float) -> float:
    """The distance from tr (S_a S_b)^(1/2); equal sets give 0 up to rounding, of either sign, which is clipped.

    Raises:
        ValueError: it is NaN or infinite.
    """
    difference = a.mu - b.mu
    with np.errstate(over="ignore", invalid="ignore"):
        value = float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_root)
    if not math.isfinite(value):
        raise ValueError(f"the distance is {value}: the statistics are too large for float64")
    return max(value, 0.0)


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (ddof 0) of the score over the splits."""

    mean: float
    std: float
    splits: int


def split_score(blocks: Iterable[torch.Tensor]) -> float:
    """exp(E KL(p(y|x) || p(y))) of one part, from blocks of its logits (n, classes); memory does not grow with them.

    Raises:
        ValueError: the logits are not (n, classes), or hold NaN.
    """
    count, negative_entropy, total = 0, 0.0, torch.zeros(0, dtype=torch.float64)
    for logits in blocks:
        if logits.ndim != 2:
            raise ValueError(f"logits of shape {tuple(logits.shape)}: expected (N, classes)")
        p = logits.detach().to("cpu", torch.float64).softmax(1)
        if torch.isnan(p).any():
            raise ValueError("the logits hold NaN or infinite values")
        total = p.sum(0) if count == 0 else total + p.sum(0)
        negative_entropy -= torch.special.entr(p).sum().item()  # entr takes 0 log 0 as 0
        count += len(p)
    marginal = total / count
    return math.exp(negative_entropy / count + torch.special.entr(marginal).sum().item())


def equal_parts(count: int, splits: int) -> list[tuple[int, int]]:
    """Bounds of contiguous parts: part i holds i N // splits to (i + 1) N // splits.

    Raises:
        ValueError: fewer images than splits.
    """
    if splits < 1 or count < splits:
        raise ValueError(f"{count} images in {splits} splits: every split needs at least one image")
    return [(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def parts_of_size(count: int, split_size: int) -> list[tuple[int, int]]:
    """Bounds of contiguous parts of `split_size`, the last one may be shorter.

    Raises:
        ValueError: no images, or a split size below 1.
    """
    if split_size < 1 or count == 0:
        raise ValueError(f"{count} images in splits of {split_size}: both have to be at least 1")
    return [(i, min(i + split_size, count)) for i in range(0, count, split_size)]


def summarize_splits(scores: Sequence[float]) -> InceptionScore:
    """The scores of the parts as mean and standard deviation (ddof 0)."""
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores))


def inception_score(logits: torch.Tensor, splits: int = 10) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))) over contiguous splits, in the order of the images (Salimans et al. 2016).

    Args:
        logits: (N, classes); for probabilities p pass log(p), whose softmax is p.
        splits: number of contiguous parts, 10 by convention.

    Raises:
        ValueError: fewer images than splits, or NaN.
    """
    return summarize_splits([split_score([logits[start:stop]]) for start, stop in equal_parts(len(logits), splits)])


def inception_score_adm(logits: torch.Tensor, split_size: int = 5000) -> InceptionScore:
    """The same score as ADM's evaluator takes it: parts of `split_size` images, the last one may be shorter.

    Args:
        logits: (N, classes), see `inception_score`.
        split_size: images in a part; ADM uses 5000 and reports the mean alone.

    Raises:
        ValueError: no images, a split size below 1, or NaN.
    """
    return summarize_splits([split_score([logits[start:stop]]) for start, stop in parts_of_size(len(logits), split_size)])


def paired_mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared error of each pair of images.

    Args:
        a, b: uint8 NHWC of one shape.

    Returns:
        (N,) float64, on the scale of 0 to 255.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images of shape {a.shape} and {b.shape}: expected two batches NHWC of one shape")
    errors = (np.subtract(x, y, dtype=np.float64).ravel() for x, y in zip(a, b, strict=True))  # of one pair at a time in memory
    return np.array([error @ error / error.size for error in errors])


def mse_to_psnr(mse: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """10 log10(peak^2 / MSE) in dB; infinite where two images are equal."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / np.asarray(mse, np.float64))


def paired_psnr(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images uint8 NHWC, (N,) float64 in dB."""
    return mse_to_psnr(paired_mse(a, b), peak)


@dataclass(frozen=True)
class PairedQuality:
    """PSNR over image pairs, in dB. A few poor images hide in its mean; the other figures show them.

    Attributes:
        psnr: its mean.
        psnr_of_mean: PSNR of the mean squared error over all pairs.
        psnr_p5: its 5th percentile: of the pairs in their order, the lower neighbour.
        poor: percentage of the pairs below POOR.
    """

    psnr: float
    psnr_of_mean: float
    psnr_p5: float
    poor: float

    @classmethod
    def of(cls, mse: np.ndarray) -> PairedQuality:
        """Of pairs with these squared errors (N,) on the scale of 0 to 255; equal images have an infinite PSNR."""
        psnr = mse_to_psnr(mse)
        fifth = float(np.percentile(psnr, 5, method="lower"))
        return cls(float(psnr.mean()), float(mse_to_psnr(mse.mean())), fifth, 100 * float((psnr < POOR).mean()))

    def __str__(self) -> str:
        return (
            f"{self.psnr:.2f} dB in the mean, {self.psnr_of_mean:.2f} dB of the mean error, 5th percentile "
            f"{self.psnr_p5:.2f} dB, {self.poor:.1f} % of the images under {POOR:g} dB"
        )
