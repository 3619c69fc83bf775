"""Where a process stands among those that share a run: as torchrun or SLURM have started them, or as the flags ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

WORKER = "QNCD_WORKER"  # of a process that `qncd.workers` has started: the id of the process that did
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs that are a shell: what is typed there is one process
FIRST_SLURM_PORT, SLURM_PORTS = 15000, 10000
_HERE = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Of a process among all.

    Attributes:
        rank, world: among all processes, and how many there are.
        local_rank, local_world: among those on this machine.
        node, nodes: this machine's number, and how many there are.
        launcher: what has started the processes; empty where they are this package's to start.
        address, port: where the first process waits for the others; port 0 for any that is free.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    nodes: int = 1
    launcher: str = ""
    address: str = _HERE
    port: int = 0

    def __post_init__(self) -> None:
        for name, value, count in (
            ("rank", self.rank, self.world),
            ("rank on its machine", self.local_rank, self.local_world),
            ("machine", self.node, self.nodes),
        ):
            if value >= count:
                by = self.launcher or "NODE_RANK"
                raise ValueError(f"{by}: {name} {value} of {count}, allowed are 0 to {count - 1}")


def find_place(environment: Mapping[str, str], devices: int = 1, num_nodes: int = 1) -> Place:
    """The place of this process.

    Args:
        environment: variables of the process.
        devices, num_nodes: of the flags; 1 is what a launcher says, where there is one.

    Raises:
        ValueError: a flag contradicts the launcher, or a variable is missing or none of its kind.
    """
    place = _of_torchrun(environment) or _of_slurm(environment, num_nodes)
    if place is None:
        return _of_flags(environment, devices, num_nodes)
    for flag, asked, found, what in (
        ("devices", devices, place.local_world, "processes on this machine"),
        ("num_nodes", num_nodes, place.nodes, "machines"),
    ):
        if asked not in (1, found):
            raise ValueError(f"--{flag} {asked}: {place.launcher} has started {found} {what}; allowed is {found}, or no --{flag}")
    return place


def _of_torchrun(environment: Mapping[str, str]) -> Place | None:
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys() or WORKER in environment:
        return None
    world, local_rank = _number(environment, "WORLD_SIZE", 1), _number(environment, "LOCAL_RANK")
    local_world = _number(environment, "LOCAL_WORLD_SIZE", 1, world)
    return Place(
        rank=_number(environment, "RANK"),
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        node=_number(environment, "GROUP_RANK", 0, 0),
        nodes=_number(environment, "GROUP_WORLD_SIZE", 1, -(-world // local_world)),
        launcher="torchrun",
        address=environment.get("MASTER_ADDR", _HERE),
        port=_number(environment, "MASTER_PORT", 1) if world > 1 else 0,
    )


def _of_slurm(environment: Mapping[str, str], num_nodes: int) -> Place | None:
    """As srun has started the tasks; a single task is a process like any other, which may start others."""
    world = _number(environment, "SLURM_STEP_NUM_TASKS", 1, _number(environment, "SLURM_NTASKS", 1, 1))
    if world == 1 or WORKER in environment or environment.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    nodes = next((_number(environment, name, 1) for name in SLURM_NODES if name in environment), num_nodes)
    node = _number(environment, "SLURM_NODEID", 0, 0)
    job, step = (re.sub(r"\D", "", environment.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        world=world,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world=_tasks_per_node(environment, node) or -(-world // nodes),
        node=node,
        nodes=nodes,
        launcher="SLURM",
        address=environment.get("MASTER_ADDR") or _first_host(environment),
        # The same in all tasks, and another one for each step of a job that runs beside others.
        port=_number(environment, "MASTER_PORT", 1, FIRST_SLURM_PORT + (int(job) + 101 * int(step)) % SLURM_PORTS),
    )


SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def _of_flags(environment: Mapping[str, str], devices: int, num_nodes: int) -> Place:
    if devices * num_nodes == 1:
        return Place()
    world, address, port, node = devices * num_nodes, _HERE, 0, 0
    if num_nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not environment.get(name)]
        if missing:
            raise ValueError(f"--num_nodes {num_nodes}: needs {', '.join(missing)} set on each machine, or torchrun or srun")
        address, port, node = (
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT", 1),
            _number(environment, "NODE_RANK"),
        )
    local_rank = 0
    if WORKER in environment:
        local_rank, address = _number(environment, "LOCAL_RANK"), environment["MASTER_ADDR"]
        port = _number(environment, "MASTER_PORT", 1)
    return Place(node * devices + local_rank, world, local_rank, devices, node, num_nodes, "", address, port)


def _number(environment: Mapping[str, str], name: str, least: int = 0, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ValueError(f"{name}={text}: expected a whole number, {least} or more")
    return int(text)


def _tasks_per_node(environment: Mapping[str, str], node: int) -> int | None:
    """Tasks on this machine, of a list such as 4(x2),3 with an entry for each, or None where SLURM does not say."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        entries = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry) for entry in environment.get(name, "").split(",")]
        counts = [int(match[1]) for match in entries if match for _ in range(int(match[2] or 1))]
        if counts:
            return counts[min(node, len(counts) - 1)]
    return None


def _first_host(environment: Mapping[str, str]) -> str:
    """The first of a list such as gpu[07-09,12],login1."""
    hosts = next((environment[name] for name in SLURM_HOSTS if environment.get(name)), _HERE)
    return re.sub(r"\[(\w+)[^\]]*\].*", r"\1", re.split(r",(?![^\[]*\])|\s", hosts)[0])


SLURM_HOSTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
