"""Where a command is to write is looked at before the long work, and before a folder is claimed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from script_runs import run_in_process

from qncd.app import flags

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--config", ROOT / "configs" / "fashion_mnist.yml", "--device", "cpu", "--timesteps", "2", "--max_images", "1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("x")
    return path


def test_what_can_be_written(file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    flags.check_file("--cali_ckpt", file)
    flags.check_file("--json", file, replace=True)
    flags.check_file("--cali_ckpt", tmp_path / "new" / "deep" / "q.safetensors")
    flags.check_output_folder("--out", tmp_path)
    flags.check_output_folder("--out", tmp_path / "new" / "deep")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    flags.check_file("--cali_ckpt", tmp_path / "link")
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot(file: Path, tmp_path: Path) -> None:
    def refused(message: str, check: Any, path: Path, **how: Any) -> None:
        with pytest.raises(ValueError) as caught:
            check("--x", path, **how)
        assert str(caught.value) == message

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(f"--x {tmp_path}: a folder, expected a file", flags.check_file, tmp_path)
    refused(f"--x {tmp_path / 'pipe'}: a pipe, a device or a socket, expected a file", flags.check_file, tmp_path / "pipe")
    refused(f"--x {file / 'q'}: {file} is no folder", flags.check_file, file / "q")
    refused(f"--x {file / 'a' / 'q'}: {file} is no folder", flags.check_file, file / "a" / "q")
    refused(f"--x {file}: is a file, expected a folder", flags.check_output_folder, file)
    refused(f"--x {file / 'a'}: {file} is no folder", flags.check_output_folder, file / "a")
    loop = str(tmp_path / "loop")
    refused(f"--x {loop!r}: cannot be looked at: Too many levels of symbolic links", flags.check_file, tmp_path / "loop")
    refused(f"--x {'x' * 200!r}: cannot be looked at: File name too long", flags.check_file, Path("x" * 300))
    refused("--x 'a\\x00b': cannot be looked at: embedded null byte", flags.check_output_folder, Path("a\0b"))


def test_a_place_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(ValueError) as caught:
        flags.check_file("--json", tmp_path / "new" / "a.json", replace=True)
    assert str(caught.value) == f"--json {tmp_path / 'new' / 'a.json'}: {tmp_path} cannot be written: Read-only file system"
    (tmp_path / "q").write_text("x")
    flags.check_file("--cali_ckpt", tmp_path / "q")  # is only read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ptq", "--cali_ckpt", "{folder}"), "--cali_ckpt {folder}: a folder, expected a file"),
        (("--ptq", "--cali_ckpt", "{file}/q"), "--cali_ckpt {file}/q: {file} is no folder"),
        (("--ptq", "--cali_data_path", "{folder}"), "--cali_data_path {folder}: a folder, expected a file"),
        (
            ("--backend", "onnxruntime", "--onnx", "{file}"),
            "--onnx {file}: no such folder, expected one that `qncd export` wrote",
        ),
    ],
)
def test_nothing_is_claimed(arguments: tuple[str, ...], message: str, file: Path, tmp_path: Path) -> None:
    places = {"folder": str(tmp_path), "file": str(file)}
    words = [word.format(**places) for word in arguments]
    stderr = run_in_process("sample_diffusion_ddim.py", *MODEL, *words, "-l", tmp_path / "out", status=2)
    assert stderr == f"sample_diffusion_ddim.py: error: {message.format(**places)}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "flag"), [("sample_diffusion_ddim.py", "-l"), ("sample_diffusion_ldm.py", "-l"), ("txt2img.py", "--outdir")]
)
def test_an_output_folder_that_is_a_file(script: str, flag: str, file: Path) -> None:
    words = ("--config", MODEL[1]) if script == "sample_diffusion_ddim.py" else ()
    words += ("--prompt", "a") if script == "txt2img.py" else ()
    stderr = run_in_process(script, *words, flag, file, status=2)
    name = {"-l": "--logdir"}.get(flag, flag)
    assert stderr == f"{script}: error: {name} {file}: is a file, expected a folder\n"


def test_export_and_speed(file: Path, tmp_path: Path) -> None:
    stderr = run_in_process("export.py", *MODEL[:2], "--out", file, status=2)
    assert stderr == f"export.py: error: --out {file}: is a file, expected a folder\n"
    stderr = run_in_process("export.py", *MODEL[:2], "--cali_ckpt", tmp_path / "gone", "--out", tmp_path / "out", status=2)
    assert stderr == f"export.py: error: --cali_ckpt {tmp_path / 'gone'}: no such quantized checkpoint\n"
    stderr = run_in_process("benchmark_speed.py", "--json", file / "a.json", status=2)
    assert stderr == f"benchmark_speed.py: error: --json {file / 'a.json'}: {file} is no folder\n"
