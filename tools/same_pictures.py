#!/usr/bin/env python3
"""Compare the pictures of two checkouts: same command lines, same machine, byte by byte.

    git worktree add ../base 5c6d92b
    python tools/same_pictures.py ../base . --out /tmp/pictures

Samples the three bundled models with every mode at W8A8 and W4A6 in both checkouts, a few small images each, on one thread, and
lets the second checkout sample from the first one's quantized checkpoints as well. Prints one line a command, "identical" or
what differs; the exit status is 1 where something does. What an earlier call has sampled into --out is kept (a checkout that
changed needs --again NAME, or an empty folder): the run goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

MODES = ("linear", "qdiff", "ptqd", "tfmq", "d2dpm", "qncd", "qncd+")
WIDTHS = {"W8A8": ("8", "8"), "W4A6": ("4", "6")}
PROMPTS = "a large red circle above a small blue square\na small green square left of a large blue circle\n"
CALIBRATION = ("--cali_n", "8", "--cali_st", "4", "--cali_batch_size", "8", "--device", "cpu", "--lane", "4")
MODELS = {
    "ddim": ("sample_diffusion_ddim.py", "--config", "configs/fashion_mnist.yml", "--timesteps", "8", "--max_images", "4", "-l"),
    "ldm": ("sample_diffusion_ldm.py", "-n", "4", "-c", "8", "-e", "0", "-l"),
    "text": ("txt2img.py", "--plms", "--scale", "4", "--ddim_steps", "8", "--from_file", "{prompts}", "--outdir"),
}
RECONSTRUCTED = ("qdiff", "ptqd", "tfmq", "d2dpm")


def command_lines(prompts: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every run; the output folder comes right after the model's arguments."""
    for model, (script, *arguments) in MODELS.items():
        line = [script, *(part.format(prompts=prompts) for part in arguments)]
        yield f"{model}-fp", line
        for width, (weights, activations) in WIDTHS.items():
            for mode in MODES:
                more = ["--ptq", "--quant_mode", mode, "--weight_bit", weights, "--act_bit", activations, *CALIBRATION]
                more += ["--recon", "--cali_iters", "20"] if mode in RECONSTRUCTED else ["--no-recon"]
                more += ["--quant_act"] if mode == "linear" else []
                more += ["--sample_reverse", "2"] if mode == "qncd" else []
                yield f"{model}-{mode}-{width}", [*line, "|", *more]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every picture below a folder, by its path there."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.png"))}


def sample_all(root: Path, out: Path, names: Sequence[str] | None, checkpoints: Path | None) -> None:
    """In a process of its own: run every command line in one checkout. Writes NAME.json beside each folder."""
    sys.path.insert(0, str(root))
    os.chdir(root)
    prompts = out / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")
    for name, line in command_lines(prompts):
        record = out / f"{name}.json"
        if record.is_file() or (names and not any(part in name for part in names)) or (checkpoints and name.endswith("-fp")):
            continue
        folder, start = out / name, time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        cut = line.index("|") if "|" in line else len(line)
        words = [*line[:cut], str(folder), *line[cut + 1 :]]
        if "--ptq" in words:
            words += ["--cali_ckpt", str((checkpoints or out) / f"{name}.safetensors")]
            if checkpoints is None:
                (out / f"{name}.safetensors").unlink(missing_ok=True)
        status, said = run_script(root / "scripts" / words[0], words[1:])
        result = {"status": status, "seconds": round(time.perf_counter() - start, 1), "pictures": digest(folder)}
        if status:
            result["said"] = said[-2000:]
        else:
            record.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{root.name}: {name}: status {status}, {result['seconds']} s{': ' + said[-300:] if status else ''}", flush=True)


def run_script(script: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit status of a script run in this process, and what it said."""
    said = io.StringIO()
    sys.argv = [str(script), *arguments]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
        except Exception as error:
            return 1, f"{said.getvalue()}\n{type(error).__name__}: {error}"
    return 0, said.getvalue()


def start(root: Path, out: Path, only: Sequence[str] | None, checkpoints: Path | None = None) -> subprocess.Popen[bytes]:
    """A process that samples one checkout."""
    out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(Path(__file__).resolve()), str(root), str(root), "--out", str(out), "--worker"]
    words += ["--only", *only] if only else []
    words += ["--checkpoints", str(checkpoints)] if checkpoints else []
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment)


def compare(out: Path, only: Sequence[str] | None) -> bool:
    """Print one line a run; whether all are identical."""
    same = True
    for name, _ in command_lines(Path()):
        if only and not any(part in name for part in only):
            continue
        for title, folder in (("", "new"), (" from the old checkpoint", "again")):
            if folder == "again" and name.endswith("-fp"):
                continue
            records = [out / side / f"{name}.json" for side in ("old", folder)]
            if not all(record.is_file() for record in records):
                verdict = "not sampled: " + ", ".join(str(r) for r in records if not r.is_file())
            else:
                old, new = (json.loads(record.read_text(encoding="utf-8"))["pictures"] for record in records)
                images = [key for key in old if key.startswith("images/")]
                differing = [key for key in old if old[key] != new.get(key)]
                verdict = "identical" if images and not differing and old.keys() == new.keys() else f"DIFFERS: {differing[:3]}"
            same &= verdict == "identical"
            print(f"{name}{title}: {verdict}")
    return same


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("old", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout that changed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--only", nargs="+", metavar="PART", help="runs whose names hold one of these, e.g. ddim W4A6")
    parser.add_argument("--again", action="store_true", help="sample the second checkout anew")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker:
        sample_all(args.old.resolve(), args.out, args.only, args.checkpoints)
        return
    out = args.out.resolve()
    if args.again:
        for side in ("new", "again"):
            shutil.rmtree(out / side, ignore_errors=True)
    for process in [start(args.old, out / "old", args.only), start(args.new, out / "new", args.only)]:
        process.wait()
    start(args.new, out / "again", args.only, out / "old").wait()
    sys.exit(0 if compare(out, args.only) else 1)


if __name__ == "__main__":
    main()
