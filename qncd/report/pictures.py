"""Images as data of the page: encoded within a budget of bytes, and differences that can be seen."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

BUDGET = 2_400_000  # characters of all images together: the page is to stay under 5 MB
# How images are shown, the first that fits: longest side and format.
STEPS = ((None, "PNG"), (768, "JPEG"), (512, "JPEG"), (384, "JPEG"), (256, "JPEG"), (192, "JPEG"), (128, "JPEG"), (64, "JPEG"))
QUALITY = 88
GAINS = (32, 16, 8, 4, 2, 1)  # of differences
SEEN = 99  # percentile of the differences that must not be cut off


@dataclass(frozen=True)
class Encoded:
    """Images as data URIs by their names, and how they are shown, in words."""

    sources: Mapping[str, str]
    note: str


def encode(images: Mapping[str, np.ndarray], budget: int = BUDGET) -> Encoded:
    """Images uint8 (H, W, 1 or 3) in the best form of STEPS that stays within the budget, the last where none does."""
    for side, kind in STEPS:
        sources: dict[str, str] = {}
        left = budget
        for name, image in images.items():
            sources[name] = _uri(image, side, kind)
            left -= len(sources[name])
            if left < 0 and (side, kind) != STEPS[-1]:
                break
        else:
            break
    largest = max((max(image.shape[:2]) for image in images.values()), default=0)
    shrunk = f", shrunk to {side} pixels" if side is not None and side < largest else ""
    return Encoded(sources, "as they are" if kind == "PNG" else f"as {kind} of quality {QUALITY}{shrunk}")


def _uri(image: np.ndarray, side: int | None, kind: str) -> str:
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if side is not None and max(picture.size) > side:
        scale = side / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format=kind, **({"optimize": True} if kind == "PNG" else {"quality": QUALITY}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def gain_for(differences: list[np.ndarray]) -> int:
    """The largest of GAINS at which nearly all of the difference (SEEN %) of the image in the middle can still be told apart."""
    if not differences:
        return 1
    typical = np.median([np.percentile(np.abs(difference), SEEN) for difference in differences])
    return next((gain for gain in GAINS if gain * typical <= 127), 1)


def difference(exact: np.ndarray, image: np.ndarray) -> np.ndarray:
    """image - exact, int16 (H, W, C)."""
    return image.astype(np.int16) - exact.astype(np.int16)


def magnified(found: np.ndarray, gain: int) -> np.ndarray:
    """A difference as an image: grey where there is none, `gain` times as strong."""
    return np.clip(128 + gain * found.astype(np.int32), 0, 255).astype(np.uint8)
