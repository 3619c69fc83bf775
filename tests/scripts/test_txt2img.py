"""scripts/txt2img.py as its user runs it, on a small random model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PUBLISHED = [
    "--plms",
    "--cond",
    "--weight_bit",
    "8",
    "--quant_mode",
    "qncd",
    "--quant_act",
    "--act_bit",
    "8",
    "--cali_st",
    "25",
    "--cali_batch_size",
    "1",
    "--cali_n",
    "128",
    "--no_grad_ckpt",
    "--ptq",
    "--scale_split_static",
    "--sample_reverse",
    "--reverse_interval",
    "10",
    "--running_stat",
    "--sm_abit",
    "16",
    "--from_file",
    "val_ann.txt",
    "--n_samples",
    "2",
]
PROMPTS = ("a red circle", "a blue square", "a green star")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "val_ann.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_the_published_command_line(
    run_script: Any, latent_folder: Callable[[str], Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands but for the number of trajectories and steps, which take minutes, and the model."""
    monkeypatch.chdir(prompts.parent)
    short = ["--ddim_steps", "6", "--cali_n", "8", "--cali_st", "3", "--reverse_interval", "3", "--lane", "4"]
    model = ["--ckpt", str(latent_folder("text"))]
    run_script("txt2img.py", *PUBLISHED, *short, *model, "--outdir", tmp_path / "o", "--compare_fp")
    record = json.loads((tmp_path / "o" / "run.json").read_text())["settings"]
    assert record["quantization"]["act_range"] == "running" and record["quantization"]["softmax_bits"] == 16
    assert record["sampler"]["sample_type"] == "plms" and record["guidance"] == 7.5 and record["smoothing"]
    lines = [json.loads(line) for line in (tmp_path / "o" / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(PROMPTS) and [line["prompt_index"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert (tmp_path / "o" / line["file"]).is_file() and str(line["seed"]) in line["file"]
    assert json.loads((tmp_path / "o" / "run.json").read_text())["figures"]["psnr_to_fp_db"] > 20


def test_the_published_command_line_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    script = Path(__file__).resolve().parents[2] / "scripts" / "txt2img.py"
    monkeypatch.setattr(sys, "argv", [str(script), *PUBLISHED])
    args = runpy.run_path(str(script), run_name="parsed")["parse_args"]()
    assert args.plms and args.cond and args.ptq and args.cali_n == 128 and args.cali_st == 25 and args.reverse_interval == 10


@pytest.mark.parametrize("sampler", [("--plms",), ("--dpm",), ("--ddim_eta", "1")])
def test_an_image_follows_from_prompt_and_seed(
    run_script: Any, latent_folder: Callable[[str], Path], prompts: Path, tmp_path: Path, sampler: tuple[str, ...]
) -> None:
    common = ("--ckpt", latent_folder("text"), "--ddim_steps", 4, "--lane", 2, *sampler)
    run_script("txt2img.py", *common, "--from_file", prompts, "--outdir", tmp_path / "file", "--n_iter", 2, "--n_samples", 4)
    run_script("txt2img.py", *common, "--prompt", PROMPTS[1], "--seed", 43, "--n_samples", 1, "--outdir", tmp_path / "one")
    images, (single,) = pixels(tmp_path / "file" / "images"), pixels(tmp_path / "one" / "images")
    assert len(images) == 6 and np.array_equal(images[1], single)
    assert not np.array_equal(images[1], images[4]), "the second round has other seeds"
    run_script("txt2img.py", *common, "--prompt", PROMPTS[2], "--seed", 43, "--n_samples", 1, "--outdir", tmp_path / "other")
    assert not np.array_equal(single, pixels(tmp_path / "other" / "images")[0])


def test_parts_of_a_prompt_file(run_script: Any, latent_folder: Callable[[str], Path], prompts: Path, tmp_path: Path) -> None:
    common = ("--ckpt", latent_folder("text"), "--ddim_steps", 2, "--lane", 2, "--from_file", prompts)
    run_script("txt2img.py", *common, "--begin_data", 1, "--max_prompts", 1, "--outdir", tmp_path / "o", "--skip_save")
    (line,) = [json.loads(line) for line in (tmp_path / "o" / "prompts.jsonl").read_text().splitlines()]
    assert line["prompt"] == PROMPTS[1] and line["prompt_index"] == 1
    assert (tmp_path / "o" / "contact_sheet.png").is_file() and not (tmp_path / "o" / "images").exists()


def test_size_and_starting_code(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("--ckpt", latent_folder("text"), "--ddim_steps", 2, "--lane", 2, "--prompt", "x", "--n_samples", 2, "--n_iter", 2)
    run_script(
        "txt2img.py", *common, "--H", 32, "--W", 16, "--C", 3, "--f", 2, "--fixed_code", "--skip_grid", "--outdir", tmp_path / "o"
    )
    images = sorted((tmp_path / "o" / "images").glob("*.png"))
    assert [path.name.split("seed")[1] for path in images] == ["42.png", "43.png"] * 2
    a, b, c, d = (np.asarray(Image.open(path)) for path in images)
    assert a.shape == (32, 16, 3) and np.array_equal(a, c) and np.array_equal(b, d) and not np.array_equal(a, b)
    assert not (tmp_path / "o" / "contact_sheet.png").exists()


def test_mixed_precision_is_near_full_precision(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("--ckpt", latent_folder("text"), "--ddim_steps", 4, "--lane", 2, "--prompt", "x", "--n_samples", 1)
    for precision in ("full", "autocast"):
        run_script("txt2img.py", *common, "--precision", precision, "--outdir", tmp_path / precision)
    (full,), (mixed,) = pixels(tmp_path / "full" / "images"), pixels(tmp_path / "autocast" / "images")
    difference = np.abs(full.astype(int) - mixed)
    assert difference.max() > 0 and difference.mean() < 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give either --prompt TEXT or --from_file FILE"),
        (("--prompt", "x", "--from_file", "y"), "give either --prompt TEXT or --from_file FILE"),
        (("--from_file", "nowhere.txt"), "--from_file nowhere.txt: no such file"),
        (("--prompt", "x", "--begin_data", "1"), "--begin_data and --max_prompts count lines of --from_file"),
        (("--prompt", "x", "--C", "4"), "--C 4: this model has 3"),
        (("--prompt", "x", "--f", "8"), "--f 8: this model has 2"),
        (("--prompt", "x", "--H", "33"), "--H 33: allowed are multiples of 2"),
        (("--prompt", "x", "--plms", "--ddim_eta", "1"), "--ddim_eta 1.0 with sample_type plms: allowed is 0"),
        (("--prompt", "x", "--ddim_eta", "nan"), "--ddim_eta nan: allowed are numbers from 0 to 1"),
        (("--prompt", "x", "--ddim_steps", "1001"), "--ddim_steps 1001: allowed are 1 to 1000"),
        (("--prompt", "x", "--scale", "nan"), "--scale nan: allowed are finite numbers from 0 on"),
        (("--prompt", "x", "--H", "0"), "--H 0: allowed are whole numbers, 1 or more"),
        (
            ("--prompt", "x", "--ptq", "--quant_mode", "qncd", "--cali_n", "4", "--ddim_steps", "2", "--reverse_interval", "4"),
            "--reverse_interval 4: none of the 2 steps would make",
        ),
        (("--prompt", "x", "--plms", "--dpm"), "not allowed with argument"),
        (("--prompt", "x", "--skip_grid", "--skip_save"), "leave nothing to look at"),
        (("--prompt", "x", "--ddim_steps", "0"), "--ddim_steps 0: allowed are whole numbers, 1 or more"),
        (("--prompt", "x", "--safety_checker", "nowhere/at/all"), "--safety_checker nowhere/at/all: no checker there"),
    ],
)
def test_bad_flags(
    run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    log = run_script("txt2img.py", "--ckpt", latent_folder("text"), "--outdir", tmp_path / "o", *flags, status=2)
    assert message in log.splitlines()[-1] and log.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_prompt_file_with_a_hole(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    log = run_script("txt2img.py", "--ckpt", latent_folder("text"), "--from_file", tmp_path / "p.txt", status=2)
    assert "line 2 is empty, expected a prompt" in log
    (tmp_path / "p.txt").write_text("\n")
    log = run_script("txt2img.py", "--ckpt", latent_folder("text"), "--from_file", tmp_path / "p.txt", status=2)
    assert "0 prompts, none left after --begin_data 0" in log


def test_lines_and_letters_of_a_prompt_file(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A byte-order mark, Windows' ends of lines and characters that Python takes for ends of lines change no prompt."""
    odd = "a\u2028red\x0bcircle\x85 \x00\x1b"
    (tmp_path / "p.txt").write_bytes(f"\ufeff{PROMPTS[0]}\r\n{odd}\r\n".encode())
    common = ("--ckpt", latent_folder("text"), "--ddim_steps", 2, "--lane", 2, "--skip_grid")
    run_script("txt2img.py", *common, "--from_file", tmp_path / "p.txt", "--outdir", tmp_path / "o")
    lines = [json.loads(line) for line in (tmp_path / "o" / "prompts.jsonl").read_bytes().decode().split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == [PROMPTS[0], odd]
    run_script("txt2img.py", *common, "--prompt", PROMPTS[0], "--n_samples", 1, "--outdir", tmp_path / "one")
    assert np.array_equal(pixels(tmp_path / "o" / "images")[0], pixels(tmp_path / "one" / "images")[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a\xffb", "--from_file {}: not a text file in UTF-8 (byte 1)"), (None, "--from_file {}: a folder, expected a file")],
)
def test_other_prompt_files(
    run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "p.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    log = run_script("txt2img.py", "--ckpt", latent_folder("text"), "--from_file", path, "--outdir", tmp_path / "o", status=2)
    assert log.endswith(f"error: {message.format(path)}\n") and not (tmp_path / "o").exists()


def test_a_prompt_that_is_no_text(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    common = ("--ckpt", latent_folder("text"), "--outdir", tmp_path / "o")
    log = run_script("txt2img.py", *common, "--prompt", "a \udcff", status=2)
    assert log.endswith("error: --prompt: '\\udcff' at character 3 is no text in UTF-8\n") and not (tmp_path / "o").exists()


def test_a_model_without_text(run_script: Any, latent_folder: Callable[[str], Path], tmp_path: Path) -> None:
    log = run_script("txt2img.py", "--ckpt", latent_folder("class"), "--prompt", "x", "--outdir", tmp_path / "o", status=2)
    assert "takes no text: scripts/sample_diffusion_ldm.py samples it" in log
