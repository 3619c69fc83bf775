"""What a quality benchmark compares: its plan and its cells."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.benchmark.peers import PEERS, Peer
from qncd.io.files import read_json
from qncd.modes import MODES as RECIPES
from qncd.modes import TRACKING
from qncd.recipe import (
    CalibrationConfig,
    CorrectionConfig,
    QuantConfig,
    Recipe,
    ReconstructionConfig,
    SamplerConfig,
)

if TYPE_CHECKING:
    from qncd.benchmark.subjects import Subject


@dataclass(frozen=True)
class Composition:
    """A mode with changes: what one column of the benchmark quantizes with."""

    title: str
    mode: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def at(self, width: str) -> Recipe:
        return Recipe.of(self.mode, width, **self.changes)


_RECONSTRUCTED = {"gptq": False, "reconstruction": True}
COMPOSITIONS = {name: Composition(name, name) for name in RECIPES} | {  # and ablations
    "neither": Composition("qncd, neither", "qncd", {"smoothing": False, "correction": False}),
    "smoothing": Composition("qncd, smoothing only", "qncd", {"correction": False}),
    "correction": Composition("qncd, correction only", "qncd", {"smoothing": False}),
    "paper": Composition("qncd, no bias correction", "qncd", {"bias_correction": False}),
    "recon": Composition("qncd, weights reconstructed", "qncd", {"reconstruction": True}),
    "uniform": Composition("qncd+, one width for all", "qncd+", {"bit_allocation": False}),
    "gptq": Composition("qncd+, one range for all steps", "qncd+", {"stepwise_activations": False}),
    "stepwise": Composition("qncd+, rounding to nearest", "qncd+", {"gptq": False}),
    "unsmoothed": Composition("qncd+, no smoothing", "qncd+", {"smoothing_search": False}),
    "extremes": Composition("qncd+, ranges by extremes", "qncd+", {"act_range": "max"}),
    "plus-recon": Composition("qncd+, weights reconstructed", "qncd+", _RECONSTRUCTED),
    "untracked": Composition("qncd+, no tracking", "qncd+", {"tracking": False}),
    "plus-smoothing": Composition("qncd+ and smoothing", "qncd+", {"smoothing": True}),
    "plus-correction": Composition("qncd+, runtime correction for tracking", "qncd+", {"correction": True}),
    "tracked": Composition("qncd, tracking for runtime correction", "qncd", {"tracking": True}),
}
MODES = {name: composition.title for name, composition in COMPOSITIONS.items()}
MODES["qncd"] = "qncd (weights rounded to nearest)"  # unlike the compared methods, and the paper's own W4 rows
MODES |= {mode: peer.title for mode, peer in PEERS.items()}
DEFAULT_MODES = ("linear", "smoothing", "correction", "qncd")
WIDTHS = ("W8A8", "W4A8", "W8A6", "W4A6")
FULL = "FP"
PART = 512  # full-precision images in one file of the cache
ERROR_IMAGES = 64
UNBIASED_IMAGES = 2048  # FID is biased upwards at fewer
# Fields of QuantConfig that reconstructed weights do not depend on: their inputs are not rounded yet.
ACTIVATIONS = (
    "act_bits", "softmax_bits", "act_range", "softmax_range", "act_symmetric", "stepwise_activations", "bias_correction",
    "smoothing_search", "bit_allocation",
)  # fmt: skip
FORMAT = 2  # of a cell's file; raised when the same settings come to mean something else


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

    @property
    def peer(self) -> Peer | None:
        """The toolkit that quantizes, None for this package."""
        return PEERS.get(self.mode)

    @property
    def recipe(self) -> Recipe | None:
        """None for full precision and peers."""
        return COMPOSITIONS[self.mode].at(self.width) if self.mode in COMPOSITIONS else None

    def recipe_in(self, plan: Plan) -> Recipe | None:
        """The recipe with what the plan says about reconstruction, correction and calibration, and the cell's seed."""
        recipe = self.recipe
        return recipe and dataclasses.replace(
            recipe,
            reconstruction=recipe.reconstruction and plan.reconstruction,
            correction=recipe.correction and plan.correction,
            calibration=dataclasses.replace(plan.calibration, seed=self.seed),
        )

    @property
    def quant(self) -> QuantConfig | None:
        return self.recipe.quant if self.recipe else None

    def reconstruction_folder(self, plan: Plan) -> Path | None:
        """Where the reconstructed blocks are: one folder for all cells whose weights come out the same."""
        recipe = self.recipe_in(plan)
        if recipe is None or recipe.reconstruction is None:
            return None
        settings = plan.base_settings() | {
            "weights": {key: value for key, value in dataclasses.asdict(recipe.quant).items() if key not in ACTIVATIONS},
            "smoothing": recipe.smoothing and dataclasses.asdict(recipe.smoothing),
            "reconstruction": dataclasses.asdict(recipe.reconstruction),
            "calibration": dataclasses.asdict(recipe.calibration),
        }
        return plan.cached("reconstruction", "", settings)

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Everything that decides the cell's figures, as it comes back from JSON."""
        settings = plan.base_settings() | {"images": plan.images, "error_images": ERROR_IMAGES}
        settings |= dict.fromkeys(("quantization", "smoothing", "correction", "reconstruction", "calibration"))
        if recipe := self.recipe_in(plan):
            content = recipe.to_json()
            settings |= {"quantization": content["quant"]} | {key: content[key] for key in settings if key in content}
            if recipe.offline == TRACKING:
                settings["tracking"] = True
            for name in ("smoothing_search", "bit_allocation"):  # cells that are older than these settings stay valid
                if not getattr(recipe.quant, name):
                    del settings["quantization"][name]
        if self.peer:
            settings["quantization"] = {"peer": self.mode, "width": self.width, "settings": self.peer.settings}
            if self.peer.calibrated:
                settings["calibration"] = dataclasses.asdict(dataclasses.replace(plan.calibration, seed=self.seed))
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
        modes: sorted into the order of MODES.
        seeds: repetitions; a mode that does not use the calibration set is run once.

    Raises:
        ValueError: a width is not a name such as W4A8, or a peer cannot do any of the widths asked for.
    """
    named = [f"W{w}A{a}" for w, a in dict.fromkeys(parse_width(text) for text in widths or WIDTHS)]
    chosen = [mode for mode in MODES if mode in modes]
    for mode in chosen:
        if mode in PEERS and not any(can_do(mode, width) for width in named):
            raise ValueError(f"--widths {' '.join(named)}: --modes {mode} can do {PEERS[mode].widths}")
    return [Cell(FULL)] + [
        Cell(width, mode, seed)
        for seed in range(seeds)
        for width in named
        for mode in chosen
        if can_do(mode, width) and (not seed or mode not in PEERS or PEERS[mode].calibrated)
    ]


def can_do(mode: str, width: str) -> bool:
    """Whether a mode supports a width such as W4A8: peers support only some."""
    return mode not in PEERS or PEERS[mode].allows(*parse_width(width))


def corrects(mode: str) -> bool:
    return mode in COMPOSITIONS and COMPOSITIONS[mode].at(WIDTHS[0]).correction is not None


def parse_width(text: str) -> tuple[int, int]:
    """Bits of weights and activations of a name such as W4A8. Raises ValueError for anything else."""
    match = re.fullmatch(r"[Ww]([2-8])[Aa]([2-8])", text)
    if not match:
        raise ValueError(f"--widths {text}: allowed are names such as W4A8, 2 to 8 bits each")
    return int(match[1]), int(match[2])
