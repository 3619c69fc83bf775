"""The classifier in the box reads rendered scenes right, and the scores count what they say they count."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qncd.io.scenes import Scene, SceneObject, canonical, caption_of, scene_dataset
from qncd.metrics.networks.scene_classifier import (
    CLASSIFIER_PATH,
    Reading,
    SceneClassifier,
    caption_accuracy,
    load_scene_classifier,
    read_scenes,
    scene_targets,
)

RED = SceneObject("small", "red", "circle")
BLUE = SceneObject("large", "blue", "square")
BLACK = SceneObject("large", "black", "cross")


class Says(SceneClassifier):
    """A classifier that says the same classes whatever it is shown."""

    def __init__(self, scene: Scene | None) -> None:
        super().__init__()
        self.classes = [max(0, target) for target in scene_targets(scene)]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        widths = (4, 2, 6, 4, 2, 6, 4)
        return [torch.eye(width)[c].expand(len(images), width) for width, c in zip(widths, self.classes, strict=True)]


def scores(shown: Scene | None, caption: str) -> dict[str, float]:
    return vars(caption_accuracy(np.zeros((1, 64, 64, 3), np.uint8), [caption], Says(shown)))


def test_everything_right() -> None:
    shown = Scene(RED, "above", BLUE)
    for caption in ("a small red circle above a large blue square", "a large blue square below a small red circle"):
        assert scores(shown, caption) == dict(count=1, size=1, colour=1, shape=1, relation=1, all_correct=1)


def test_swapped_objects_are_a_wrong_relation() -> None:
    result = scores(Scene(BLUE, "above", RED), "a small red circle above a large blue square")
    assert result == dict(count=1, size=1, colour=1, shape=1, relation=0, all_correct=0)


def test_an_exchanged_attribute_is_counted_for_each_object() -> None:
    shown = Scene(SceneObject("small", "blue", "circle"), "left of", SceneObject("large", "red", "square"))
    result = scores(shown, "a small red circle left of a large blue square")
    assert result == dict(count=1, size=1, colour=0, shape=1, relation=1, all_correct=0)


def test_a_missing_object_counts_against_its_attributes() -> None:
    result = scores(Scene(BLUE), "a small red circle above a large blue square")
    assert result == dict(count=1, size=0.5, colour=0.5, shape=0.5, relation=0, all_correct=0)


def test_one_object_too_many_is_a_wrong_relation() -> None:
    result = scores(Scene(RED, "above", BLUE), "a large blue square")
    assert result == dict(count=1, size=1, colour=1, shape=1, relation=0, all_correct=0)


def test_clutter_is_never_right() -> None:
    result = scores(None, "a large blue square")
    assert result == dict(count=1, size=0, colour=0, shape=0, relation=0, all_correct=0)
    assert read_scenes(np.zeros((2, 64, 64, 3), np.uint8), Says(None)) == 2 * [Reading("other", ())]


def test_scores_average_over_pictures() -> None:
    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    result = caption_accuracy(pictures, [caption_of(Scene(RED)), caption_of(Scene(BLACK))], Says(Scene(RED)))
    assert result.count == 2 and result.all_correct == result.colour == result.size == result.shape == 0.5
    assert result.relation == 1


@pytest.mark.parametrize("scene", [Scene(RED), Scene(RED, "below", BLUE), Scene(BLACK, "left of", RED)])
def test_reading_undoes_targets(scene: Scene) -> None:
    told = canonical(scene)
    reading = Reading.from_classes([max(0, target) for target in scene_targets(scene)])
    assert reading.layout == (told.relation or "alone")
    assert reading.objects == tuple(item for item in (told.first, told.second) if item is not None)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        read_scenes(torch.zeros(1, 3, 64, 64), Says(None))
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        caption_accuracy(np.zeros((1, 64, 64, 3), np.uint8), ["a small red circle"] * 2, Says(None))
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        caption_accuracy(np.zeros((0, 64, 64, 3), np.uint8), [], Says(None))


def test_a_file_that_is_none(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_scene_classifier(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="not the weights of the scene classifier"):
        load_scene_classifier(tmp_path / "text.safetensors")


def test_the_classifier_in_the_box_reads_held_out_scenes() -> None:
    images, captions = scene_dataset(300, seed=77, held_out=True)
    result = caption_accuracy(images, captions)
    assert result.all_correct >= 0.98
    # Told of other scenes, it says no.
    assert caption_accuracy(images, captions[1:] + captions[:1]).all_correct < 0.02


def test_the_file_in_the_box_is_small_and_says_what_it_measures() -> None:
    assert CLASSIFIER_PATH.stat().st_size < 500_000
    _, metadata = load_scene_classifier()
    for name in ("rendered", "through the first stage"):
        assert json.loads(metadata[name])["all_correct"] >= 99
