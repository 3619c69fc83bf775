#!/usr/bin/env python3
"""Give every command bad input of every kind, and see that it says so in one line and leaves nothing behind.

    python tools/bad_input.py                      # all of the table in tools/bad_inputs
    python tools/bad_input.py --only evaluate npz  # the cases whose names hold all these words

Every case has to end with exit status 2 and exactly one line on stderr, which names the flag or file and the value, without a
traceback; within its time and memory; with its working directory, temporary folder and home as they were. Faults are printed,
and "N cases, F faults" at the end; the exit status is 1 where there are any.

Needs os.fork, that is Linux or macOS: torch and the package are imported once, and every case gets a fork of that process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bad_inputs.case import Case
from bad_inputs.table import all_cases

from qncd.app import parser as cli
from qncd.io.files import scratch_folder

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # of one case, on a busy machine
MEMORY = 6 << 30  # bytes of addresses above those of this process
NOBODY = 65534
SIDES = ("work", "tmp", "home")  # folders of a case that stay as they are
PROGRESS = re.compile(r"\d+%\||\[\d\d:\d\d|^\s*$")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names hold all these words")
    parser.add_argument("--every", type=int, default=1, help="each N-th of them only (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default %(default)s)")
    return parser.parse_args()


def warm_up() -> None:
    """Import what the commands import late, so that no fork has to."""
    import torch

    import qncd

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(qncd.__path__, "qncd."):
        if "triton" not in module.name and not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("diffusers.pipelines.ddim.pipeline_ddim", "transformers.models.clip.modeling_clip", "scipy.linalg"):
        importlib.import_module(name)


@dataclass
class Child:
    """A case that runs, in folders of its own."""

    case: Case
    folder: Path
    before: dict[str, str]
    pid: int
    start: float


def contents(folder: Path) -> dict[str, str]:
    """What lies in the folders of a case: paths, and of files their size and time."""
    found = {}
    for side in SIDES:
        for path in sorted((folder / side).rglob("*")):
            state = path.lstat()
            found[str(path.relative_to(folder))] = "" if path.is_dir() else f"{state.st_size} {state.st_mtime_ns}"
    return found


def start(case: Case, materials: Path, folder: Path) -> Child:
    """Fork a process that runs a case."""
    for side in SIDES:
        (folder / side).mkdir(parents=True)
    for name, source in case.given.items():
        shutil.copytree(materials / source, folder / "work" / name, copy_function=_link)
    if case.as_nobody and os.geteuid() == 0:
        for side in SIDES:
            os.chown(folder / side, NOBODY, NOBODY)
    before = contents(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(case, materials, folder)
    return Child(case, folder, before, pid, time.monotonic())


def _link(source: str, target: str) -> None:
    """Copy a file; a pipe is made anew."""
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target)


def _become(case: Case, materials: Path, folder: Path) -> None:
    """In the child: run the command, and end."""
    status = 70
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8") for number in (1, 2))
        os.chdir(folder / "work")
        os.environ |= {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        tempfile.tempdir = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        limit = _addresses() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if case.as_nobody and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        status = _run(case.command(materials))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(words: Sequence[str]) -> int:
    sys.argv = list(words)
    if words[0] == "qncd":
        from qncd.app.console import main

        main()
    else:
        script = ROOT / words[0]
        sys.argv[0] = str(script)
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    return 0


def _addresses() -> int:
    """Bytes of addresses that this process has taken; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def faults(child: Child, status: int | None) -> list[str]:
    """What was wrong with how a case ended; a status of None: it was too slow."""
    text = (child.folder / "stderr").read_text(encoding="utf-8", errors="replace") if (child.folder / "stderr").exists() else ""
    lines = [line for line in (part.rpartition("\r")[2] for part in text.splitlines()) if not PROGRESS.search(line)]
    found = [f"took more than {SECONDS} s"] if status is None else []
    if status not in (2, None):
        found.append(f"exit status {status}, not 2")
    if "Traceback" in text or "unexpected " in text:
        found.append("an error that nobody expected")
    if status is not None and len(lines) != 1:
        found.append(f"{len(lines)} lines on stderr, not 1")
    found += [f"does not say {word!r}" for word in child.case.says if lines and word.rpartition("}/")[2] not in lines[-1]]
    after = contents(child.folder)
    found += [f"left {name}" for name in after.keys() - child.before.keys()]
    found += [f"changed {name}" for name, state in child.before.items() if after.get(name) != state]
    return [f"{'; '.join(found)}\n    {' | '.join(lines[-3:])[:600]}"] if found else []


def run(cases: Sequence[Case], jobs: int) -> Iterator[tuple[Case, list[str]]]:
    """Every case and its faults, as they end."""
    warm_up()
    from bad_inputs.files import make_materials

    with scratch_folder() as scratch:
        scratch.chmod(0o755)
        materials = scratch / "materials"
        materials.mkdir()
        make_materials(materials)
        waiting, running = list(enumerate(cases)), list[Child]()
        while waiting or running:
            while waiting and len(running) < jobs:
                number, case = waiting.pop(0)
                running.append(start(case, materials, scratch / str(number)))
            for child in list(running):
                pid, state = os.waitpid(child.pid, os.WNOHANG)
                late = time.monotonic() - child.start > SECONDS
                if not pid and late:
                    os.killpg(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)
                if pid or late:
                    running.remove(child)
                    yield child.case, faults(child, os.waitstatus_to_exitcode(state) if pid else None)
                    shutil.rmtree(child.folder, ignore_errors=True)
            time.sleep(0.005)


def main(args: argparse.Namespace) -> None:
    cli.check_counts(args, ("every", "jobs"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    cases = [case for case in all_cases() if all(word in case.name for word in args.only)][:: args.every]
    if not cases:
        raise ValueError(f"--only {' '.join(args.only)}: no case has such a name")
    wrong = 0
    for case, found in run(cases, args.jobs):
        wrong += bool(found)
        for fault in found:
            print(f"{case.name}: {fault}", flush=True)
    print(f"{len(cases)} cases, {wrong} faults")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
