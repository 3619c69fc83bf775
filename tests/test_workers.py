"""Workers and the process that starts them: neither outlives the other, and how a worker ended is one line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from child_processes import running, until

from qncd import workers
from qncd.launchers import Place

GO_ON = "; the same command line goes on from here"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def start(task: str) -> None:
    """What a started process does here: the first one starts two workers, and each says that it is there."""
    if workers.is_worker():
        print(f"worker {os.environ['LOCAL_RANK']} {os.getpid()} {os.environ['MASTER_PORT']}", flush=True)
        if task.startswith("status") and os.environ["LOCAL_RANK"] == "2":
            sys.exit(int(task.split()[1]))
        time.sleep(0 if task in ("end", "raise") else 60)
        return
    workers.GRACE = 0.5
    workers.before_exit.append(lambda: print("last words", flush=True))
    workers.start_workers(Place(0, 3, 0, 3), 1234, lambda rank: f"what {rank} said" if task == "status 2" else None)
    if task == "end":
        return
    if task == "raise":
        raise SystemExit(3)
    if task == "stop":
        time.sleep(1)
        begun = time.monotonic()
        workers.stop_workers()
        os._exit(143 if time.monotonic() - begun < 1 else 4)
    time.sleep(60)


def lives(pid: int) -> bool:
    """A process that is dead and not yet reaped has no command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def started(folder: Path) -> list[int]:
    """Process ids of the two workers by rank, as soon as they have said them."""
    found: dict[str, str] = {}

    def there() -> bool:
        found.update(re.findall(r"worker (\d) (\d+) 1234", (folder / "stdout").read_text()))
        return len(found) == 2

    until(there, 60)
    return [int(found["1"]), int(found["2"])]


def gone(pids: list[int]) -> bool:
    """Whether they end within a second."""
    end = time.monotonic() + 1
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(lives, pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_is_killed_ends_the_run_with_one_line(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, __file__, "wait") as first:
        pids = started(tmp_path)
        os.kill(pids[0], number)
        assert first.wait(10) == 1
    line = f"worker 1 of 3 (process {pids[0]}) was ended by signal {int(number)}{GO_ON}\n"
    assert (tmp_path / "stderr").read_text() == line
    assert gone(pids) and (tmp_path / "stdout").read_text().endswith("last words\n")


@pytest.mark.parametrize(
    ("status", "line"),
    [(3, "worker 2 of 3 (process {pid}) ended with status 3" + GO_ON), (2, "test_workers.py: error: what 2 said")],
)
def test_a_worker_that_fails_tells_why(tmp_path: Path, status: int, line: str) -> None:
    with running(tmp_path, __file__, f"status {status}") as first:
        pids = started(tmp_path)
        assert first.wait(10) == (2 if status == 2 else 1)
    assert (tmp_path / "stderr").read_text() == line.format(pid=pids[1]) + "\n"
    assert gone(pids)


@pytest.mark.parametrize(("task", "status"), [("end", 0), ("raise", 3), ("stop", 143)])
def test_no_worker_outlives_an_ordinary_end(tmp_path: Path, task: str, status: int) -> None:
    with running(tmp_path, __file__, task) as first:
        pids = started(tmp_path)
        assert first.wait(10) == status
    assert gone(pids) and (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("imported", [False, True], ids=["while a worker starts", "while it works"])
def test_a_parent_that_is_killed_takes_its_workers_along(tmp_path: Path, imported: bool) -> None:
    with running(tmp_path, __file__, "wait") as first:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
        until(lambda: len(children.read_text().split()) == 2, 60)
        pids = [int(pid) for pid in children.read_text().split()]
        if imported:
            assert started(tmp_path) == pids
        first.kill()
        first.wait()
    assert gone(pids) and (tmp_path / "stderr").read_text() == ""


def test_what_is_no_command_cannot_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    message = r"^several processes run the same command: -c is neither a script nor a module$"
    with pytest.raises(ValueError, match=message):
        workers.start_workers(Place(0, 2, 0, 2), 1234, lambda _: None)


def test_there_may_be_no_workers_to_stop() -> None:
    assert not workers.is_worker()
    workers.stop_workers()


if __name__ == "__main__":
    start(sys.argv[1])
