"""The small classifier that reads a picture of a scene: does it show what its caption says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qncd.io.scenes import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene, SceneObject, canonical, parse_caption
from qncd.metrics.networks.weights_file import load_weights

CLASSIFIER_PATH = Path(__file__).parents[2] / "assets" / "scene_classifier.safetensors"
LAYOUTS = ("alone", "above", "left of", "other")  # other: no object, or more than two
ATTRIBUTES = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES}
_GROUPS = [len(LAYOUTS)] + 2 * [len(values) for values in ATTRIBUTES.values()]  # logits, in order
_BATCH = 250


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class SceneClassifier(nn.Module):
    """Six 3x3 convolutions and a linear layer over the 4x4 map, so that it knows what is where: 133,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(3, 16, 2), _block(16, 32, 1), _block(32, 48, 2), _block(48, 48, 1), _block(48, 64, 2), _block(64, 64, 2)
        )
        self.head = nn.Linear(64 * (IMAGE_SIZE // 16) ** 2, sum(_GROUPS))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Logits of the layout, then of size, colour and shape of the first object, then of the second one's.

        The first object is the upper or the left one, or the only one.

        Args:
            images: [-1, 1] float NCHW, (N, 3, 64, 64).

        Returns:
            7 tensors: (N, 4), (N, 2), (N, 6), (N, 4), (N, 2), (N, 6), (N, 4).
        """
        return list(self.head(self.features(images).flatten(1)).split(_GROUPS, dim=1))


def scene_targets(scene: Scene | None) -> list[int]:
    """The 7 classes that `SceneClassifier` should say; None is a picture that no caption describes. -1: anything."""
    if scene is None:
        return [LAYOUTS.index("other")] + 6 * [-1]
    told = canonical(scene)
    targets = [LAYOUTS.index(told.relation or "alone")]
    for item in (told.first, told.second):
        targets += [-1 if item is None else values.index(getattr(item, name)) for name, values in ATTRIBUTES.items()]
    return targets


def load_scene_classifier(path: Path | None = None) -> tuple[SceneClassifier, dict[str, str]]:
    """The classifier in evaluation mode, in float32, and the metadata of its file (accuracies in per cent).

    Args:
        path: a safetensors file written by `tools/train_scene_classifier.py`; by default the bundled one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, or not of this network.
    """
    return load_weights(SceneClassifier(), path or CLASSIFIER_PATH, "scene classifier")


@dataclass(frozen=True)
class Reading:
    """What the classifier sees in a picture.

    Attributes:
        layout: a member of LAYOUTS.
        objects: the upper or left one first; one for "alone", two for "above" and "left of", none for "other".
    """

    layout: str
    objects: tuple[SceneObject, ...]

    @classmethod
    def from_classes(cls, classes: Sequence[int]) -> Reading:
        """From the 7 classes that the network says."""
        layout = LAYOUTS[classes[0]]
        count = {"alone": 1, "other": 0}.get(layout, 2)
        names = [values[c] for values, c in zip(2 * tuple(ATTRIBUTES.values()), classes[1:], strict=True)]
        return cls(layout, tuple(SceneObject(*names[3 * i : 3 * i + 3]) for i in range(count)))


def read_scenes(images: np.ndarray | torch.Tensor, classifier: SceneClassifier | None = None) -> list[Reading]:
    """What each picture shows.

    Args:
        images: uint8 NHWC, (N, 64, 64, 3).
        classifier: by default the bundled one, on the CPU.

    Raises:
        ValueError: images of another shape or type.
        FileNotFoundError: as `load_scene_classifier`.
    """
    pixels = torch.as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"images of shape {tuple(pixels.shape)} and type {pixels.dtype}: expected uint8 (N, 64, 64, 3)")
    network = classifier or load_scene_classifier()[0]
    device = next(network.parameters()).device
    readings: list[Reading] = []
    with torch.no_grad():
        for batch in pixels.split(_BATCH):
            logits = network(batch.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1)
            classes = torch.stack([group.argmax(1) for group in logits], dim=1)  # (N, 7)
            readings += [Reading.from_classes(row) for row in classes.tolist()]
    return readings


@dataclass(frozen=True)
class CaptionScores:
    """Shares of what captions say that the pictures show, each 0 to 1.

    Attributes:
        count: number of pictures.
        size, colour, shape: of the objects that the captions name.
        relation: of the captions, that the number of objects and their arrangement are right.
        all_correct: of the captions, that everything is right at once.
    """

    count: int
    size: float
    colour: float
    shape: float
    relation: float
    all_correct: float


def _agreement(scene: Scene, reading: Reading) -> tuple[list[dict[str, bool]], bool]:
    """Per object of the caption, which attributes are right; and whether the relation is.

    The objects of the picture are assigned to those of the caption in whichever order fits best, so that two objects
    in swapped places count as a wrong relation, not as wrong objects. Of two orders that fit alike, the relation's wins.
    """
    told = canonical(scene)
    asked = [item for item in (told.first, told.second) if item is not None]
    arranged = reading.layout == (told.relation or "alone")
    padded: list[SceneObject | None] = [*reading.objects, None, None][: max(len(asked), len(reading.objects))]
    best: tuple[tuple[int, bool], list[dict[str, bool]]] | None = None
    for in_order in (True, False):
        shown = padded if in_order else padded[::-1]
        marks = [
            {name: b is not None and getattr(a, name) == getattr(b, name) for name in ATTRIBUTES}
            for a, b in zip(asked, shown, strict=False)
        ]
        rank = (sum(sum(mark.values()) for mark in marks), in_order or len(asked) == 1)
        if best is None or rank > best[0]:
            best = rank, marks
    assert best is not None
    return best[1], arranged and best[0][1]


def caption_accuracy(
    images: np.ndarray | torch.Tensor, captions: Sequence[str], classifier: SceneClassifier | None = None
) -> CaptionScores:
    """How much of what the captions say the pictures show, by the classifier.

    Args:
        images: uint8 NHWC, (N, 64, 64, 3).
        captions: one a picture, in the grammar of `qncd.io.scenes`.
        classifier: by default the bundled one.

    Raises:
        ValueError: no picture, another number of captions than of pictures, a caption outside of the grammar, or images
            of another shape or type.
        FileNotFoundError: as `load_scene_classifier`.
    """
    if len(images) != len(captions) or not len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: expected as many, and at least one")
    scenes = [parse_caption(caption) for caption in captions]
    agreements = [_agreement(*pair) for pair in zip(scenes, read_scenes(images, classifier), strict=True)]
    marks = [mark for of_objects, _ in agreements for mark in of_objects]
    return CaptionScores(
        count=len(scenes),
        **{name: float(np.mean([mark[name] for mark in marks])) for name in ATTRIBUTES},
        relation=float(np.mean([related for _, related in agreements])),
        all_correct=float(np.mean([related and all(all(m.values()) for m in of) for of, related in agreements])),
    )
