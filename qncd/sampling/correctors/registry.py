"""The kinds of correction by name. An author adds a line here."""

from __future__ import annotations

from qncd.recipe import Recipe
from qncd.sampling.corrector import Corrector, CorrectorKind, Record
from qncd.sampling.correctors.offline_noise import D2DPM, PTQD
from qncd.sampling.correctors.runtime import RuntimeNoise
from qncd.sampling.correctors.tracking import Tracking

CORRECTORS: dict[str, CorrectorKind] = {
    "runtime": RuntimeNoise(),
    "ptqd": PTQD(),
    "d2dpm": D2DPM(),
    "tracking": Tracking(),
}


def kind_of(recipe: Recipe) -> CorrectorKind | None:
    """The correction that a recipe asks for. Raises ValueError for a name that is none."""
    name = "runtime" if recipe.correction is not None else recipe.offline
    if name is None:
        return None
    if name not in CORRECTORS:
        raise ValueError(f"correction {name!r}: allowed are {', '.join(CORRECTORS)}")
    return CORRECTORS[name]


def fits(kind: CorrectorKind, recipe: Recipe, record: Record | None) -> bool:
    """Whether a record is what this correction needs."""
    if record is None:
        return not kind.needs_record(recipe)
    return kind.record is not None and isinstance(record, kind.record)


def corrector_of(recipe: Recipe, record: Record | None) -> Corrector | None:
    """The correction of a recipe, with what it knows. Raises ValueError for another correction's record."""
    kind = kind_of(recipe)
    if kind is None:
        return None
    if not fits(kind, recipe, record):
        name = next(name for name, known in CORRECTORS.items() if known is kind)
        raise ValueError(f"{name}: made for another correction ({type(record).__name__})")
    return kind.corrector(recipe, record)
