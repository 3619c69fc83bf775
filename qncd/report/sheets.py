"""Sheets of samples: the same seeds in full precision and quantized, to flip between, and the worst and median images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from qncd.report.folders import Pictured
from qncd.report.pictures import Encoded, difference, encode, gain_for, magnified

FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class Picture:
    """One image of the report: the key of its data, what it shows in words, and a line below it."""

    key: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Sheet:
    """Images that are flipped through together.

    Attributes:
        title: which runs these are.
        views: what can be shown: full precision, each run, and each run's difference.
        tiles: a picture for each view.
        labels: of each tile: its seed, and its prompt.
    """

    title: str
    views: tuple[str, ...]
    tiles: tuple[tuple[Picture, ...], ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Extremes:
    """The worst and the median images of a run: full precision, quantized and difference of each, with a line about it."""

    title: str
    worst: tuple[tuple[str, tuple[Picture, ...]], ...]
    median: tuple[tuple[str, tuple[Picture, ...]], ...]


@dataclass(frozen=True)
class Sheets:
    """All images of a report.

    Attributes:
        sheets: to flip through, one for all runs of the same full-precision images.
        extremes: of each run that has pairs.
        encoded: the data of the pictures by their keys.
    """

    sheets: tuple[Sheet, ...]
    extremes: tuple[Extremes, ...]
    encoded: Encoded


def make_sheets(runs: Sequence[Pictured]) -> Sheets:
    """Choose and encode the images of some runs. Raises ValueError where one cannot be read."""
    images: dict[str, np.ndarray] = {}
    groups: dict[object, list[_Shown]] = {}
    shown = [_Shown(run, images) for run in runs if run.pairs.names]
    for one in shown:
        groups.setdefault(one.run.group, []).append(one)
    sheets = tuple(_sheet(group) for group in groups.values())
    extremes = tuple(_extremes(one) for one in shown if one.run.worst)
    return Sheets(sheets, extremes, encode(images))


class _Shown:
    """The images of one run on their way into the report; each is kept once.

    Attributes:
        gain: by which its differences are magnified.
    """

    def __init__(self, run: Pictured, images: dict[str, np.ndarray]) -> None:
        self.run, self.images = run, images
        names = [name for name in dict.fromkeys((*run.first, *run.worst, *run.median)) if name in run.pairs.paired]
        pairs = {name: run.pairs.pair(name) for name in names}
        self.differences = {name: difference(exact[0], image[0]) for name, (exact, image) in pairs.items()}
        self.gain = gain_for(list(self.differences.values()))

    def image(self, name: str) -> str:
        """The key of a quantized image."""
        return self._keep(self.run.pairs.image(name))

    def exact(self, name: str) -> str:
        """The key of a full-precision image."""
        return self._keep(self.run.pairs.exact(name))

    def difference(self, name: str) -> str:
        """The key of what an image lacks to full precision."""
        return self._keep(magnified(self.differences[name], self.gain))

    def decibels(self, name: str) -> str:
        """Its PSNR in words."""
        psnr = self.run.pairs.psnr_of(name)
        return f"{psnr:.1f} dB" if np.isfinite(psnr) else "equal"

    def _keep(self, array: np.ndarray) -> str:
        key = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]
        self.images[key] = array
        return key


def _seed(name: str) -> str:
    """What the report calls an image: 000012_seed1246.png is "000012 seed 1246"."""
    return PurePosixPath(name).stem.replace("_seed", " seed ")


def _sheet(group: Sequence[_Shown]) -> Sheet:
    first = group[0].run
    paired = bool(first.pairs.paired)
    views = [one.run.title for one in group]
    if paired:
        views = [FULL_PRECISION, *views, *(f"difference × {one.gain}: {one.run.label}" for one in group)]
    tiles, labels = [], []
    for name in first.first:
        prompt: str = _prompts(group).get(name, "")
        label = f"{_seed(name)}: {prompt}" if prompt else _seed(name)
        lines = [one.decibels(name) if paired else "" for one in group]
        shown = [Picture(one.image(name), f"{label}, {one.run.label}", line) for one, line in zip(group, lines, strict=True)]
        if paired:
            differences = [
                Picture(one.difference(name), f"{label}, difference of {one.run.label}", line)
                for one, line in zip(group, lines, strict=True)
            ]
            shown = [Picture(group[0].exact(name), f"{label}, {FULL_PRECISION}"), *shown, *differences]
        tiles.append(tuple(shown))
        labels.append(label)
    return Sheet(first.group_title or ", ".join(one.run.label for one in group), tuple(views), tuple(tiles), tuple(labels))


def _prompts(group: Sequence[_Shown]) -> Mapping[str, str]:
    return group[0].run.pairs.prompts


def _extremes(one: _Shown) -> Extremes:
    pairs = one.run.pairs

    def shown(names: Sequence[str]) -> tuple[tuple[str, tuple[Picture, ...]], ...]:
        found = []
        for name in names:
            line, lpips, prompt = f"{_seed(name)}: {one.decibels(name)}", pairs.lpips_of(name), pairs.prompts.get(name)
            line += (f", LPIPS {lpips:.3f}" if lpips is not None else "") + (f", “{prompt}”" if prompt else "")
            sides = (
                Picture(one.exact(name), f"{_seed(name)}, {FULL_PRECISION}", FULL_PRECISION),
                Picture(one.image(name), f"{_seed(name)}, quantized", "quantized"),
                Picture(one.difference(name), f"{_seed(name)}, difference", f"difference × {one.gain}"),
            )
            found.append((line, sides))
        return tuple(found)

    return Extremes(one.run.title, shown(one.run.worst), shown(one.run.median))
