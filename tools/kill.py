#!/usr/bin/env python3
"""The kill trial: end commands with SIGKILL and other signals at random moments, go on, and compare with runs left alone.

    python tools/kill.py --kills 60 --out /tmp/kill
    python tools/kill.py --kills 3 --only images --images 10000 --out /tmp/kill_many

Each scenario (a chain of command lines over one output folder) runs once undisturbed. Then it is started again and again in
a second folder and ended each time at another moment: after a random time, or at the N-th file that it opens, renames or
imports of a kind (a checkpoint, a PNG file, an export, ...), as Python's audit events tell. At last it is left to run to its end.
What the two folders hold must be the same, byte by byte, figures of time in run.json aside; no temporary file, no lock and no
process may be left. Prints one line an ending, "N endings, F faults" at the end, and exits with status 1 where there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bad_inputs.files import make_ddim

from qncd.app import parser as cli

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
TIMES = ("seconds", "per_second", "started", "finished", "resumed", "environment", "versions", "git_commit")

# Runs a command as `python SCRIPT ...` does, and ends it at the N-th audit event that looks like what is asked for. An event
# comes before what it tells of: a file is open but empty, or whole but not yet renamed.
BOOT = """
import os, pkgutil, runpy, sys
event, text, left, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def watch(name, arguments):
    global left
    if name == event and any(text in str(value) for value in arguments[:2]):
        left -= 1
        if not left:
            os.kill(os.getpid(), number)
sys.addaudithook(watch)
sys.argv = sys.argv[5:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Moment:
    """Where a command is ended: at an audit event, or after a part of the time that it takes undisturbed.

    Attributes:
        name: for the line that is printed.
        event: of Python's audit events; "" for a time.
        text: in the event's first two arguments.
        least, most: the events to choose from are the `least`-th to the `most`-th.
    """

    name: str
    event: str = ""
    text: str = ""
    most: int = 1
    least: int = 1


# The first imports are those of Python itself and of the signals' handlers, before which signals end it as any Python program.
IMPORTS = Moment("imports", "import", "", 2500, 60)
ANY_TIME = Moment("any time")
PNG = (Moment("PNG opened", "open", ".png.", 12), Moment("PNG renamed", "os.rename", ".png.", 12))


@dataclass(frozen=True)
class Scenario:
    """Command lines, with {out} for their folder and {model} for the small model's.

    Attributes:
        moments: at which it is ended, beside any time and the imports.
    """

    name: str
    lines: tuple[str, ...]
    moments: tuple[Moment, ...] = ()


def scenarios(images: int) -> list[Scenario]:
    """The trial's scenarios; `images` in the one that is about their number, which is the bundled model's."""
    model = "--config {model}/tiny.yml --ckpt {model}/pipeline"
    ddim = f"scripts/sample_diffusion_ddim.py {model} --device cpu --timesteps 4 --batch_size 4 --lane 4 -l {{out}}/run"
    ptq = "--ptq --quant_mode qncd --sample_reverse 2 --cali_n 4 --cali_st 2 --cali_batch_size 4"
    ptq += " --cali_ckpt {out}/quantized.safetensors --cali_data_path {out}/data.pt"
    checkpoint = (
        Moment("checkpoint opened", "open", ".quantized.safetensors.", 1),
        Moment("checkpoint renamed", "os.rename", ".quantized.safetensors.", 1),
    )
    return [
        Scenario(
            "quantize and sample",
            (f"{ddim} --max_images 24 {ptq} --weight_bit 4 --recon --cali_iters 2 --compare_fp --sequence --savez",),
            (
                *PNG,
                *checkpoint,
                Moment("calibration set", "os.rename", ".data.pt.", 1),
                Moment("reconstructed block", "os.rename", "reconstruction", 10),
                Moment("npz", "open", ".samples.npz.", 1),
                Moment("sheet", "os.rename", ".contact_sheet.png.", 1),
                Moment("run.json", "os.rename", ".run.json.", 2),
            ),
        ),
        Scenario("two processes", (f"{ddim} --max_images 64 {ptq} --weight_bit 8 --devices 2",), (*PNG, *checkpoint)),
        Scenario(
            "export, convert and evaluate",
            (
                f"scripts/export.py {model} --out {{out}}/onnx",
                f"scripts/convert_checkpoint.py {model} --out {{out}}/folder",
                f"{ddim} --max_images 16",
                "evaluator.py fashion_mnist {out}/run/images --features fashion_mnist --cache {out}/feature_cache "
                "--json {out}/scores.json",
            ),
            (
                Moment("model.onnx opened", "open", ".model.onnx.", 1),
                Moment("model.onnx renamed", "os.rename", ".model.onnx.", 1),
                Moment("converted folder", "open", "/.folder.", 6),
                Moment("features", "open", "/feature_cache", 6),
                Moment("scores", "os.rename", ".scores.json.", 1),
            ),
        ),
        Scenario(
            "images",
            (
                "scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --device cpu --timesteps 1 --batch_size 64 "
                f"--max_images {images} -l {{out}}/run",
            ),
        ),
    ]


@dataclass
class Trial:
    """One scenario with its two folders.

    Attributes:
        seconds: that each line takes undisturbed.
        endings: that there were.
        faults: what was wrong, in words.
    """

    scenario: Scenario
    out: Path
    seconds: list[float] = field(default_factory=list)
    endings: int = 0
    faults: list[str] = field(default_factory=list)

    def words(self, line: int, out: Path) -> list[str]:
        """A command line's words with its folder."""
        return self.scenario.lines[line].format(out=out, model=self.out.parent / "model").split()

    def run_undisturbed(self, out: Path) -> bool:
        """All lines to their end."""
        out.mkdir(parents=True, exist_ok=True)
        for line in range(len(self.scenario.lines)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *self.words(line, out)], cwd=ROOT, capture_output=True, text=True)
            self.seconds.append(time.perf_counter() - start)
            if done.returncode:
                self.faults.append(f"{self.scenario.name}: status {done.returncode} undisturbed: {done.stderr[-400:]}")
                return False
        return True

    def run(self, count: int, numbers: Sequence[signal.Signals], choice: random.Random) -> int:
        """End it `count` times, comparing whenever it has come to its end; the number of faults, which are printed."""
        moments = [IMPORTS, *self.scenario.moments]
        turn = 0
        if self.run_undisturbed(self.out / "alone"):
            while self.endings < count and not self.faults:
                # Any time every other time: the longer a phase, the more often it is met.
                moment = moments[turn // 2 % len(moments)] if turn % 2 else ANY_TIME
                number, turn = numbers[turn % len(numbers)], turn + 1
                where = self.end_once(number, moment, choice)
                if where is not None:
                    self.endings += 1
                    print(f"{self.scenario.name}: {number.name} at {where}", flush=True)
                else:
                    self.compare()
                    shutil.rmtree(self.out / "ended")
            if not self.faults:
                self.compare()
        for fault in self.faults:
            print(f"FAULT {fault}", flush=True)
        return len(self.faults)

    def end_once(self, number: signal.Signals, moment: Moment, choice: random.Random) -> str | None:
        """Run the lines until one is ended; the moment in words, None where they came to their end."""
        out = self.out / "ended"
        out.mkdir(parents=True, exist_ok=True)
        first = choice.randrange(len(self.scenario.lines)) if moment in (ANY_TIME, IMPORTS) else 0
        for line in range(len(self.scenario.lines)):
            command, delay = [sys.executable, *self.words(line, out)], None
            if line >= first and moment.event:
                asked = [moment.event, moment.text, str(choice.randint(moment.least, moment.most)), str(int(number))]
                command[1:1] = ["-c", BOOT, *asked]
            elif line >= first:
                delay = choice.uniform(0, self.seconds[line])
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals
            )
            try:
                _, said = process.communicate(timeout=delay)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                _, said = process.communicate()
            self.check_ending(process, number, said, f"{moment.name}, line {line + 1}")
            if process.returncode:
                return f"{moment.name}, line {line + 1}"
        return None

    def check_ending(self, process: subprocess.Popen[str], number: signal.Signals, said: str, where: str) -> None:
        """Its status and its last words; no process may live on."""
        told = f"{self.scenario.name}: {number.name} at {where}"
        allowed = (0, -int(number)) if number == signal.SIGKILL else (0, 128 + number, -int(number))
        if process.returncode not in allowed or "Traceback" in said:
            self.faults.append(f"{told}: status {process.returncode}: {said[-300:]}")
        if process.returncode == 128 + number and said.count(f"stopped by {number.name}") != 1:
            self.faults.append(f"{told}: not one line that says how to go on: {said[-300:]}")
        patience = time.monotonic() + 5
        while (alive := list(processes_of(str(self.out)))) and time.monotonic() < patience:
            time.sleep(0.05)
        for pid in alive:
            self.faults.append(f"{told}: process {pid} lives on")
            os.kill(pid, signal.SIGKILL)

    def compare(self) -> None:
        """Go on to the end, and compare with the folder that was left alone."""
        if not self.run_undisturbed(self.out / "ended"):
            return
        ended, alone = contents(self.out / "ended"), contents(self.out / "alone")
        for name in sorted(ended.keys() | alone.keys()):
            if ended.get(name) != alone.get(name):
                kind = "differs" if name in ended and name in alone else "is only there" if name in ended else "is missing"
                self.faults.append(f"{self.scenario.name}: {name} {kind} after the endings")


def hear_signals() -> None:
    """In a new process: signals do what they do by default, whatever the shell has told this one to ignore."""
    for number in NUMBERS.values():
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)


def processes_of(text: str) -> Iterator[int]:
    """Processes but this one, and but dead ones, whose command line holds a text."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in words and "tools/kill.py" not in words:
                yield int(entry.name)


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder by its path there; of JSON files without what tells of time, or names the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"OUT")
        if path.suffix == ".json":
            with contextlib.suppress(ValueError):  # a damaged one differs
                data = json.dumps(timeless(json.loads(data)), sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def timeless(value: Any) -> Any:
    """A JSON value without the entries that tell how long something took, when, and where."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if not any(part in key for part in TIMES)}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--kills", type=int, default=60, help="endings in all, shared by the scenarios (default 60)")
    parser.add_argument("--signals", nargs="+", choices=NUMBERS, default=["SIGKILL"], help="taken in turn (default SIGKILL)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="scenarios whose names hold one of these")
    parser.add_argument("--images", type=int, default=256, help="of the scenario `images` (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; emptied first")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """The number of faults."""
    chosen = [s for s in scenarios(args.images) if not args.only or any(part in s.name for part in args.only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(args.only)}: no scenario; there are {', '.join(s.name for s in scenarios(0))}")
    out, choice, endings, faults = args.out.resolve(), random.Random(args.seed), 0, 0
    shutil.rmtree(out, ignore_errors=True)
    (out / "model").mkdir(parents=True)
    make_ddim(out / "model")
    for place, scenario in enumerate(chosen):
        trial = Trial(scenario, out / scenario.name.replace(" ", "_").replace(",", ""))
        faults += trial.run(len(range(place, args.kills, len(chosen))), [NUMBERS[name] for name in args.signals], choice)
        endings += trial.endings
    print(f"{endings} endings, {faults} faults")
    return faults


if __name__ == "__main__":

    def run(args: argparse.Namespace) -> None:
        if main(args):
            sys.exit(1)

    cli.run_main(run, parse_args())
