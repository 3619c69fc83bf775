"""What a quality benchmark compares: its plan and its cells."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qncd.benchmark.peers import PEERS, Peer
from qncd.io.files import read_json
from qncd.modes import MODES as RECIPES
from qncd.modes import changes_of
from qncd.recipe import CalibrationConfig, CorrectionConfig, Recipe, ReconstructionConfig, SamplerConfig
from qncd.widths import width_name

if TYPE_CHECKING:
    from qncd.benchmark.subjects import Subject


@dataclass(frozen=True)
class Composition:
    """A mode with changes: what a row of the benchmark quantizes with.

    Attributes:
        text: that asked for it.
        mode: a name in `qncd.modes.MODES`.
        changes: of its options, as `Recipe.of` takes them.
    """

    text: str
    mode: str
    changes: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Composition:
        """The composition that a text such as "qncd+" or "qncd,smoothing=false,interval=2" asks for.

        Raises:
            ValueError: there is no such mode, or a part is not OPTION=VALUE.
        """
        mode, *parts = text.split(",")
        if mode not in RECIPES:
            raise ValueError(f"--modes {text}: allowed are {', '.join((*RECIPES, *PEERS))}, the former with ,OPTION=VALUE behind")
        changes: dict[str, Any] = {}
        for part in parts:
            name, equals, value = part.partition("=")
            try:
                changes[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                equals = ""
            if not equals:
                raise ValueError(f"--modes {text}: {part!r}: allowed are changes such as smoothing=false")
        return cls(text, mode, changes)

    @property
    def title(self) -> str:
        words = {True: "{}", False: "no {}"}
        parts = [(words[value] if isinstance(value, bool) else f"{{}} {value}").format(name.replace("_", " "))
                 for name, value in self.changes.items()]  # fmt: skip
        return ", ".join([self.mode, *parts])

    def at(self, width: str) -> Recipe:
        """Raises ValueError for an option that there is not, a value that is not allowed, or one that would change nothing."""
        try:
            return Recipe.of(self.mode, width, **self.changes)
        except ValueError as error:
            raise ValueError(f"--modes {self.text} at {width}: {error}") from None

    def says(self, section: str) -> bool:
        """Whether its changes are about details of a section of the recipe."""
        return any(path.startswith(f"{section}.") for path in changes_of(Recipe, self.changes))


def title_of(mode: str) -> str:
    """What tables and pictures call a mode of the benchmark."""
    return PEERS[mode].title if mode in PEERS else Composition.parse(mode).title


DEFAULT_MODES = ("linear", "qdiff", "qncd", "qncd+")
WIDTHS = ("W8A8", "W4A8", "W8A6", "W4A6")
FULL = "FP"
SAMPLES = "samples"  # folder of images that are kept of cells, below it one of each cell and one of full precision
PART = 512  # full-precision images in one file of the cache
ERROR_IMAGES = 64
UNBIASED_IMAGES = 2048  # FID is biased upwards at fewer
# Fields of QuantConfig that reconstructed weights do not depend on: their inputs are not rounded yet, but in a smoothing search.
ACTIVATIONS = (
    "act_bits", "softmax_bits", "act_range", "softmax_range", "act_symmetric", "stepwise_activations", "bias_correction",
    "bit_allocation", "act_granularity", "act_format", "temporal_differences", "attention_bits",
)  # fmt: skip
_INTEGERS = re.compile(r"[Ww]([2-8])[Aa]([2-8])")
FORMAT = 4  # of a cell's file; raised when the same settings come to mean something else


@dataclass(frozen=True)
class Plan:
    """What all cells of a benchmark share; sent to every worker.

    Attributes:
        out: folder of the results.
        model_config: the model's yaml.
        ckpt: where its weights are, None for those that the config names.
        subject_settings: hashes of the weights and what else decides the images of a model.
        scale: of guidance, None for what the model's yaml recommends.
        calibration: with the seed of the first repetition; others count up from it.
        correction: of the modes that correct.
        reconstruction: of the modes that reconstruct.
        controlled: record the full-precision noise table, because some mode corrects.
        image_seed: image i has the seed image_seed + i.
        commit: of the code, for the cells' files.
        engines: that cells' networks are timed on.
    """

    out: Path
    model_config: dict[str, Any]
    ckpt: str | None
    subject_settings: dict[str, Any]
    scale: float | None
    device: str
    sampler: SamplerConfig
    calibration: CalibrationConfig
    correction: CorrectionConfig
    reconstruction: ReconstructionConfig
    controlled: bool
    images: int
    image_seed: int
    batch_size: int
    commit: str | None = None
    engines: tuple[str, ...] = ()

    def subject(self) -> Subject:
        """The full-precision model, read anew."""
        from qncd.benchmark.subjects import load_subject

        return load_subject(self.model_config, self.ckpt, self.sampler, self.scale, self.device)

    def base_settings(self) -> dict[str, Any]:
        """What decides the full-precision images."""
        return {
            "format": FORMAT, "subject": self.subject_settings, "sampler": dataclasses.asdict(self.sampler),
            "image_seed": self.image_seed,
        }  # fmt: skip

    def cached(self, kind: str, suffix: str, settings: dict[str, Any]) -> Path:
        """A file of the cache, named after all that decides its content: other settings never find it."""
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return self.out / "cache" / f"{kind}_{key}{suffix}"

    def calibration_recipe(self, seed: int) -> Recipe:
        """What one repetition's calibration set and noise table are sampled with; all modes take them."""
        correction = self.correction if self.controlled else None
        calibration = dataclasses.replace(self.calibration, seed=seed)
        return Recipe(smoothing=None, reconstruction=None, correction=correction, offline=None, calibration=calibration)

    def part_path(self, start: int) -> Path:
        stop = min(start + PART, self.images)
        return self.cached(f"fp_{start:06d}_{stop:06d}", ".npz", self.base_settings())

    def calibration_paths(self, seed: int) -> tuple[Path, Path]:
        """Calibration set and noise table of one repetition."""
        settings = self.base_settings() | {
            "calibration": dataclasses.asdict(self.calibration),
            "correction": dataclasses.asdict(self.correction) if self.controlled else None,
        }
        kind = f"calibration_{seed}"
        return self.cached(kind, ".pt", settings), self.cached(kind, ".safetensors", settings)


@dataclass(frozen=True, order=True)
class Cell:
    """One run of the benchmark: a width and a mode with one calibration seed, or full precision."""

    width: str
    mode: str = FULL
    seed: int = 0

    @property
    def name(self) -> str:
        return FULL if self.mode == FULL else f"{self.width}_{self.mode}_seed{self.seed}"

    def path(self, plan: Plan) -> Path:
        return plan.out / "cells" / f"{self.name}.json"

    def engines_path(self, plan: Plan) -> Path:
        """Of what its network does on engines."""
        return plan.out / "engines" / f"{self.name}.json"

    @property
    def peer(self) -> Peer | None:
        """The toolkit that quantizes, None for this package."""
        return PEERS.get(self.mode)

    def recipe_in(self, plan: Plan) -> Recipe | None:
        """The recipe with the cell's seed, and what the plan says where the mode does not; None for full precision and peers."""
        if self.mode == FULL or self.peer:
            return None
        composition = Composition.parse(self.mode)
        recipe = composition.at(self.width)
        own = {name: composition.says(name) for name in ("reconstruction", "correction")}
        return dataclasses.replace(
            recipe,
            reconstruction=recipe.reconstruction if own["reconstruction"] else recipe.reconstruction and plan.reconstruction,
            correction=recipe.correction if own["correction"] else recipe.correction and plan.correction,
            calibration=dataclasses.replace(plan.calibration, seed=self.seed),
        )

    def reconstruction_folder(self, plan: Plan) -> Path | None:
        """Where the reconstructed blocks are: one folder for all cells whose weights come out the same."""
        recipe = self.recipe_in(plan)
        if recipe is None or recipe.reconstruction is None:
            return None
        ignored = () if recipe.quant.smoothing_search else ACTIVATIONS
        settings = plan.base_settings() | {
            "weights": {key: value for key, value in dataclasses.asdict(recipe.quant).items() if key not in ignored},
            "smoothing": recipe.smoothing and dataclasses.asdict(recipe.smoothing),
            "reconstruction": dataclasses.asdict(recipe.reconstruction),
            "calibration": dataclasses.asdict(recipe.calibration),
        }
        return plan.cached("reconstruction", "", settings)

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Everything that decides the cell's figures, as it comes back from JSON."""
        settings = plan.base_settings() | {"images": plan.images, "error_images": ERROR_IMAGES}
        if recipe := self.recipe_in(plan):
            settings["recipe"] = recipe.to_json()
        if self.peer:
            settings["peer"] = {"name": self.mode, "width": self.width, "settings": self.peer.settings}
            if self.peer.calibrated:
                settings["peer"]["calibration"] = dataclasses.asdict(dataclasses.replace(plan.calibration, seed=self.seed))
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def finished(self, plan: Plan) -> dict[str, Any] | None:
        """The cell's file; None if it is missing, damaged or made with other settings."""
        try:
            record: dict[str, Any] = read_json(self.path(plan))
            return record if record["settings"] == self.settings(plan) and record["figures"] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def make_cells(widths: Sequence[str] | None, modes: Sequence[str], seeds: int) -> list[Cell]:
    """Full precision, and every mode at every width that it can do, by seeds.

    Args:
        widths: asked for; None for WIDTHS.
        modes: in the order of the tables.
        seeds: repetitions; a mode that does not use the calibration set is run once.

    Raises:
        ValueError: a width is not a name such as W4A8, or a peer cannot do any of the widths asked for.
    """
    named = list(dict.fromkeys(_width_asked_for(text) for text in widths or WIDTHS))
    chosen = list(dict.fromkeys(modes))
    for mode in chosen:
        if mode in PEERS and not any(can_do(mode, width) for width in named):
            raise ValueError(f"--widths {' '.join(named)}: --modes {mode} can do {PEERS[mode].widths}")
        for width in named if mode not in PEERS else ():
            Composition.parse(mode).at(width)
    return [Cell(FULL)] + [
        Cell(width, mode, seed)
        for seed in range(seeds)
        for width in named
        for mode in chosen
        if can_do(mode, width) and (not seed or mode not in PEERS or PEERS[mode].calibrated)
    ]


def _width_asked_for(text: str) -> str:
    try:
        return width_name(text)
    except ValueError as error:
        raise ValueError(f"--widths {text}: {str(error).partition(': ')[2]}") from None


def can_do(mode: str, width: str) -> bool:
    """Whether a mode supports a width such as W4A8: peers support only some, all of them of integers."""
    return mode not in PEERS or (_INTEGERS.fullmatch(width) is not None and PEERS[mode].allows(*integer_bits(width)))


def corrects(cell: Cell) -> bool:
    """Whether its mode corrects noise while sampling."""
    return cell.mode != FULL and cell.peer is None and Composition.parse(cell.mode).at(cell.width).correction is not None


def integer_bits(text: str) -> tuple[int, int]:
    """Bits of weights and activations of a name such as W4A8. Raises ValueError for anything else."""
    match = _INTEGERS.fullmatch(text)
    if not match:
        raise ValueError(f"--widths {text}: allowed are names such as W4A8, 2 to 8 bits each")
    return int(match[1]), int(match[2])
