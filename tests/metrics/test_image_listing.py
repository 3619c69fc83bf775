"""Which files of a folder are images, each folder once, and one line for the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qncd.metrics.report.image_listing import list_images


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_images_in_order_of_their_paths(tmp_path: Path) -> None:
    names = ["B.JPG", "a.png", "b/a.jpg", "b/a.png", "b/c/x.Tiff", "d.png/e.webp"]
    assert list_images(touch(tmp_path, *reversed(names))) == (names, None)


def test_the_rest_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", *(f"{i}.txt" for i in range(11)), "b/readme.md")
    assert list_images(tmp_path)[1] == "12 files of other kinds are not images: .txt 11, .md 1"
    touch(tmp_path, "Makefile", "x.GIF", "x.npy", "x.a", "x.b", "x.c", ".b.png", ".git/c.png")
    expected = "18 files of other kinds are not images: .txt 11, "
    words = list_images(tmp_path)[1]
    assert words is not None and words.startswith(expected) and words.endswith(", others 3; 2 names with a dot in front left out")


def test_one_of_a_kind(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.png")
    with open(os.fsencode(tmp_path / "in") + b"/x.\xff\n", "w"):
        pass
    (tmp_path / "in" / "again").symlink_to(".")
    assert list_images(tmp_path / "in") == (
        ["a.png"],
        "1 file of another kind is no image: .\\udcff\\n 1; 1 link to folders that are read anyway or lie above left out",
    )


def test_every_folder_is_read_once(tmp_path: Path) -> None:
    """Under its own name where it has one in the folder, whatever the alphabet says; links above are circles."""
    root = touch(tmp_path / "root", "a.png", "z/b.png")
    touch(tmp_path / "outside", "c.png", "deep/d.png")
    for link, target in (
        ("latest", "."), ("a", "z"), ("z/up", ".."), ("up", tmp_path), ("o1", "../outside"), ("o2", "../outside/deep"),
        ("q", "../outside"), ("loop", "loop"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    names, words = list_images(root)
    assert names == ["a.png", "o1/c.png", "o1/deep/d.png", "z/b.png"]
    assert words is not None and "6 links to folders that are read anyway or lie above left out" in words
    assert "without a suffix 1" in words  # the link to itself


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    (touch(tmp_path, "a.png") / "b.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"b\.png: a link to gone\.png, which is not there"):
        list_images(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "closed/a.png")
    scandir = os.scandir

    def closed(folder: Path) -> object:
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match="closed: cannot be listed: Permission denied"):
        list_images(tmp_path)
