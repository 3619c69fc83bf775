"""Processes that share a run: what they exchange, and that no end of one of them is lost on the others."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from child_processes import running, until

from qncd.distributed import FabricProcesses, OneProcess, join_, part_of, start_processes, stop_workers

PATIENCE = 120.0  # seconds until a process that should have come or gone is given up


def share_a_run() -> None:
    """What a started process does here: exchange, tell what came, and wait for the others if it is told to."""
    processes = start_processes("cpu")
    with processes.quiet_failure():
        seen = {processes.rank: [f"of {processes.rank}"], 9: [processes.rank]}
        mine = list(part_of(processes, range(7)))
        mean = processes.average_(torch.tensor([float(processes.rank)]))
        join_(processes, seen)
        told = [processes.share(processes.rank), processes.first(lambda: "once"), processes.everyone(mine), seen, mean.tolist()]
        sys.stdout.write(f"told {told}\n")  # at once, also unbuffered: all write to one file
        sys.stdout.flush()
        while "WAIT" in os.environ:
            processes.agree(None)


def told(folder: Path) -> set[str]:
    """What the processes told, the same of each."""
    return set(re.findall(r"told (.*)", (folder / "stdout").read_text()))


OF_TWO = "[0, 'once', [[0, 1, 2], [3, 4, 5, 6]], {0: ['of 0'], 9: [0, 1], 1: ['of 1']}, [0.5]]"


def test_one_process_is_all_there_is() -> None:
    processes, seen, value = start_processes("cpu"), {0: [1]}, torch.tensor([1.0, 2.0])
    assert isinstance(processes, OneProcess) and (processes.rank, processes.world, processes.is_first) == (0, 1, True)
    join_(processes, seen)
    assert seen == {0: [1]} and processes.everyone(5) == [5] and list(part_of(processes, range(3))) == [0, 1, 2]
    assert processes.average_(value) is value and processes.first(lambda: 3) == 3
    with pytest.raises(ValueError, match=r"^broken$"):
        processes.agree("broken")
    stop_workers()


@pytest.mark.parametrize(("items", "world"), [(7, 2), (1, 3), (8, 8), (0, 2)])
def test_parts_are_neighbours_and_together_the_whole(items: int, world: int) -> None:
    processes = OneProcess()
    processes.world = world
    parts = []
    for rank in range(world):
        processes.rank = rank
        parts.append(list(part_of(processes, range(items))))
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_devices_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^--devices 2: there are 1$"):
        start_processes("cuda", 2)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"^torchrun has started 2 processes on this machine: it has 1 GPUs$"):
        start_processes("cuda")


@pytest.mark.parametrize(
    ("rank", "said", "error", "message"),
    [
        (0, "", SystemExit, r"a process of 2 is gone \(closed by peer\); the same command line goes on from here"),
        (0, "a bad value", ValueError, "a bad value"),
        (1, "", SystemExit, "1"),
    ],
)
def test_what_an_exchange_comes_to_without_an_answer(
    monkeypatch: pytest.MonkeyPatch, rank: int, said: str, error: type[BaseException], message: str
) -> None:
    monkeypatch.setattr("qncd.distributed.GRACE", 0.1)
    processes = FabricProcesses.__new__(FabricProcesses)
    processes.rank, processes.world, processes.is_first = rank, 2, rank == 0
    processes._store = torch.distributed.HashStore()
    if said:
        processes._store.set("error 1", said)
    with pytest.raises(error, match=f"^{message}$"), processes._together():
        raise RuntimeError("closed by peer\nat gloo/transport")


@pytest.mark.parametrize(("error", "said"), [(ValueError("a bad\nvalue"), "a bad value"), (KeyError("name"), "KeyError: 'name'")])
def test_an_error_is_told_by_the_first_process(error: Exception, said: str) -> None:
    processes = FabricProcesses.__new__(FabricProcesses)
    processes.rank, processes.world, processes.is_first = 1, 2, False
    processes._store = torch.distributed.HashStore()
    with pytest.raises(SystemExit, match=r"^2$"), processes.quiet_failure():
        raise error
    assert processes._said(1) == said and processes._said(0) is None


@pytest.mark.slow
def test_torchrun_gives_ranks_and_world(tmp_path: Path) -> None:
    with running(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node", 2, __file__) as launcher:
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "stderr").read_text()
    assert told(tmp_path) == {OF_TWO}


@pytest.mark.slow
def test_two_machines_of_slurm_share_and_tell_that_one_is_gone(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(2):
            (tmp_path / str(rank)).mkdir()
            variables = {"SLURM_NTASKS": 2, "SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank, "SLURM_NNODES": 2}
            started.append(
                stack.enter_context(
                    running(tmp_path / str(rank), __file__, WAIT=1, **variables, SLURM_JOB_ID=os.getpid(), SLURM_NODELIST="")
                )
            )
        for rank in range(2):
            until(lambda rank=rank: told(tmp_path / str(rank)) == {OF_TWO}, PATIENCE)
        started[1].kill()
        assert started[0].wait(PATIENCE) == 1
    last = (tmp_path / "0" / "stderr").read_text()
    assert re.fullmatch(r"a process of 2 is gone \(.*\); the same command line goes on from here\n", last)


if __name__ == "__main__":
    share_a_run()
