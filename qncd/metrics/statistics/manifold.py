"""Improved precision and recall: is a sample inside the balls around the other set's samples (Kynkaanniemi et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NEIGHBOURS = 3  # as in ADM's evaluator


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, M) squared Euclidean distances of a (N, D) and b (M, D), in their dtype."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
    return squares.clamp_(min=0)


def neighbour_radii(features: torch.Tensor, k: int = NEIGHBOURS, block: int = 1000) -> torch.Tensor:
    """Squared distance of every sample to its k-th neighbour, itself not counted, (N,) float64.

    Raises:
        ValueError: there are not more than k samples.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} images: the neighbour number {k} needs at least {k + 1}")
    features = features.double()
    return torch.cat([_squared_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(block)])


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Both figures, and what each synthetic image adds to them.

    Attributes:
        precision: share of synthetic samples in a ball of a real one.
        recall: share of real samples in a ball of a synthetic one.
        precision_influence, recall_influence: (M,) float64, one value a synthetic image, of mean 0: the figure changes by
            their weighted mean when the images are weighted, to first order. For recall, by leaving each image out.
    """

    precision: float
    recall: float
    precision_influence: np.ndarray
    recall_influence: np.ndarray


def precision_recall(real: torch.Tensor, synthetic: torch.Tensor, k: int = NEIGHBOURS, block: int = 1000) -> tuple[float, float]:
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


def precision_recall_influence(
    real: torch.Tensor, synthetic: torch.Tensor, k: int = NEIGHBOURS, block: int = 1000
) -> PrecisionRecall:
    """The same figures with the influence of every synthetic image; see `precision_recall`.

    Without image j, the real samples that only its ball covers are lost, and the balls of those that had j among their k
    neighbours grow to the next one.

    Raises:
        ValueError: not more than k real or k + 1 synthetic samples.
    """
    real, synthetic = real.double(), synthetic.double()
    count = len(synthetic)
    if count <= k + 1:
        raise ValueError(f"{count} images: the neighbour number {k + 1} needs at least {k + 2}")
    radii = neighbour_radii(real, k, block)
    inside = torch.cat([(_squared_distances(rows, real) <= radii).any(1) for rows in synthetic.split(block)]).double()

    nearest = [_squared_distances(rows, synthetic).topk(k + 2, largest=False) for rows in synthetic.split(block)]
    distances = torch.cat([part.values for part in nearest])  # (M, k + 2), the first is the sample itself
    neighbours = torch.cat([part.indices for part in nearest])[:, 1 : k + 1]  # (M, k)
    radius, grown = distances[:, k], distances[:, k + 1]
    covered, change = 0, torch.zeros(count, dtype=torch.float64)  # real samples won less those lost, without each image
    for rows in real.split(block):
        squares = _squared_distances(rows, synthetic)
        cover = squares <= radius
        covers = cover.sum(1)
        covered += int((covers > 0).sum())
        # Lost: the only ball is taken away, and none of the grown ones reaches that far.
        single = (covers == 1).nonzero().flatten()
        only = cover[single].int().argmax(1)
        near = (squares[single] <= grown) & ~cover[single]
        at, ball = near.nonzero(as_tuple=True)
        rescued = torch.zeros(len(single), dtype=torch.bool)
        rescued[at[(neighbours[ball] == only[at, None]).any(1)]] = True
        change -= torch.bincount(only[~rescued], minlength=count)
        # Won: covered by no ball, but by one that grows.
        none = (covers == 0).nonzero().flatten()
        at, ball = (squares[none] <= grown).nonzero(as_tuple=True)
        pairs = torch.stack([at[:, None].expand(-1, k).flatten(), neighbours[ball].flatten()], 1).unique(dim=0)
        change += torch.bincount(pairs[:, 1], minlength=count)
    recall = covered / len(real)
    recall_influence = -(count - 1) * change.numpy() / len(real)
    precision = float(inside.mean())
    return PrecisionRecall(precision, recall, inside.numpy() - precision, recall_influence - recall_influence.mean())
