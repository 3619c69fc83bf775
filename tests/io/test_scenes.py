"""Captions and scenes say the same thing, pictures show it, and the held-out split keeps apart what it should."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from qncd.io import scenes
from qncd.io.datasets import load_conditioned
from qncd.io.scenes import Scene, SceneObject, all_scenes, canonical, caption_of, is_held_out, parse_caption, render_scene

RED = SceneObject("small", "red", "circle")
BLUE = SceneObject("large", "blue", "square")


def test_captions_and_scenes_are_one_to_one() -> None:
    every = all_scenes()
    captions = [caption_of(scene) for scene in every]
    assert len(set(captions)) == len(every) == 48 + 48 * 47 * 4
    assert [parse_caption(caption) for caption in captions] == every


def test_caption_reads_as_the_issue_writes_it() -> None:
    assert caption_of(Scene(RED, "above", BLUE)) == "a small red circle above a large blue square"
    assert parse_caption("  A small RED circle left  of a large blue square ") == Scene(RED, "left of", BLUE)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "expected 'a SIZE COLOUR SHAPE'"),
        ("a red circle", "expected 'a SIZE COLOUR SHAPE'"),
        ("the small red circle", "got 'the small red circle'"),
        ("a small pink circle", "colour 'pink': allowed are red, green, blue, yellow, purple, black"),
        ("a tiny red circle", "size 'tiny': allowed are small, large"),
        ("a small red star", "shape 'star': allowed are circle, square, triangle, cross"),
        ("a small red circle near a large blue square", "relation 'near': allowed are above, below, left of, right of"),
        ("a small red circle above a small red circle", "twice"),
    ],
)
def test_captions_outside_of_the_grammar(caption: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_caption(caption)


def test_a_relation_needs_a_second_object() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        Scene(RED, "above")


def test_held_out_scenes_are_held_out_in_both_wordings() -> None:
    every = all_scenes()
    held = [scene for scene in every if is_held_out(scene)]
    assert 0.08 < len(held) / len(every) < 0.12
    assert {canonical(scene) for scene in held}.isdisjoint(canonical(scene) for scene in every if not is_held_out(scene))
    assert all(scene.second is not None for scene in held)
    # Training must have seen every object in every place, or the split would ask for more than combining.
    seen = {(canonical(s).relation, place, item) for s in every if not is_held_out(s)
            for place, item in enumerate((canonical(s).first, canonical(s).second))}  # fmt: skip
    assert len(seen) == 48 + 1 + 2 * 2 * 48  # alone (with None as the second), and both places of both relations


def test_pictures_follow_the_generator() -> None:
    scene = Scene(RED, "above", BLUE)
    one, same, other = (render_scene(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    assert (one == same).all() and (one != other).any()


@pytest.mark.parametrize("relation", scenes.RELATIONS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_pictures_show_what_the_caption_says(relation: str, shape: str) -> None:
    """Colours by their pixels, places by the pixels' means, sizes by their counts."""
    small, large = SceneObject("small", "red", shape), SceneObject("large", "blue", shape)
    picture = render_scene(Scene(small, relation, large), np.random.default_rng(3)).astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110)
    blue = (picture[..., 2] > 150) & (picture[..., 0] < 110)
    assert 30 < red.sum() < blue.sum() / 1.8
    step = np.argwhere(red).mean(0) - np.argwhere(blue).mean(0)  # (rows, columns)
    axis = 0 if relation in ("above", "below") else 1
    assert abs(step[axis]) > 20 > abs(step[1 - axis])
    assert (step[axis] < 0) == (relation in ("above", "left of"))


def test_objects_are_antialiased_and_inside() -> None:
    """Between ground and object there are mixed pixels, and the border shows ground only, for every scene of a sample."""
    picture = render_scene(Scene(SceneObject("large", "black", "circle")), np.random.default_rng(0))
    assert ((picture > 60) & (picture < 200)).any()
    images, _ = scenes.scene_dataset(200, seed=4)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert border.min() > 225


def test_scene_dataset_is_of_one_split_and_reproducible() -> None:
    images, captions = scenes.scene_dataset(40, seed=5)
    again, same = scenes.scene_dataset(40, seed=5)
    assert (images == again).all() and captions == same
    assert not any(is_held_out(parse_caption(caption)) for caption in captions)
    assert 0 < sum(parse_caption(caption).second is None for caption in captions) < 20
    _, held = load_conditioned("SCENES", "test", 40)
    assert all(is_held_out(parse_caption(str(caption))) for caption in held)
    assert hashlib.sha256(images.tobytes()).hexdigest() != hashlib.sha256(scenes.scene_dataset(40, 6)[0].tobytes()).hexdigest()


def test_share_of_inverse_wordings() -> None:
    """The share changes captions and no picture, and every caption still describes its picture."""
    images, captions = scenes.scene_dataset(300, seed=6)
    same, reworded = scenes.scene_dataset(300, seed=6, inverse=0.1)
    assert (images == same).all()
    told, retold = [parse_caption(c) for c in captions], [parse_caption(c) for c in reworded]
    assert [canonical(scene) for scene in told] == [canonical(scene) for scene in retold]
    shares = [np.mean([scene.relation in ("below", "right of") for scene in some if scene.second]) for some in (told, retold)]
    assert shares == [pytest.approx(0.5, abs=0.08), pytest.approx(0.1, abs=0.05)]
    with pytest.raises(ValueError, match=r"inverse 0\.6: allowed are 0 to 0.5"):
        scenes.scene_dataset(1, seed=6, inverse=0.6)


def test_unknown_data_set_or_split() -> None:
    with pytest.raises(ValueError, match="dataset 'MNIST': allowed are FASHION_MNIST, SCENES"):
        load_conditioned("MNIST", "train")
    with pytest.raises(ValueError, match="split 'val': allowed are train, test"):
        load_conditioned("SCENES", "val")
