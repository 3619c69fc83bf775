"""Run a network over a source of images, or take its features from the cache."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from qncd.distributed import OneProcess, Processes
from qncd.io.files import whole_file
from qncd.metrics.networks.features import FeatureExtractor
from qncd.metrics.networks.prefetch import prepared_batches
from qncd.metrics.networks.store import FeatureCache, FeatureSet, Rows
from qncd.metrics.report.sources import ImageSource
from qncd.metrics.statistics.moments import FeatureStatistics, StatisticsAccumulator, features_to_statistics
from qncd.metrics.statistics.saved_statistics import SavedStatistics
from qncd.progress import Monitor, silent

logger = logging.getLogger(__name__)


def check_images(source: ImageSource, extractor: FeatureExtractor) -> None:
    """Refuse images that the network cannot take.

    Raises:
        ValueError: a wrong size, or several sizes where the convention needs one.
    """
    if source.other_size is not None and not extractor.any_size:
        raise ValueError(
            f"{source.path}: images of more than one size: {source.other_size} (the convention clean-fid resizes each image "
            "by itself and takes them)"
        )
    try:
        extractor.check_size(source.height, source.width)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None


def extract(
    source: ImageSource,
    extractor: FeatureExtractor,
    cache: FeatureCache,
    batch_size: int = 50,
    processes: Processes | None = None,
    monitor: Monitor = silent,
) -> FeatureSet | None:
    """Features of all images in their order; memory does not grow with their number.

    Args:
        source: images.
        extractor: the network; every process has one.
        cache: where the features are looked for and kept.
        batch_size: images in the network at once.
        processes: who shares the work; alone by default.
        monitor: is told of progress, in the first process.

    Returns:
        The features in the first process, None in the others.

    Raises:
        ValueError: images that cannot be read or that the network cannot take, or features that are not finite.
    """
    processes = processes or OneProcess()
    check_images(source, extractor)
    key = found = None
    if processes.is_first:
        key = cache.key(extractor.identity, source.digest())
        found = cache.find(key)
    if processes.share(found is not None):
        return found
    if processes.is_first:
        writer, scratch = cache.start(source.count)
    else:
        monitor = silent
    batches = prepared_batches(source, batch_size, extractor.channels, extractor.prepare, (processes.rank, processes.world))
    rounds = -(-source.count // (batch_size * processes.world))
    try:
        with monitor(str(source.path), "image") as update:
            for _ in range(rounds):
                outputs, failure = None, None
                try:
                    batch = next(batches, None)
                    if batch is not None:
                        outputs = extractor(torch.from_numpy(batch))
                        for name, rows in outputs.items():
                            if not torch.isfinite(rows).all():
                                raise ValueError(f"{source.path}: the {name} hold NaN or infinite values")
                except (ValueError, OSError) as error:
                    failure = " ".join(str(error).split()) or type(error).__name__
                for part in processes.gather(outputs, failure):
                    writer.append(part)
                if processes.is_first:
                    update(writer.done, source.count)
        if not processes.is_first:
            return None
        writer.close({"identity": extractor.identity, "source": str(source.path)})
    except BaseException:
        if processes.is_first:
            writer.close()
            scratch.remove()
        raise
    assert key is not None
    return cache.keep(key, scratch)


def rows_to_statistics(rows: Rows) -> FeatureStatistics:
    """Mean and covariance of rows on disk; those of many rows are kept beside them.

    Raises:
        ValueError: fewer than 2 rows.
    """
    if rows.count <= rows.dimension:
        return features_to_statistics(rows.read())
    kept = rows.path.with_suffix(".statistics.npz")
    if kept.exists():
        try:
            found = SavedStatistics.open(kept).features
            if found.dimension != rows.dimension:
                raise ValueError(f"{kept}: {found.dimension} dimensions, the features have {rows.dimension}")
            return replace(found, count=rows.count)
        except ValueError as error:
            logger.warning("damaged statistics in the cache, computed again: %s", error)
    accumulator = StatisticsAccumulator()
    for block in rows.blocks():
        accumulator.update(block)
    statistics = accumulator.finish()
    try:
        with whole_file(kept) as part, part.open("wb") as stream:
            np.savez(stream, mu=statistics.mu, sigma=statistics.sigma)
    except ValueError as error:  # a full disk: the figures do not need it
        logger.warning("statistics are not kept: %s", error)
    return statistics


class Side:
    """One of the two sets of a comparison, as features or as statistics; statistics are computed once.

    Args:
        source: for names in errors.
        features: what the network said, None for saved statistics.
        saved: the saved statistics, None for images.
    """

    def __init__(self, source: ImageSource | SavedStatistics, features: FeatureSet | None) -> None:
        self.path, self.count, self.features = source.path, source.count, features
        self._statistics: dict[str, FeatureStatistics] = {}
        if isinstance(source, SavedStatistics):
            self._statistics = {"features": source.features}
            if source.spatial is not None:
                self._statistics["spatial"] = source.spatial

    def rows(self, layer: str) -> Rows | None:
        """The rows of a layer, None where there are only statistics."""
        return None if self.features is None else self.features.layers.get(layer)

    def statistics(self, layer: str) -> FeatureStatistics | None:
        """Mean and covariance of a layer, None where they cannot be had: one image, or not in the file."""
        rows = self.rows(layer)
        if layer not in self._statistics and rows is not None and rows.count > 1:
            self._statistics[layer] = rows_to_statistics(rows)
        return self._statistics.get(layer)
