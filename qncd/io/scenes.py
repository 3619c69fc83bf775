"""Captioned scenes: one or two flat shapes on a plain ground, drawn from a caption and a random generator.

The bundled text-to-image model is trained on them and measured by them. Every caption follows one grammar, so a
caption can be parsed back into the scene that it describes, and what a picture should show is known exactly:

    caption  = object | object " " relation " " object
    object   = "a " size " " colour " " shape
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
SIZES = ("small", "large")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "purple": (150, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}  # with their inverses
GROUND = (238, 238, 238)
HELD_OUT_PER_CENT = 10

_RADII = {"small": (5.5, 7.0), "large": (10.0, 11.5)}  # pixels, the range of the jitter
_CENTRES = (17.0, 47.0)  # pixels, of the upper or left and of the lower or right object
_JITTER_ALONG, _JITTER_ACROSS = 1.0, 5.0  # pixels, along the axis of the relation and across it
_COLOUR_JITTER = 12  # levels of 255
_ALONE_JITTER = 12.0


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
        size: a member of SIZES.
        colour: a key of COLOURS.
        shape: a member of SHAPES.

    Raises:
        ValueError: an attribute is not one of these.
    """

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("size", self.size, SIZES),
            ("colour", self.colour, tuple(COLOURS)),
            ("shape", self.shape, SHAPES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: allowed are {', '.join(allowed)}")

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: `first`, alone, or `first` in `relation` to `second`.

    Attributes:
        relation: a key of RELATIONS, None for an object alone.

    Raises:
        ValueError: an unknown relation, one of relation and second without the other, or the same object twice.
    """

    first: SceneObject
    relation: str | None = None
    second: SceneObject | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None):
            raise ValueError(f"relation {self.relation!r} with the second object {self.second}: both or neither")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"relation {self.relation!r}: allowed are {', '.join(RELATIONS)}")
        if self.first == self.second:
            raise ValueError(f"{self.first} twice: the objects of a scene differ")


def caption_of(scene: Scene) -> str:
    """The caption: "a small red circle above a large blue square", or "a small red circle" alone."""
    if scene.second is None:
        return str(scene.first)
    return f"{scene.first} {scene.relation} {scene.second}"


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes, the inverse of `caption_of`; capitals and spacing do not matter.

    Raises:
        ValueError: the caption does not follow the grammar of this module.
    """
    words = caption.lower().split()
    if len(words) == 4:
        return Scene(_parse_object(caption, words))
    if len(words) > 8:
        return Scene(_parse_object(caption, words[:4]), " ".join(words[4:-4]), _parse_object(caption, words[-4:]))
    raise ValueError(f"caption {caption!r}: expected 'a SIZE COLOUR SHAPE', alone or with a relation and a second one")


def _parse_object(caption: str, words: Sequence[str]) -> SceneObject:
    if words[0] != "a":
        raise ValueError(f"caption {caption!r}: expected 'a SIZE COLOUR SHAPE', got {' '.join(words)!r}")
    return SceneObject(*words[1:])


def canonical(scene: Scene) -> Scene:
    """The same arrangement told with "above" or "left of": "A below B" becomes "B above A"."""
    if scene.second is None or scene.relation in ("above", "left of"):
        return scene
    assert scene.relation is not None
    return Scene(scene.second, RELATIONS[scene.relation], scene.first)


def all_objects() -> list[SceneObject]:
    """Every object, in a fixed order."""
    return [SceneObject(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]


def all_scenes() -> list[Scene]:
    """Every scene that has a caption, in a fixed order: 48 objects alone and 9,024 pairs."""
    objects = all_objects()
    pairs = [Scene(a, relation, b) for a in objects for relation in RELATIONS for b in objects if a != b]
    return [Scene(a) for a in objects] + pairs


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees the scene: about 10 % of the pairs, by the hash of their canonical caption.

    Both ways to tell an arrangement ("A above B", "B below A") are held out together. Objects alone never are, so
    training sees every word.
    """
    if scene.second is None:
        return False
    digest = hashlib.sha256(caption_of(canonical(scene)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PER_CENT


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline, negative inside; the shapes have similar areas for a radius."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.89 * radius
    if shape == "triangle":  # equilateral, on its base, its centroid a bit above the middle
        inner, y = 0.68 * radius, y - 0.18 * radius
        return np.maximum(y - inner, np.sqrt(0.75) * abs(x) - 0.5 * y - inner)
    arm, length = 0.36 * radius, 1.05 * radius
    return np.maximum(np.minimum(abs(x), abs(y)) - arm, np.maximum(abs(x), abs(y)) - length)


def blank_canvas(rng: np.random.Generator) -> np.ndarray:
    """The ground without objects, float (64, 64, 3) in [0, 255]; its brightness varies a little."""
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), GROUND, np.float64) + rng.integers(-4, 5)


def draw_object_(canvas: np.ndarray, item: SceneObject, centre: tuple[float, float], rng: np.random.Generator) -> None:
    """Blend an antialiased object into a canvas; its radius and the brightness of its colour vary a little.

    Args:
        canvas: float (H, W, 3) in [0, 255], changed in place.
        centre: (x, y) in pixels from the upper left corner.
    """
    radius = rng.uniform(*_RADII[item.size])
    colour = np.array(COLOURS[item.colour]) + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1)
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]] + 0.5
    distance = _signed_distance(item.shape, x - centre[0], y - centre[1], radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # the share of the pixel that the shape covers
    canvas += cover * (np.clip(colour, 0, 255) - canvas)


def to_uint8(canvas: np.ndarray) -> np.ndarray:
    """A canvas, float (H, W, 3) in [0, 255], as uint8."""
    return np.clip(canvas.round(), 0, 255).astype(np.uint8)


def render_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One picture of the scene, uint8 (64, 64, 3), antialiased, on a light grey ground.

    Positions, sizes and the brightness of the colours vary a little with the generator, within what the caption says.
    """
    canvas = blank_canvas(rng)
    if scene.second is None:
        x, y = IMAGE_SIZE / 2 + rng.uniform(-_ALONE_JITTER, _ALONE_JITTER, 2)
        draw_object_(canvas, scene.first, (x, y), rng)
    else:
        told = canonical(scene)
        assert told.second is not None
        for item, along in zip((told.first, told.second), _CENTRES, strict=True):
            along += rng.uniform(-_JITTER_ALONG, _JITTER_ALONG)
            across = IMAGE_SIZE / 2 + rng.uniform(-_JITTER_ACROSS, _JITTER_ACROSS)
            draw_object_(canvas, item, (across, along) if told.relation == "above" else (along, across), rng)
    return to_uint8(canvas)


def scene_dataset(
    count: int, seed: int, held_out: bool = False, alone: float = 0.1, inverse: float = 0.5
) -> tuple[np.ndarray, list[str]]:
    """Random scenes of one split with their captions.

    Args:
        count: number of pictures.
        seed: of the choice of the scenes and of the pictures; the same seed gives the same data.
        held_out: scenes that training never sees instead of those that it sees.
        alone: share of objects alone, 0 to 1; of no effect on the held-out split, which has none.
        inverse: share of the pairs that are told with "below" or "right of", 0 to 0.5; changes captions, no picture.

    Returns:
        images uint8 (count, 64, 64, 3) and `count` captions.

    Raises:
        ValueError: inverse is not allowed.
    """
    if not 0 <= inverse <= 0.5:
        raise ValueError(f"inverse {inverse}: allowed are 0 to 0.5")
    rng, wording = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    scenes = [scene for scene in all_scenes() if is_held_out(scene) == held_out]
    singles = [scene for scene in scenes if scene.second is None]
    pairs = [scene for scene in scenes if scene.second is not None]
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    captions = []
    for image in images:
        pool = singles if singles and rng.random() < alone else pairs
        scene = pool[rng.integers(len(pool))]
        image[:] = render_scene(scene, rng)
        captions.append(caption_of(scene if wording.random() < 2 * inverse else canonical(scene)))
    return images, captions
