"""Where a process stands: as torchrun and SLURM say it, and flags that contradict them."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from qncd.launchers import WORKER, Place, find_place

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "1234567", "SLURM_NODELIST": "gpu[07-09,12],login1",
}  # fmt: skip
OURS = {"MASTER_ADDR": "gpu1", "MASTER_PORT": "29500", "NODE_RANK": "1"}


def without(variables: dict[str, str], *names: str, **others: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names} | others


@pytest.mark.parametrize(
    ("environment", "flags", "place"),
    [
        ({}, (1, 1), Place()),
        ({}, (2, 1), Place(0, 2, 0, 2)),
        (OURS, (2, 3), Place(2, 6, 0, 2, 1, 3, "", "gpu1", 29500)),
        ({**OURS, WORKER: str(os.getpid()), "LOCAL_RANK": "1"}, (2, 3), Place(3, 6, 1, 2, 1, 3, "", "gpu1", 29500)),
        (TORCHRUN, (1, 1), Place(3, 4, 1, 2, 1, 2, "torchrun", "gpu1", 29500)),
        (TORCHRUN, (2, 2), Place(3, 4, 1, 2, 1, 2, "torchrun", "gpu1", 29500)),
        (without(TORCHRUN, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="0", GROUP_WORLD_SIZE="1"),
         (1, 1), Place(0, 1, 0, 1, 0, 1, "torchrun", "gpu1", 0)),
        (SLURM, (1, 1), Place(3, 4, 1, 2, 1, 2, "SLURM", "gpu07", 19567)),
        (SLURM, (2, 2), Place(3, 4, 1, 2, 1, 2, "SLURM", "gpu07", 19567)),
        ({**SLURM, "SLURM_STEP_ID": "2", "MASTER_ADDR": "gpu9"}, (1, 1), Place(3, 4, 1, 2, 1, 2, "SLURM", "gpu9", 19769)),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "1,3"}, (1, 1), Place(3, 4, 1, 3, 1, 2, "SLURM", "gpu07", 19567)),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2(x2)"}, (1, 1), Place(3, 4, 1, 2, 1, 2, "SLURM", "gpu07", 19567)),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, (1, 1), Place()),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, (2, 1), Place(0, 2, 0, 2)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (1, 1), Place()),
        ({**SLURM, "SLURM_NTASKS": "1"}, (2, 1), Place(0, 2, 0, 2)),
        ({**SLURM, **TORCHRUN}, (1, 1), Place(3, 4, 1, 2, 1, 2, "torchrun", "gpu1", 29500)),
    ],
)  # fmt: skip
def test_a_place_is_what_the_launcher_or_the_flags_say(environment: dict[str, str], flags: tuple[int, int], place: Place) -> None:
    assert find_place(environment, *flags) == place


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (TORCHRUN, (3, 1), "--devices 3: torchrun has started 2 processes on this machine; allowed is 2, or no --devices"),
        (TORCHRUN, (2, 4), "--num_nodes 4: torchrun has started 2 machines; allowed is 2, or no --num_nodes"),
        (SLURM, (4, 1), "--devices 4: SLURM has started 2 processes on this machine; allowed is 2, or no --devices"),
        (SLURM, (1, 3), "--num_nodes 3: SLURM has started 2 machines; allowed is 2, or no --num_nodes"),
        ({**TORCHRUN, "RANK": "x"}, (1, 1), "RANK=x: expected a whole number, 0 or more"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, (1, 1), "WORLD_SIZE=0: expected a whole number, 1 or more"),
        ({**TORCHRUN, "RANK": "4"}, (1, 1), "torchrun: rank 4 of 4, allowed are 0 to 3"),
        (without(TORCHRUN, "MASTER_PORT"), (1, 1), "MASTER_PORT=: expected a whole number, 1 or more"),
        (without(SLURM, "SLURM_PROCID"), (1, 1), "SLURM_PROCID=: expected a whole number, 0 or more"),
        (without(OURS, "MASTER_PORT", "NODE_RANK"), (1, 2),
         "--num_nodes 2: needs MASTER_PORT, NODE_RANK set on each machine, or torchrun or srun"),
        ({**OURS, "NODE_RANK": "2"}, (1, 2), "NODE_RANK: rank 2 of 2, allowed are 0 to 1"),
    ],
)  # fmt: skip
def test_contradictions_are_named(environment: dict[str, str], flags: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_place(environment, *flags)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n1 n2", "n1"), ("n[1-3]", "n1"), ("n[1,4]-x,m", "n1"), ("a-[3]", "a-3"), ("", "127.0.0.1")],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    variables: dict[str, Any] = {**SLURM, "SLURM_NODELIST": hosts}
    assert find_place(variables).address == first
