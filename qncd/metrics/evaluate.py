"""Compare synthetic images with real ones: FID, sFID, inception score, precision and recall, paired PSNR and MSE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from qncd.metrics.features import FeatureExtractor
from qncd.metrics.sources import ImageFolder, SavedStatistics, Source
from qncd.metrics.statistics import (
    FeatureStatistics,
    StatisticsAccumulator,
    frechet_distance,
    inception_score,
    inception_score_adm,
    mse_to_psnr,
    paired_mse,
    precision_recall,
)

UNBIASED_COUNT = 2048  # below it, Inception's covariance is singular and FID far above its limit
ADM_SPLIT_SIZE = 5000
NEIGHBOURS = 3
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """The numbers and how they came about; None stands for a number that could not be had, `notes` say why.

    Attributes:
        network: name of the feature extractor.
        convention: network and resize in words.
        count_real, count_synthetic: images on each side, None for statistics of an unknown number.
        fid, sfid: Frechet distances of the pooled and of the spatial features.
        inception_score_mean, inception_score_std: of the synthetic images over `inception_score_splits` contiguous splits.
        inception_score_adm: the mean over splits of 5000 images, as ADM's evaluator takes it.
        precision, recall: with 3 neighbours, where they were asked for.
        psnr, mse: means over `pairs` images of the same name; dB with a peak of 255, and on the scale of 0 to 255.
        notes: one line each.
    """

    network: str
    convention: str
    count_real: int | None
    count_synthetic: int | None
    fid: float | None = None
    sfid: float | None = None
    inception_score_mean: float | None = None
    inception_score_std: float | None = None
    inception_score_splits: int | None = None
    inception_score_adm: float | None = None
    precision: float | None = None
    recall: float | None = None
    psnr: float | None = None
    mse: float | None = None
    pairs: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line for each number, with its convention, then the notes."""
        real, synthetic = (
            "an unknown number of" if count is None else str(count) for count in (self.count_real, self.count_synthetic)
        )
        against = f"{real} real against {synthetic} synthetic images"
        rows: list[tuple[str, str, str]] = []
        for label, value, layer in (("FID", self.fid, "pooled"), ("sFID", self.sfid, "spatial")):
            if value is not None:
                how = f"{layer} features, {against}, float64 covariance over N - 1; {self.convention}"
                rows.append((label, f"{value:.6g}", how))
        if self.inception_score_mean is not None:
            how = f"mean and std over {self.inception_score_splits} contiguous splits of {synthetic} images in order of name"
            rows.append(("IS", f"{self.inception_score_mean:.4f} +- {self.inception_score_std:.4f}", f"{how}; {self.convention}"))
        if self.inception_score_adm is not None:
            how = f"splits of {ADM_SPLIT_SIZE} images as in ADM's evaluator, {synthetic} images"
            rows.append(("IS (ADM)", f"{self.inception_score_adm:.4f}", f"{how}; {self.convention}"))
        for label, value in (("precision", self.precision), ("recall", self.recall)):
            if value is not None:
                rows.append((label, f"{value:.4f}", f"{NEIGHBOURS} neighbours, pooled features, {against}; {self.convention}"))
        if self.psnr is not None:
            rows.append(("PSNR", f"{self.psnr:.4f} dB", f"peak 255, mean over {self.pairs} pairs of the same name"))
        if self.mse is not None:
            rows.append(("MSE", f"{self.mse:.4f}", f"scale 0 to 255, mean over {self.pairs} pairs of the same name"))
        return [f"{label:<9} {value}  [{how}]" for label, value, how in rows] + [f"note: {note}" for note in self.notes]

    def to_json(self) -> dict[str, object]:
        """The fields; an infinite PSNR (equal images) is the text "inf", because JSON has no such number."""
        return {key: "inf" if isinstance(value, float) and math.isinf(value) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class Extraction:
    """What the network says about one side; `pooled` is kept for precision and recall only."""

    features: FeatureStatistics | None
    spatial: FeatureStatistics | None
    logits: torch.Tensor | None = None
    pooled: torch.Tensor | None = None


def check_sources(real: Source, synthetic: Source, network: str) -> None:
    """Refuse, before the network is loaded, what cannot give a single number.

    Raises:
        ValueError: statistics of another network, or a single image that has no partner.
    """
    for source in (real, synthetic):
        if isinstance(source, SavedStatistics) and source.network not in (None, network):
            raise ValueError(
                f"{source.path}: statistics of the features {source.network}, not {network}: add --features {source.network}"
            )
    if 1 in (real.count, synthetic.count) and not _common_names(real, synthetic):
        single = real if real.count == 1 else synthetic
        raise ValueError(f"{single.path}: 1 image: FID needs at least 2, and paired figures the same names on both sides")


def _common_names(real: Source, synthetic: Source) -> tuple[str, ...]:
    """The file names, if both sides are folders and hold the same ones."""
    if isinstance(real, ImageFolder) and isinstance(synthetic, ImageFolder) and real.names == synthetic.names:
        return real.names
    return ()


def extract(
    source: Source,
    extractor: FeatureExtractor,
    batch_size: int = 50,
    keep_pooled: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Run the network over a source of images; saved statistics pass as they are.

    Memory does not grow with the number of images but for the logits (and the features, with `keep_pooled`).
    """
    if isinstance(source, SavedStatistics):
        return Extraction(source.features, source.spatial)
    try:
        extractor.check_size(source.height, source.width)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    features, spatial = StatisticsAccumulator(), StatisticsAccumulator()
    logits, pooled = [], []
    for batch in source.batches(batch_size, extractor.channels):
        outputs = extractor(torch.from_numpy(batch))
        try:
            features.update(outputs["features"])
            spatial.update(outputs["spatial"])
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
        logits.append(outputs["logits"])
        if keep_pooled:
            pooled.append(outputs["features"])
        if progress is not None:
            progress(str(source.path), features.count, source.count)
    enough = features.count > 1
    return Extraction(
        features.finish() if enough else None,
        spatial.finish() if enough else None,
        torch.cat(logits),
        torch.cat(pooled) if keep_pooled else None,
    )


def paired_figures(real: ImageFolder, synthetic: ImageFolder, channels: int, batch_size: int = 50) -> tuple[float, float]:
    """Mean PSNR in dB and mean MSE over two folders with the same names.

    Raises:
        ValueError: the names or the sizes differ.
    """
    if real.names != synthetic.names:
        raise ValueError(f"{real.path} and {synthetic.path} do not hold the same file names")
    if (real.height, real.width) != (synthetic.height, synthetic.width):
        raise ValueError(f"{real.width}x{real.height} against {synthetic.width}x{synthetic.height} pixels")
    batches = zip(real.batches(batch_size, channels), synthetic.batches(batch_size, channels), strict=True)
    mse = np.concatenate([paired_mse(a, b) for a, b in batches])
    return float(mse_to_psnr(mse).mean()), float(mse.mean())


def _frechet(real: FeatureStatistics, synthetic: FeatureStatistics, label: str, source: Source) -> float:
    try:
        return frechet_distance(real, synthetic)
    except ValueError as error:
        raise ValueError(f"{source.path}: {label}: {error}") from None


def evaluate(
    real: Source,
    synthetic: Source,
    extractor: FeatureExtractor,
    batch_size: int = 50,
    is_splits: int = 10,
    with_precision_recall: bool = False,
    save_statistics: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """All numbers that the two sources allow.

    Args:
        real, synthetic: from `open_source`.
        extractor: the network.
        batch_size: images in the network at once; changes results by rounding only.
        is_splits: contiguous splits of the inception score.
        with_precision_recall: also those two; keeps the pooled features of both sides in memory.
        save_statistics: file for the statistics of `real`, which can stand in for it in later calls.
        progress: called with a label, images done and images in all.

    Raises:
        ValueError: statistics of another network or dimension, or images that the network cannot take.
    """
    check_sources(real, synthetic, extractor.name)
    for source in (real, synthetic):
        if isinstance(source, SavedStatistics) and source.features.dimension != extractor.dimension:
            raise ValueError(
                f"{source.path}: statistics of {source.features.dimension} dimensions, "
                f"the features {extractor.name} have {extractor.dimension}"
            )
    values: dict[str, float] = {}
    notes: list[str] = []
    on_real = extract(real, extractor, batch_size, with_precision_recall, progress)
    if save_statistics is not None:
        if on_real.features is None:
            raise ValueError(f"{real.path}: 1 image has no statistics to save")
        SavedStatistics(real.path, on_real.features, on_real.spatial, extractor.name).save(save_statistics)
    on_synthetic = extract(synthetic, extractor, batch_size, with_precision_recall, progress)

    counts = [count for count in (real.count, synthetic.count) if count is not None]
    if on_real.features is None or on_synthetic.features is None:
        notes.append("no FID: a covariance needs at least 2 images on each side")
    else:
        values["fid"] = _frechet(on_real.features, on_synthetic.features, "FID", real)
        if min(counts, default=UNBIASED_COUNT) < UNBIASED_COUNT:
            notes.append(f"FID and sFID are biased upwards at {min(counts)} images (fewer than {UNBIASED_COUNT})")
        if on_real.spatial is not None and on_synthetic.spatial is not None:
            values["sfid"] = _frechet(on_real.spatial, on_synthetic.spatial, "sFID", real)
        else:
            notes.append("no sFID: the saved statistics have none of the spatial features (mu_s, sigma_s)")
    splits: int | None = None
    if on_synthetic.logits is None:
        notes.append("no inception score: it needs synthetic images, not statistics")
    elif len(on_synthetic.logits) < is_splits:
        notes.append(f"no inception score: {len(on_synthetic.logits)} images in {is_splits} splits")
    else:
        score = inception_score(on_synthetic.logits, is_splits)
        splits = score.splits
        values |= {"inception_score_mean": score.mean, "inception_score_std": score.std}
        values["inception_score_adm"] = inception_score_adm(on_synthetic.logits, ADM_SPLIT_SIZE).mean
    if with_precision_recall:
        if on_real.pooled is None or on_synthetic.pooled is None or min(counts) <= NEIGHBOURS:
            notes.append(f"no precision and recall: they need images on both sides, more than {NEIGHBOURS} each")
        else:
            values["precision"], values["recall"] = precision_recall(on_real.pooled, on_synthetic.pooled, NEIGHBOURS)
    pairs = len(_common_names(real, synthetic))
    if pairs and isinstance(real, ImageFolder) and isinstance(synthetic, ImageFolder):
        try:
            values["psnr"], values["mse"] = paired_figures(real, synthetic, extractor.channels, batch_size)
        except ValueError as error:
            notes.append(f"no paired figures: {error}")
            pairs = 0
    elif isinstance(real, ImageFolder) and isinstance(synthetic, ImageFolder):
        shared = len(set(real.names) & set(synthetic.names))
        if shared:
            notes.append(f"no paired figures: {shared} names of {real.count} and {synthetic.count} are the same, not all")
    return Result(
        extractor.name,
        extractor.convention,
        real.count,
        synthetic.count,
        inception_score_splits=splits,
        pairs=pairs,
        notes=tuple(notes),
        **values,
    )
