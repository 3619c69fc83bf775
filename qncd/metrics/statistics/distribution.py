"""FID, sFID, inception score, KID, precision and recall of one set against another, each with its convention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qncd.metrics.networks.extraction import Side
from qncd.metrics.networks.store import Rows
from qncd.metrics.report.conventions import Convention
from qncd.metrics.report.table import Score
from qncd.metrics.statistics.influence import frechet_influence, score_influence
from qncd.metrics.statistics.kernel_distance import SUBSET_SIZE, kernel_distance, kernel_influence
from qncd.metrics.statistics.manifold import NEIGHBOURS, precision_recall_influence
from qncd.metrics.statistics.moments import equal_parts, frechet_distance, parts_of_size, split_score, summarize_splits

UNBIASED_COUNT = 2048  # below it, Inception's covariance is singular and FID far above its limit
ADM_SPLIT_SIZE = 5000


@dataclass(frozen=True)
class Question:
    """What is asked of two sets.

    Attributes:
        metrics: names of `conventions.METRICS`.
        description: the convention in words, behind every figure.
        preset: the convention, None for features that no package defines.
        splits: equal parts of the inception score.
        intervals: whether influences are needed.
    """

    metrics: tuple[str, ...]
    description: str
    preset: Convention | None
    splits: int = 10
    intervals: bool = False


Answers = tuple[list[Score], list[str]]


def _counted(count: int | None) -> str:
    return "an unknown number of" if count is None else str(count)


def against(real: Side, synthetic: Side) -> str:
    """The counts of both sides in words."""
    return f"{_counted(real.count)} real against {_counted(synthetic.count)} synthetic images"


def _foreign(question: Question, metric: str, formula: str) -> str:
    """Words for a metric that the convention's package does not have."""
    known = question.preset is None or metric in question.preset.metrics
    return "" if known else f"; not part of {question.preset.package}, formula of {formula}" if question.preset else ""


def frechet_scores(real: Side, synthetic: Side, question: Question) -> Answers:
    """FID and sFID.

    Raises:
        ValueError: statistics of different dimensions.
    """
    scores: list[Score] = []
    notes: list[str] = []
    layers = {"fid": ("FID", "features", "pooled"), "sfid": ("sFID", "spatial", "spatial")}
    for key in [key for key in layers if key in question.metrics]:
        label, layer, words = layers[key]
        ours, theirs = synthetic.statistics(layer), real.statistics(layer)
        if ours is None or theirs is None:
            if 1 in (real.count, synthetic.count):
                notes.append(f"no {label}: a covariance needs at least 2 images on each side")
            else:
                notes.append(f"no {label}: the saved statistics have none of the {words} features (mu_s, sigma_s)")
            continue
        try:
            value = frechet_distance(theirs, ours)
        except ValueError as error:
            raise ValueError(f"{real.path}: {label}: {error}") from None
        rows = synthetic.rows(layer)
        influence = frechet_influence(rows, ours, theirs) if question.intervals and rows is not None else None
        how = f"{words} features, {against(real, synthetic)}, float64 covariance over N - 1; {question.description}"
        how += _foreign(question, key, "guided-diffusion")
        scores.append(Score(key, label, value, how, ".6g", influence=influence))
    counts = [count for count in (real.count, synthetic.count) if count is not None]
    least = min(counts, default=UNBIASED_COUNT)
    if scores and least < UNBIASED_COUNT:
        labels = " and ".join(score.label for score in scores)
        notes.append(
            f"{labels} {'is' if len(scores) == 1 else 'are'} biased upwards at {least} images (fewer than {UNBIASED_COUNT})"
        )
    return scores, notes


def inception_scores(synthetic: Side, question: Question) -> Answers:
    """The inception score over equal parts, and as ADM's evaluator takes it."""
    logits = synthetic.rows("logits")
    if logits is None:
        return [], ["no inception score: it needs synthetic images, not statistics"]
    if logits.count < question.splits:
        return [], [f"no inception score: {logits.count} images in {question.splits} splits"]
    order = np.arange(logits.count)
    words = f"mean and std over {question.splits} contiguous splits of {logits.count} images in order of name"
    preset = question.preset
    if preset is not None and preset.score_shuffle_seed is not None:
        order = np.random.RandomState(preset.score_shuffle_seed).permutation(logits.count)
        words = (
            f"mean and std over {question.splits} splits of {logits.count} images shuffled with seed {preset.score_shuffle_seed}"
        )
    layouts = [("inception_score_mean", "IS", equal_parts(logits.count, question.splits), order, words)]
    if preset is None or preset.score_split_size is not None:
        size = ADM_SPLIT_SIZE if preset is None or preset.score_split_size is None else preset.score_split_size
        words = f"splits of {size} images as in ADM's evaluator, {logits.count} images"
        bounds = parts_of_size(logits.count, size)
        layouts.append(("inception_score_adm", "IS (ADM)", bounds, np.arange(logits.count), words))
    scores = []
    for key, label, bounds, indices, words in layouts:
        parts = [indices[start:stop] for start, stop in bounds]
        summary = summarize_splits([split_score(_in_blocks(logits, part)) for part in parts])
        influence = score_influence(logits, parts) if question.intervals else None
        how = f"{words}; {question.description}{_foreign(question, 'is', 'torch-fidelity without its shuffle')}"
        std = summary.std if key == "inception_score_mean" else None
        scores.append(Score(key, label, summary.mean, how, std=std, influence=influence))
    return scores, []


def _in_blocks(rows: Rows, part: np.ndarray, size: int = 4096) -> list:
    return [rows.take(part[start : start + size]) for start in range(0, len(part), size)]


def kernel_scores(real: Side, synthetic: Side, question: Question) -> Answers:
    """KID."""
    ours, theirs = synthetic.rows("features"), real.rows("features")
    if ours is None or theirs is None:
        return [], ["no KID: it needs images on both sides, not statistics"]
    if min(ours.count, theirs.count) < 2:
        return [], ["no KID: it needs at least 2 images on each side"]
    result = kernel_distance(ours, theirs)
    how = f"mean and std over {result.subsets} random subsets of {result.subset_size} images, cubic kernel, unbiased"
    how += f", {against(real, synthetic)}; {question.description}{_foreign(question, 'kid', 'torch-fidelity')}"
    influence = kernel_influence(ours, theirs) if question.intervals else None
    notes = []
    if result.subset_size < SUBSET_SIZE:
        notes.append(f"KID from subsets of {result.subset_size} images; torch-fidelity refuses fewer than {SUBSET_SIZE}")
    return [Score("kid", "KID", result.mean, how, ".6g", std=result.std, influence=influence)], notes


def manifold_scores(real: Side, synthetic: Side, question: Question) -> Answers:
    """Precision and recall; both feature sets are in memory meanwhile."""
    ours, theirs = synthetic.rows("features"), real.rows("features")
    if ours is None or theirs is None or min(ours.count, theirs.count) <= NEIGHBOURS + 1:
        return [], [f"no precision and recall: they need images on both sides, more than {NEIGHBOURS + 1} each"]
    result = precision_recall_influence(theirs.read(), ours.read())
    how = f"{NEIGHBOURS} neighbours, pooled features, {against(real, synthetic)}; {question.description}"
    return [
        Score("precision", "precision", result.precision, how, influence=result.precision_influence),
        Score("recall", "recall", result.recall, how, influence=result.recall_influence),
    ], []


def distribution_scores(real: Side, synthetic: Side, question: Question) -> Answers:
    """All figures of `question.metrics` that compare distributions, and notes on those that cannot be had."""
    scores, notes = frechet_scores(real, synthetic, question)
    asked = (
        ("is", lambda: inception_scores(synthetic, question)),
        ("kid", lambda: kernel_scores(real, synthetic, question)),
        ("precision_recall", lambda: manifold_scores(real, synthetic, question)),
    )
    for metric, answer in asked:
        if metric in question.metrics:
            more, remarks = answer()
            scores += more
            notes += remarks
    return scores, notes
