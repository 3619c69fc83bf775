"""scripts/coco_prompts.py on annotations in MS-COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    images = [{"id": 10 * i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(6)]
    captions = [{"image_id": 10 * (i % 6), "id": i, "caption": f"  caption {i}\nof image {i % 6} "} for i in range(30)]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


def test_one_caption_an_image(run_script: Any, annotations: Path, tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    for i in range(6):
        (tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg").write_bytes(bytes([i]))
    out = tmp_path / "out" / "val_ann.txt"
    folders = ("--images", tmp_path / "val2014", "--copy_to", tmp_path / "real")
    run_script("coco_prompts.py", "--annotations", annotations, "--n", 4, "--out", out, *folders)
    prompts, images = out.read_text().splitlines(), (tmp_path / "out" / "val_ann.images.txt").read_text().splitlines()
    assert len(prompts) == len(images) == len(set(images)) == 4
    for prompt, image in zip(prompts, images, strict=True):
        assert prompt.split()[0] == "caption" and prompt.endswith(f"of image {int(image[-5])}")
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == sorted(images)


def test_the_draw_follows_from_the_seed(run_script: Any, annotations: Path, tmp_path: Path) -> None:
    content = json.loads(annotations.read_text())
    content["annotations"].reverse()
    content["images"].reverse()
    (tmp_path / "turned.json").write_text(json.dumps(content))
    for name, source, seed in (("a", annotations, 0), ("b", tmp_path / "turned.json", 0), ("c", annotations, 1)):
        run_script("coco_prompts.py", "--annotations", source, "--n", 5, "--seed", seed, "--out", tmp_path / f"{name}.txt")
    a, b, c = ((tmp_path / f"{name}.txt").read_text() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n", "7"), "--n 7: allowed are 1 to 6, the images with captions"),
        (("--n", "0"), "--n 0: allowed are 1 to 6"),
        (("--n", "2", "--copy_to", "x"), "--copy_to needs --images FOLDER"),
        (("--n", "2", "--images", "nowhere"), "--images nowhere: 2 of 2 images are missing"),
    ],
)
def test_bad_flags(run_script: Any, annotations: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    log = run_script("coco_prompts.py", "--annotations", annotations, "--out", tmp_path / "o.txt", *flags, status=2)
    assert message in log and not (tmp_path / "o.txt").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', '{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}'])
def test_other_files_are_refused(run_script: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    log = run_script("coco_prompts.py", "--annotations", tmp_path / "a.json", "--out", tmp_path / "o.txt", status=2)
    assert "no caption annotations of MS-COCO" in log
