"""Options of smoothing by the embedding: a part of `qncd.recipe.Recipe`."""

from __future__ import annotations

from dataclasses import dataclass

from qncd.options import Limits, check_options, option


@dataclass(frozen=True)
class SmoothingConfig:
    """Intra noise: embedding-derived feature smoothing (QNCD, arXiv 2403.19140, section 3.2).

    Attributes:
        floor: smallest factor; 1 only ever shrinks channels, as in the paper.
        strength: power of the factors; 1 is the paper's, less of it leaves the weights easier to round.
        transformers: those are smoothed too, by the scales of AdaLN, which costs more than it brings (docs/quality.md). A mode
            leaves them out; whoever asks for smoothing by name has it.
    """

    floor: float = option(1.0, limits=Limits(above=0, high=1))
    strength: float = option(1.0, limits=Limits(above=0, high=1))
    transformers: bool = option(False)

    def __post_init__(self) -> None:
        check_options(self)
