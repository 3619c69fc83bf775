"""The processes that this one starts on its machine: they run the same command, and neither side outlives the other.

Nothing heavy is imported here: what a signal handler calls is there before torch is.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qncd.launchers import WORKER, Place

GO_ON = "the same command line goes on from here"
LOOK = 0.2  # seconds between two looks at the others
GRACE = 5.0  # seconds in which the first process tells itself what ended a worker too
LAST = 2.0  # seconds that workers have to end after the first process has
STOPPED = (2, -1, -2, -15, 129, 130, 143)  # bad input, or stopped by SIGHUP, SIGINT or SIGTERM: so is the first process, soon
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h

T = TypeVar("T")
before_exit: list[Callable[[], object]] = []  # called before a worker's end ends this process
_workers: list[Worker] = []
_stopping = threading.Event()


class Worker:
    """One of them: its rank among all `world` processes, and its process."""

    def __init__(self, rank: int, world: int, process: subprocess.Popen[bytes]) -> None:
        self.rank, self.world, self.process = rank, world, process

    def end(self) -> str:
        """How it ended, in words."""
        status = self.process.returncode
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"worker {self.rank} of {self.world} (process {self.process.pid}) {how}; {GO_ON}"


def is_worker() -> bool:
    """Whether this process was started by another one of the same run on this machine, which tells and ends for it."""
    return os.environ.get(WORKER) == str(os.getppid())


def start_workers(place: Place, port: int, reason: Callable[[int], str | None]) -> None:
    """Start the other processes of this machine, and watch them: one that fails ends this process and all others.

    Args:
        place: of this process, the first one of the machine.
        port: where the first process of all waits for the others.
        reason: (rank) -> what a worker said before it ended with status 2, if it did.

    Raises:
        ValueError: this process runs no script and no module, so that there is no command to repeat.
    """
    command, parent = _command(), os.getpid()
    _stopping.clear()
    for local_rank in range(1, place.local_world):
        variables = {
            WORKER: str(parent),
            "LOCAL_RANK": str(local_rank),
            "NODE_RANK": str(place.node),
            "MASTER_ADDR": place.address,
            "MASTER_PORT": str(port),
        }
        # A session of its own: what a terminal signals is the first process's to answer.
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=dying_with_this(),
        )
        _workers.append(Worker(place.rank + local_rank, place.world, process))
    atexit.register(_let_end)
    threading.Thread(target=_watch, args=(reason,), daemon=True, name="workers").start()


def dying_with_this() -> Callable[[], None] | None:
    """What a new process calls before its program starts (preexec_fn), to die with this one; None where the system can't."""
    if sys.platform != "linux":
        return None
    parent, library = os.getpid(), ctypes.CDLL(None, use_errno=True)

    def die_with_parent() -> None:
        library.prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return die_with_parent


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a fresh process, whose memory goes with it. Raises OSError where the process is killed."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise OSError(f"{function.__name__}: its process was killed, for want of memory most likely") from None


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent, where the system does not see to it."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def stop_workers() -> None:
    """Kill the workers that still live, and wait for a second at most; safe where there are none, and in a signal handler."""
    _stopping.set()
    for worker in _workers:
        if worker.process.poll() is None:
            worker.process.kill()
    _wait(1.0)


def _wait(seconds: float) -> bool:
    """Whether all workers have ended within so many seconds."""
    end = time.monotonic() + seconds
    while any(worker.process.poll() is None for worker in _workers):
        if time.monotonic() > end:
            return False
        time.sleep(LOOK / 10)
    return True


def _let_end() -> None:
    """At the end of this process: the workers have done all that was theirs."""
    _stopping.set()
    if not _wait(LAST):
        stop_workers()


def _watch(reason: Callable[[int], str | None]) -> None:
    while not _stopping.is_set():
        failed = next((worker for worker in _workers if worker.process.poll()), None)
        if failed is None:
            time.sleep(LOOK)
            continue
        status = failed.process.returncode
        if status in STOPPED and _stopping.wait(GRACE):
            return
        if status == 2 and (said := reason(failed.rank)):
            _end(f"{Path(sys.argv[0]).name}: error: {said}", 2)
        _end(failed.end(), 1)


def _end(line: str, status: int) -> None:
    """End this process from a thread beside the main one, which may wait for a process that is gone."""
    if _stopping.is_set():  # it ends already, and has told why
        return
    print(line, file=sys.stderr, flush=True)
    stop_workers()
    for function in before_exit:
        function()
    os._exit(status)


def _command() -> Sequence[str]:
    """This process's own command line."""
    import __main__

    spec = __main__.__spec__
    if spec is not None and spec.name != "__main__":
        return [sys.executable, "-m", spec.name, *sys.argv[1:]]
    if not Path(sys.argv[0]).exists():
        raise ValueError(f"several processes run the same command: {sys.argv[0] or 'this'} is neither a script nor a module")
    return [sys.executable, str(Path(sys.argv[0]).absolute()), *sys.argv[1:]]
