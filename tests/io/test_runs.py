"""A folder is one run: continued with equal settings, refused with others."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qncd import __version__
from qncd.io import runs
from qncd.io.images import image_name, save_png
from qncd.io.runs import open_run

SETTINGS = {"timesteps": 50, "eta": 0.0, "bits": (4, 8), "config": Path("configs/a.yml")}


def test_a_new_run_is_written_down(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "b", SETTINGS, {"device": "cpu"})
    record = json.loads((run.folder / "run.json").read_text())
    assert record["settings"] == {"timesteps": 50, "eta": 0.0, "bits": [4, 8], "config": "configs/a.yml"}
    assert record["environment"] == {"device": "cpu"}
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["qncd"] == __version__
    assert record["started"].endswith("+00:00")
    assert record["finished"] is None
    run.release()
    assert [path.name for path in run.folder.iterdir()] == ["run.json"]


def test_equal_settings_go_on(tmp_path: Path) -> None:
    run = open_run(tmp_path, SETTINGS, {"max_images": 2})
    assert run.existing_indices() == set()
    run.release()
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        save_png(np.zeros((4, 4, 1), np.uint8), images / image_name(index, 100 + index))
    whole = (images / image_name(2, 102)).read_bytes()
    (images / image_name(2, 102)).write_bytes(whole[:-5])
    (images / image_name(3, 103)).write_bytes(b"")
    (images / image_name(4, 104)).write_bytes(whole[-12:])
    (images / ".000005_seed105.png.1.tmp").write_bytes(whole)
    (images / "sheet.png").write_bytes(whole)
    again = open_run(tmp_path, SETTINGS, {"max_images": 10, "device": "cuda"})
    assert again.existing_indices() == {0, 1}
    assert again.existing_indices("other") == set()
    assert again.record["started"] == run.record["started"]
    assert [session["environment"] for session in again.record["resumed"]] == [{"max_images": 10, "device": "cuda"}]


def test_figures_are_added(tmp_path: Path) -> None:
    run = open_run(tmp_path, SETTINGS)
    run.finish(seconds=1.5, images=4)
    run.finish(fid=3.0)
    assert run.record["figures"] == {"seconds": 1.5, "images": 4, "fid": 3.0}
    assert run.record["finished"] is not None
    with pytest.raises(ValueError, match=r"^figures cannot be written as JSON: "):
        run.finish(bad=object())
    run.finish(psnr=[float("inf"), 1.0], mse={"mean": float("nan")})
    assert run.record["figures"] | {"psnr": [None, 1.0], "mse": {"mean": None}} == run.record["figures"]
    run.release()
    assert open_run(tmp_path, SETTINGS).record["finished"] is None


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with open_run(tmp_path, SETTINGS):
        with pytest.raises(ValueError, match=rf"another run is at work there \(process {os.getpid()} on "):
            open_run(tmp_path, SETTINGS)
        assert (tmp_path / "run.lock").exists()
    with open_run(tmp_path, SETTINGS) as run:
        copied = pickle.loads(pickle.dumps(run))
        assert copied.folder == run.folder and copied.lock is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from qncd.io import files, runs; run = runs.open_run(sys.argv[1], {'a': 1})\n"
        "with files.whole_file(run.folder / 'images' / 'a.png'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root).returncode == -signal.SIGKILL
    assert (tmp_path / "run.lock").exists() and len(list((tmp_path / "images").iterdir())) == 1
    (tmp_path / "run.json").unlink()  # as if it had been killed before that
    shutil.copytree(tmp_path / "images", tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "images")
    with open_run(tmp_path, {"a": 1}):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.lock"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    open_run(tmp_path, SETTINGS).release()
    before = (tmp_path / "run.json").read_text()
    other = {"timesteps": 20, "bits": [4, 8], "eta": 0.0, "seed": 3}
    with pytest.raises(ValueError) as caught:
        open_run(tmp_path, other)
    assert str(caught.value) == (
        f'{tmp_path}: holds a run with other settings: config ("configs/a.yml" there, absent now), '
        "seed (absent there, 3 now), timesteps (50 there, 20 now): name another folder or delete it"
    )
    assert (tmp_path / "run.json").read_text() == before


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"not empty, and no run of qncd \(it has no run\.json\): name another folder$"):
        open_run(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"file: a file, expected a folder"):
        open_run(tmp_path / "file", SETTINGS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"damaged \(Expecting"),
        ("[]", "no settings"),
        ('{"settings": {}, "resumed": 3}', "no resumed"),
        ('{"a": 1}', "no settings"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_run(tmp_path, SETTINGS)
    assert str(caught.value).startswith(str(tmp_path / "run.json"))


def test_settings_must_be_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^settings cannot be written as JSON: "):
        open_run(tmp_path / "a", {"x": object()})
    assert not (tmp_path / "a").exists()


def test_room_on_the_disk_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a/b: [\d.]+ GB free on its disk, the run needs 1000000000\.000 GB$"):
        open_run(tmp_path / "a" / "b", SETTINGS, min_free_bytes=10**18)
    assert not (tmp_path / "a").exists()


def test_the_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the code itself is tracked: an installed copy may lie inside a checkout of something else."""
    module = tmp_path / "runs.py"
    module.write_text("")
    monkeypatch.setattr(runs, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs._git_commit() is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-qm", "a")
    assert runs._git_commit() is None
    git("add", "runs.py")
    git("commit", "-qm", "b")
    assert runs._git_commit() == git("rev-parse", "HEAD")
    module.write_text("changed")
    assert runs._git_commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert runs._git_commit() is None
