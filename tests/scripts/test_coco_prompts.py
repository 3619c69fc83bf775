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


IMAGE, CAPTION = {"id": 1, "file_name": "a.jpg"}, {"image_id": 1, "caption": "x"}


@pytest.mark.parametrize(
    ("images", "annotations", "reason"),
    [
        ([{"id": 1}], [], "images[0] has no file_name, expected text"),
        ([IMAGE, 3], [], "images[1] has no id, expected a whole number or text"),
        ([{**IMAGE, "id": None}], [], "images[0]: id is None, expected a whole number or text"),
        ([{**IMAGE, "id": True}], [], "images[0]: id is True, expected a whole number or text"),
        ([IMAGE, {**IMAGE, "file_name": "b.jpg"}], [], "images[1]: id 1 is that of another image"),
        ({}, [], "the file: images is {}, expected a list"),
        ([IMAGE], [{**CAPTION, "image_id": 2}], "annotations[0]: image_id 2 is no id of images"),
        ([IMAGE], [{**CAPTION, "caption": ["x"]}], "annotations[0]: caption is ['x'], expected text"),
        ([IMAGE], [{**CAPTION, "caption": "\ud800"}], "annotations[0]: '\\ud800' at character 1 is no text in UTF-8"),
        *(
            ([{**IMAGE, "file_name": name}], [], f"images[0]: file_name {name!a}, expected a path below the folder of the images")
            for name in ("../x.jpg", "/etc/passwd", "a/../../x.jpg", "C:\\x.jpg", "..\\x.jpg", "", "a/", "a\nb.jpg", "a\x00.jpg")
        ),
    ],
)
def test_annotations_are_checked_key_by_key(run_script: Any, tmp_path: Path, images: Any, annotations: Any, reason: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    log = run_script("coco_prompts.py", "--annotations", tmp_path / "a.json", "--out", tmp_path / "o.txt", status=2)
    assert log.endswith(f"error: --annotations {tmp_path}/a.json: no caption annotations of MS-COCO ({reason})\n")
    assert log.count("\n") == 1 and not (tmp_path / "o.txt").exists()


def test_equal_file_names_in_several_folders_are_all_copied(run_script: Any, tmp_path: Path) -> None:
    names = ("val/a.jpg", "train/a.jpg")
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": f"\ufeffcaption\u2028of {name}"} for i, name in enumerate(names)],
    }
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content))
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text(name)
    call = ("coco_prompts.py", "--annotations", tmp_path / "a.json", "--n", 2, "--out", tmp_path / "o.txt")
    copying = ("--images", tmp_path / "in", "--copy_to", tmp_path / "out")
    run_script(*call, *copying)
    assert {(tmp_path / "out" / name).read_text() for name in names} == set(names)
    assert (tmp_path / "o.txt").read_text().splitlines()[0].startswith("caption of ")
    (tmp_path / "elsewhere.jpg").write_text("private")
    (tmp_path / "in" / "val" / "a.jpg").unlink()
    (tmp_path / "in" / "val" / "a.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    log = run_script(*call, *copying, status=2)
    assert "in/val/a.jpg: a link that leads out of " in log and log.count("\n") == 1


def test_inputs_are_not_overwritten(run_script: Any, annotations: Path, tmp_path: Path) -> None:
    before = annotations.read_bytes()
    log = run_script("coco_prompts.py", "--annotations", annotations, "--n", 2, "--out", annotations, status=2)
    assert "that is the file of --annotations" in log and annotations.read_bytes() == before
    folders = ("--images", tmp_path, "--copy_to", tmp_path / "x" / "..")
    log = run_script("coco_prompts.py", "--annotations", annotations, "--n", 2, "--out", tmp_path / "o.txt", *folders, status=2)
    assert "that is the folder of --images" in log
    log = run_script("coco_prompts.py", "--annotations", annotations, "--n", 2, "--out", tmp_path, status=2)
    assert f"--out {tmp_path}: a folder, expected a file" in log
