"""Corrections that know beforehand, from runs of the full-precision and the quantized model: what they know, and by what kind."""

from __future__ import annotations

from typing import TypeAlias

from qncd.recipe import TRACKING, check_choice
from qncd.sampling.corrector import Corrector
from qncd.sampling.correctors import offline_noise
from qncd.sampling.correctors.offline_noise import OfflineCorrector, OfflineStatistics
from qncd.sampling.correctors.tracking import TrackingCorrector, TrackingFilters

OfflineRecord: TypeAlias = OfflineStatistics | TrackingFilters
KINDS = (*offline_noise.KINDS, TRACKING)


def fits(kind: str, record: OfflineRecord | None) -> bool:
    """Whether a record is what this kind of correction needs."""
    return record is not None and isinstance(record, TrackingFilters) == (kind == TRACKING)


def offline_corrector(kind: str, record: OfflineRecord) -> Corrector:
    """The correction of a kind. Raises ValueError for a kind that there is not, or another kind's record."""
    check_choice("kind", kind, KINDS)
    if not fits(kind, record):
        raise ValueError(f"{kind}: made for another correction ({type(record).__name__})")
    return TrackingCorrector(record) if isinstance(record, TrackingFilters) else OfflineCorrector(kind, record)
