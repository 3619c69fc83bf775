"""Judge synthetic images: distribution metrics, CLIP metrics and paired figures, each where the sources allow it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qncd.distributed import OneProcess, Processes
from qncd.metrics.networks.extraction import Side, extract
from qncd.metrics.networks.features import FashionMnistFeatures, InceptionFeatures
from qncd.metrics.networks.prefetch import prepared_batches
from qncd.metrics.networks.store import FeatureCache
from qncd.metrics.networks.text import ANTONYMS, ClipFeatures, clip_iqa, clip_scores, find_prompts
from qncd.metrics.report.conventions import CLIP_METRICS, PAIRED_METRICS, Convention
from qncd.metrics.report.sources import ImageFolder, Source
from qncd.metrics.report.table import Result, Score, mean_score
from qncd.metrics.statistics.distribution import Question, distribution_scores
from qncd.metrics.statistics.moments import POOR, PairedQuality, mse_to_psnr, paired_mse
from qncd.metrics.statistics.paired import LPIPS_SIZE, SSIM_WINDOW, Lpips, lpips_obstacle, paired_ssim
from qncd.metrics.statistics.saved_statistics import SavedStatistics
from qncd.progress import Monitor, silent

METRIC_OF = dict.fromkeys(("psnr_of_mean", "psnr_p5", "poor", "mse"), "psnr")  # figures that come with another one


@dataclass(frozen=True)
class Settings:
    """What is computed, and how.

    Attributes:
        metrics: names of `conventions.METRICS`; both sides need the same file names where PSNR, SSIM or LPIPS is named.
        batch_size: images in a network at once; changes results by rounding only.
        splits: equal parts of the inception score.
        bootstrap: resamples of the intervals, 0 for none.
        prompts: see `find_prompts`.
        iqa: keys of ANTONYMS.
        named: nothing else than `metrics` is wanted; otherwise PSNR, MSE and SSIM come as soon as both sides have the same file
            names.
    """

    metrics: tuple[str, ...]
    batch_size: int = 50
    splits: int = 10
    bootstrap: int = 0
    prompts: Path | None = None
    iqa: tuple[str, ...] = ("quality",)
    named: bool = False


def check_sources(real: Source, synthetic: Source, network: str, convention: Convention | None = None) -> None:
    """Refuse, before a network is loaded, what cannot give a single number.

    Raises:
        ValueError: statistics of another network or convention, or a single image that has no partner.
    """
    for source in (real, synthetic):
        if not isinstance(source, SavedStatistics):
            continue
        if source.network not in (None, network):
            raise ValueError(
                f"{source.path}: statistics of the features {source.network}, not {network}: add --features {source.network}"
            )
        if convention is not None and source.preprocessing not in (None, convention.preprocessing):
            raise ValueError(
                f"{source.path}: statistics after another resize ({source.preprocessing}) than that of the convention "
                f"{convention.name} ({convention.preprocessing})"
            )
    if 1 in (real.count, synthetic.count) and not common_names(real, synthetic):
        single = real if real.count == 1 else synthetic
        raise ValueError(f"{single.path}: 1 image: FID needs at least 2, and paired figures the same names on both sides")


def common_names(real: Source | None, synthetic: Source) -> tuple[str, ...]:
    """The file names, if both sides are folders and hold the same ones."""
    if isinstance(real, ImageFolder) and isinstance(synthetic, ImageFolder) and real.names == synthetic.names:
        return real.names
    return ()


def _pairs_of_batches(
    real: ImageFolder, synthetic: ImageFolder, channels: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    batches = (prepared_batches(source, batch_size, channels) for source in (real, synthetic))
    return zip(*batches, strict=True)


def paired_folders(real: Source | None, synthetic: Source) -> tuple[ImageFolder, ImageFolder]:
    """Both sources, if they are folders whose images belong together in pairs, by their names and headers.

    Raises:
        ValueError: no folders, or other names or sizes on the two sides.
    """
    if not (isinstance(real, ImageFolder) and isinstance(synthetic, ImageFolder)):
        raise ValueError(f"{synthetic.path}: no paired figures: they need two folders with the same file names")
    if real.names != synthetic.names:
        shared = len(set(real.names) & set(synthetic.names))
        raise ValueError(
            f"{synthetic.path}: no paired figures: {shared} names of {real.count} and {synthetic.count} are the same, not all"
        )
    mixed = real.other_size or synthetic.other_size
    if mixed:
        raise ValueError(f"{synthetic.path}: no paired figures: images of more than one size: {mixed}")
    if (real.height, real.width) != (synthetic.height, synthetic.width):
        sizes = f"{real.width}x{real.height} against {synthetic.width}x{synthetic.height}"
        raise ValueError(f"{synthetic.path}: no paired figures: {sizes} pixels")
    return real, synthetic


def paired_scores(
    real: ImageFolder, synthetic: ImageFolder, channels: int, batch_size: int = 50, lpips: Lpips | None = None
) -> list[Score]:
    """PSNR, SSIM, MSE and, with its network, LPIPS over two folders with the same names.

    Raises:
        ValueError: see `paired_folders`; or an image is damaged, or too small for LPIPS.
    """
    real, synthetic = paired_folders(real, synthetic)
    values: dict[str, list[np.ndarray]] = {"mse": [], "ssim": [], "lpips": []}
    for a, b in _pairs_of_batches(real, synthetic, channels, batch_size):
        values["mse"].append(paired_mse(a, b))
        if min(real.height, real.width) >= SSIM_WINDOW:
            values["ssim"].append(paired_ssim(a, b))
        if lpips is not None:
            values["lpips"].append(lpips(a, b))
    whole = {name: np.concatenate(parts) for name, parts in values.items() if parts}
    over = f"mean over {real.count} pairs of the same name"
    scores = psnr_scores(whole["mse"], over)
    if "ssim" in whole:
        scores.append(mean_score("ssim", "SSIM", whole["ssim"], f"Gaussian window 11x11, sigma 1.5, mean of channels, {over}"))
    scores.append(mean_score("mse", "MSE", whole["mse"], f"scale 0 to 255, {over}"))
    if lpips is not None:
        scores.append(mean_score("lpips", "LPIPS", whole["lpips"], f"{lpips.description}, {over}"))
    return scores


def psnr_scores(mse: np.ndarray, over: str) -> list[Score]:
    """PSNR of images with these squared errors (N,): its mean, that of the mean error, and how poor the poorest images are.

    Args:
        over: which pairs these are, in words.
    """
    psnr, mean, quality = mse_to_psnr(mse), float(mse.mean()), PairedQuality.of(mse)
    pairs = over.removeprefix("mean ")
    influence = -10 / math.log(10) * (mse - mean) / mean if mean else None  # to first order
    return [
        mean_score("psnr", "PSNR", psnr, f"peak 255, {over}", unit=" dB"),
        Score("psnr_of_mean", "PSNR(MSE)", quality.psnr_of_mean, f"of the mean error {pairs}", unit=" dB", influence=influence),
        Score("psnr_p5", "PSNR(5%)", quality.psnr_p5, f"5th percentile {pairs}", unit=" dB"),
        mean_score("poor", f"PSNR<{POOR:g}", 100.0 * (psnr < POOR), f"share of the images, {over}", ".2f", " %"),
    ]


def prompts_of(synthetic: Source, settings: Settings) -> list[str]:
    """The prompts of the images, where a metric needs them.

    Raises:
        ValueError, FileNotFoundError: CLIP metrics of statistics; see `find_prompts`.
    """
    if not set(settings.metrics) & set(CLIP_METRICS):
        return []
    if isinstance(synthetic, SavedStatistics):
        raise ValueError(f"{synthetic.path}: CLIP metrics need images, not statistics")
    return find_prompts(synthetic, settings.prompts) if "clip_score" in settings.metrics else []


class Evaluator:
    """Judges sets of synthetic images against one real set.

    Args:
        real: from `open_source`; None where only CLIP metrics are wanted.
        extractor: the network of the distribution metrics, None where none of these is wanted.
        settings: what is computed.
        cache: of features; in a temporary folder by default.
        processes: who shares the work.
        clip: the network of the CLIP metrics, None where none of these is wanted.
        lpips: the network of LPIPS, None where it is not wanted.
        monitor: is told of progress.
    """

    def __init__(
        self,
        real: Source | None,
        extractor: InceptionFeatures | FashionMnistFeatures | None,
        settings: Settings,
        cache: FeatureCache | None = None,
        processes: Processes | None = None,
        clip: ClipFeatures | None = None,
        lpips: Lpips | None = None,
        monitor: Monitor = silent,
    ) -> None:
        self.real, self.extractor, self.settings = real, extractor, settings
        self.cache, self.processes = cache or FeatureCache(None), processes or OneProcess()
        self.clip, self.lpips, self.monitor = clip, lpips, monitor
        self.preset = extractor.preset if isinstance(extractor, InceptionFeatures) else None
        self._real_side: Side | None = None

    def _side(self, source: Source) -> Side:
        assert self.extractor is not None
        if isinstance(source, SavedStatistics):
            if source.features.dimension != self.extractor.dimension:
                raise ValueError(
                    f"{source.path}: statistics of {source.features.dimension} dimensions, "
                    f"the features {self.extractor.name} have {self.extractor.dimension}"
                )
            return Side(source, None)
        features = extract(source, self.extractor, self.cache, self.settings.batch_size, self.processes, self.monitor)
        return Side(source, features)

    def real_side(self) -> Side:
        """The real images' features or statistics, computed once."""
        if self._real_side is None:
            assert self.real is not None
            self._real_side = self._side(self.real)
        return self._real_side

    def save_statistics(self, path: Path) -> None:
        """Write the real set's statistics, which can stand in for it in later calls."""
        side = self.real_side()
        if not self.processes.is_first:
            return
        assert self.extractor is not None
        features = side.statistics("features")
        if features is None:
            raise ValueError(f"{side.path}: 1 image has no statistics to save")
        preprocessing = None if self.preset is None else self.preset.preprocessing
        SavedStatistics(side.path, features, side.statistics("spatial"), self.extractor.name, preprocessing).save(path)

    def judge(self, synthetic: Source) -> Result | None:
        """All figures that the two sources allow; None in all but the first process.

        Raises:
            ValueError: statistics of another network, convention or dimension, images that a network cannot take, or no pairs
                where paired figures are asked for.
        """
        settings = self.settings
        prompts = prompts_of(synthetic, self.settings) if self.clip is not None else []  # before anything is computed
        paired, remarks = self._paired_scores(synthetic) if self.processes.is_first else ([], [])  # the quickest come first
        scores: list[Score] = []
        notes: list[str] = []
        if self.real is not None and self.extractor is not None:
            check_sources(self.real, synthetic, self.extractor.name, self.preset)
            question = Question(settings.metrics, self.extractor.convention, self.preset, settings.splits, settings.bootstrap > 0)
            real_side, side = self.real_side(), self._side(synthetic)
            if self.processes.is_first:
                scores, notes = distribution_scores(real_side, side, question)
                notes += self._doubts(self.real, synthetic)
        folders = dict.fromkeys(source for source in (self.real, synthetic) if isinstance(source, ImageFolder))
        notes += [f"{folder.path}: {folder.left_out}" for folder in folders if folder.left_out]
        scores += self._clip_scores(synthetic, prompts)
        if not self.processes.is_first:
            return None
        names = "none", "no features"
        if self.extractor is not None:
            names = self.extractor.name, self.extractor.convention
        return Result(
            *names,
            None if self.real is None else self.real.count,
            synthetic.count,
            tuple(scores + paired),
            settings.splits if any(score.key == "inception_score_mean" for score in scores) else None,
            synthetic.count or 0 if paired else 0,
            synthetic.names if isinstance(synthetic, ImageFolder) else None,
            settings.bootstrap,
            tuple(notes + remarks),
        )

    def _doubts(self, *sources: Source) -> list[str]:
        """Notes on statistics that do not say how they were made."""
        if self.preset is None:
            return []
        unsaid = [source for source in sources if isinstance(source, SavedStatistics) and source.preprocessing is None]
        taken = f"convention {self.preset.name} is taken for granted"
        return [f"{source.path} does not say how its statistics were made: {taken}" for source in unsaid]

    def _paired_scores(self, synthetic: Source) -> tuple[list[Score], list[str]]:
        """The figures of pairs, or why there are none although some names agree; without a word where none was to be expected."""
        real, asked = self.real, set(self.settings.metrics) & set(PAIRED_METRICS)
        if self.settings.named and not asked:
            return [], []
        try:
            folders = paired_folders(real, synthetic)
        except ValueError as error:
            if asked:
                raise
            if not (isinstance(real, ImageFolder) and isinstance(synthetic, ImageFolder)):
                return [], []
            return [], [str(error)] if set(real.names) & set(synthetic.names) else []
        channels = 3 if self.extractor is None else self.extractor.channels
        lpips, notes = self.lpips, []
        if lpips is None and not self.settings.named and (obstacle := lpips_obstacle()):
            notes = [f"no LPIPS: {obstacle}"]
        elif lpips is not None and "lpips" not in asked and min(folders[0].height, folders[0].width) < LPIPS_SIZE:
            lpips, notes = None, [f"no LPIPS: images smaller than {LPIPS_SIZE}x{LPIPS_SIZE}"]
        scores = paired_scores(*folders, channels, self.settings.batch_size, lpips)
        return [score for score in scores if not self.settings.named or METRIC_OF.get(score.key, score.key) in asked], notes

    def _clip_scores(self, synthetic: Source, prompts: list[str]) -> list[Score]:
        if self.clip is None or isinstance(synthetic, SavedStatistics):
            return []
        wanted = self.settings.metrics
        features = extract(synthetic, self.clip, self.cache, self.settings.batch_size, self.processes, self.monitor)
        if features is None:
            return []
        images = features.layers["embedding"].read()
        over = f"mean over {synthetic.count} images; {self.clip.convention}"
        scores = []
        if "clip_score" in wanted:
            values = clip_scores(images, self.clip.embed_texts(prompts))
            scores.append(mean_score("clip_score", "CLIP", values, f"100 max(cos, 0) of image and prompt, {over}"))
        for name in self.settings.iqa if "clip_iqa" in wanted else ():
            good, bad = self.clip.embed_texts(ANTONYMS[name])
            key, label = ("clip_iqa", "CLIP-IQA") if name == "quality" else (f"clip_iqa_{name}", f"IQA {name}")
            how = f'probability of "{ANTONYMS[name][0]}" against "{ANTONYMS[name][1]}", at the model\'s own size, {over}'
            scores.append(mean_score(key, label, clip_iqa(images, good, bad), how))
        return scores
