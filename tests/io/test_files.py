"""Files appear whole or not at all, what killed writers left is cleared, and what is read is checked where it is read."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qncd.io import files

WRITER = """
import os, signal, sys
from pathlib import Path
from qncd.io import files
kind, path = sys.argv[1], Path(sys.argv[2])
opened = files.scratch_folder(path.parent) if kind == "scratch_folder" else getattr(files, kind)(path)
with opened as part:
    (part / "half" if part.is_dir() else part).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(kind: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, kind, str(path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with files.whole_file(path) as part:
        part.write_text("one")
        assert not path.exists() and part.parent == path.parent
    assert path.read_text() == "one"
    with pytest.raises(ValueError, match="my own reason"), files.whole_file(path) as part:
        part.write_text("two")
        raise ValueError("my own reason")
    assert path.read_text() == "one" and names(path.parent) == ["a.txt"]


def test_errors_of_libraries_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(ValueError, match=r"a\.bin: cannot be written \(unexpected pos 64 vs 0\)"), files.whole_file(path):
        raise RuntimeError("unexpected pos 64 vs 0\nframe #1")
    with pytest.raises(ValueError, match=r"a\.bin: cannot be written \(No space left on device\)"), files.whole_file(path):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt: cannot be written"):
        files.write_text(tmp_path / "file" / "a.txt", "its folder is a file")
    assert names(tmp_path) == ["file"]


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with files.whole_file(tmp_path / "a") as part:
            part.unlink()
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as some libraries do
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder", "scratch_folder"])
def test_leftovers_of_killed_writers_go(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.txt"
    killed_while_writing(kind, path)
    assert len(names(tmp_path)) == 1 and not path.exists()
    if kind == "scratch_folder":
        with files.scratch_folder(tmp_path) as scratch:
            assert names(tmp_path) == [scratch.name]
        assert names(tmp_path) == []
    else:
        files.write_text(tmp_path / "b.txt", "the next file in this folder")
        assert names(tmp_path) == ["b.txt"]


def test_living_writers_keep_theirs(tmp_path: Path) -> None:
    with files.whole_file(tmp_path / "a.txt") as part:
        part.write_text("slow")
        files.write_text(tmp_path / "a.txt", "fast")
        files.remove_leftovers(tmp_path)
        assert part.exists()
    assert (tmp_path / "a.txt").read_text() == "slow"


def test_what_is_being_written_can_be_discarded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.whole_file(tmp_path / "a.txt"):
        files.discard_unfinished()
        assert names(tmp_path) == []


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with files.whole_folder(folder) as part:
            (part / text).write_text(text)
        assert names(folder) == [text] and names(tmp_path) == ["model"]
    with pytest.raises(ValueError, match="no"), files.whole_folder(folder) as part:
        (part / "three").write_text("")
        raise ValueError("no")
    assert names(folder) == ["two"] and names(tmp_path) == ["model"]


def test_a_folder_that_was_set_aside_is_put_back(tmp_path: Path) -> None:
    gone = next(pid for pid in range(400_000, 4_000_000) if not Path(f"/proc/{pid}").exists())
    old = tmp_path / f".model.{files._NODE}.{gone}.0.old"
    old.mkdir()
    (old / "weights").write_text("")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["weights"]


def test_what_a_link_leads_to_is_replaced_and_a_device_is_not(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a.txt")
    files.write_text(tmp_path / "a.txt", "one")
    files.write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.txt").read_text() == "two"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: a pipe, a device or a socket, expected a file"):
        files.write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(ValueError, match=reason):
            files.read_text(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.read_text(tmp_path / "nothing")


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\nt\u2028w\u0085o\x0b\x0c\x1c\n\nfour".encode())
    assert files.read_lines(path) == ["one", "t\u2028w\u0085o\x0b\x0c\x1c", "", "four"]
    path.write_bytes(b"one\n")
    assert files.read_lines(path) == ["one"]
    path.write_bytes(b"")
    assert files.read_lines(path) == []
    path.write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=r"a\.txt: not a text file in UTF-8 \(byte 3\)"):
        files.read_lines(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100_000, "[" * 200 + "]" * 200, '{"a": NaN}', "[Infinity]", "\x00", '"\\ud800', "1" * 10_000],
)
def test_bad_json_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not JSON, or damaged") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, {"b": "ü"}]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match=r"b\.json: cannot be written as JSON"):
        files.write_json(tmp_path / "b.json", {1, 2})
    assert names(tmp_path) == ["a.json"]
