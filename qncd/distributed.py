"""Several devices: one process a device, which run the same command and share out the batches; Lightning Fabric joins them.

The batches are the same whatever the number of processes, so what a network computes of them is too.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from qncd.launchers import Place, find_place
from qncd.workers import GO_ON, GRACE, LOOK, end_with_parent, is_worker, start_workers
from qncd.workers import stop_workers as stop_workers

T = TypeVar("T")
# Processes wait for one another while the first of them works alone; one that ends in an error ends the others.
PATIENCE = datetime.timedelta(days=7)
MEETING = datetime.timedelta(minutes=10)  # in which all have to start


class OneProcess:
    """The one process that there is without `--devices`, `--num_nodes` and a launcher."""

    rank, world = 0, 1
    is_first = True

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def share(self, value: Any) -> Any:
        """The value of the first process."""
        return value

    def everyone(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, in every process."""
        return [value]

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the first process, which alone calls it. Raises ValueError in all of them if it does."""
        return function()

    def average_(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, in place."""
        return value

    def agree(self, error: str | None) -> None:
        """Raise ValueError in every process where one of them met an error."""
        if error is not None:
            raise ValueError(error)

    def quiet_failure(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is quiet where there is one process."""
        return contextlib.nullcontext()

    def gather(self, batch: Mapping[str, torch.Tensor] | None, error: str | None = None) -> list[Mapping[str, torch.Tensor]]:
        """The batches of all processes, in their order; see `FabricProcesses.gather`."""
        self.agree(error)
        return [] if batch is None else [batch]


class FabricProcesses:
    """One process a device under Lightning Fabric.

    The first one of each machine starts the machine's others, unless a launcher has: they run the same command again.

    Args:
        device: cpu or cuda.
        place: of this process.

    Raises:
        ValueError: there are not that many devices, or the other processes did not come.
    """

    def __init__(self, device: str, place: Place) -> None:
        self.rank, self.world, self.is_first = place.rank, place.world, place.rank == 0
        on_cuda = torch.device(device).type == "cuda"
        seen = _check_devices(place) if on_cuda else place.local_world
        if is_worker() and sys.platform != "linux":
            end_with_parent(os.getppid())
        self._store = self._open_store(place)
        from lightning_fabric import Fabric  # takes seconds, while the workers start
        from lightning_fabric.strategies import DDPStrategy

        from qncd.cluster import PlacedEnvironment

        self._meet(place)
        # What is no tensor travels over gloo, which tells at once when a process is gone, and keeps no GPU busy waiting.
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=torch.distributed.PrefixStore("group", self._store),
            rank=place.rank,
            world_size=place.world,
            timeout=PATIENCE,
        )
        atexit.register(_leave)
        environment = PlacedEnvironment(place, local_rank=0 if seen == 1 else place.local_rank)
        self.fabric = Fabric(
            accelerator="cuda" if on_cuda else "cpu",
            devices=seen,
            num_nodes=place.nodes,
            strategy=DDPStrategy(timeout=PATIENCE, cluster_environment=environment),
        )
        self.fabric.launch()
        self.device = self.fabric.device

    def _open_store(self, place: Place) -> torch.distributed.Store:
        """The store through which all find one another; where the workers are ours, they are started.

        Its server listens before anybody is told where, so that no port is taken by others in between.
        """
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        has_server = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and place.launcher == "torchrun"
        serves = self.is_first and not has_server
        address = "127.0.0.1" if serves else place.address
        try:
            socket.getaddrinfo(address, place.port)
            server = torch.distributed.TCPStore(address, place.port, None, serves, MEETING, wait_for_workers=False)
        except (RuntimeError, OSError) as error:
            problem = "taken on this machine" if serves else f"no answer ({str(error).splitlines()[0]})"
            raise ValueError(f"MASTER_ADDR {place.address}, MASTER_PORT {place.port}: {problem}") from None
        store = torch.distributed.PrefixStore(f"qncd {attempt}", server)
        if not place.launcher and place.local_rank == 0 and place.local_world > 1:
            start_workers(place, server.port, lambda rank: self._said(rank))
        return store

    def _meet(self, place: Place) -> None:
        """Wait until all are here. Raises ValueError where some don't come."""
        self._store.set(f"here {place.rank}", "")
        keys = [f"here {rank}" for rank in range(place.world)]
        try:
            self._store.wait(keys, MEETING)
        except RuntimeError:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not self._store.check([key]))
            hint = " (SLURM has that many tasks: is the command started with srun?)" if place.launcher == "SLURM" else ""
            raise ValueError(f"{place.world} processes{hint}: {missing} did not come within {MEETING}") from None

    def _said(self, rank: int) -> str | None:
        """The error that a process has met, if it said so."""
        key = f"error {rank}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except (AttributeError, RuntimeError):  # nobody has met yet, or the store's process is gone
            return None

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A process that does not answer has ended: the first one tells, the others follow without a word."""
        try:
            yield
        except RuntimeError as error:
            if not self.is_first:
                sys.exit(1)
            end = time.monotonic() + 2 * GRACE  # the end of a worker of this machine is told by the thread that watches it
            while time.monotonic() < end:
                if said := next(filter(None, map(self._said, range(self.world))), None):
                    stop_workers()
                    raise ValueError(said) from None
                time.sleep(LOOK)
            sys.exit(f"a process of {self.world} is gone ({str(error).splitlines()[0]}); {GO_ON}")

    def share(self, value: Any) -> Any:
        """The value of the first process, in every process."""
        with self._together():
            return self.fabric.broadcast(value, src=0)

    def everyone(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, in every process."""
        values: list[Any] = [None] * self.world
        with self._together():
            torch.distributed.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the first process, which alone calls it. Raises ValueError in all of them if it does."""
        value, error = None, None
        if self.is_first:
            try:
                value = function()
            except (ValueError, OSError) as problem:
                error = str(problem)
        value, error = self.share((value, error))
        if error is not None:
            raise ValueError(error)
        return value

    def average_(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, in place."""
        with self._together():
            mean: Any = self.fabric.all_reduce(value.to(self.device), reduce_op="mean")
        return value.copy_(mean)

    def agree(self, error: str | None) -> None:
        """Raise ValueError in every process where one of them met an error."""
        for message in self.everyone(error):
            if message is not None:
                raise ValueError(message)

    @contextlib.contextmanager
    def quiet_failure(self) -> Iterator[None]:
        """Errors are the first process's to print: the others leave word for it and end, with the status of bad input."""
        try:
            yield
        except Exception as error:
            if self.is_first:
                stop_workers()
                raise
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            with contextlib.suppress(RuntimeError):  # the first process has ended already
                self._store.set(f"error {self.rank}", f"{kind}{' '.join(str(error).split())}")
            sys.exit(2)

    def gather(self, batch: Mapping[str, torch.Tensor] | None, error: str | None = None) -> list[Mapping[str, torch.Tensor]]:
        """The batches of all processes in the order of their ranks; empty in all but the first.

        Args:
            batch: rows by layer, None where this process has none left.
            error: what went wrong here; then every process raises.

        Raises:
            ValueError: the error of one of the processes.
        """
        mine = None if batch is None else {name: rows.detach().cpu() for name, rows in batch.items()}
        self.agree(error)
        received: list[Any] | None = [None] * self.world if self.is_first else None
        with self._together():
            torch.distributed.gather_object(mine, received, dst=0)
        return [part for part in received or [] if part is not None]


Processes = OneProcess | FabricProcesses


def start_processes(device: str, devices: int = 1, num_nodes: int = 1) -> Processes:
    """The processes that torchrun or SLURM has started, else those that the flags ask for, which are started.

    Args:
        device: cpu or cuda.
        devices, num_nodes: of the flags; 1 for what the launcher says.

    Raises:
        ValueError: there are not that many devices, a flag contradicts the launcher, or the other processes did not come.
    """
    place = find_place(os.environ, devices, num_nodes)
    return OneProcess(device) if place.world == 1 else FabricProcesses(device, place)


def join_(processes: Processes, *kept: dict[int, list[Any]]) -> None:
    """Make of every process's own lists, by key, one after the other those of all, in the order of their ranks, in place.

    Args:
        kept: dicts of lists; tensors in them lie on the CPU.
    """
    if processes.world == 1:
        return
    for number, parts in enumerate(zip(*processes.everyone(kept), strict=True)):
        joined: dict[int, list[Any]] = {}
        for part in parts:
            for key, rows in part.items():
                joined.setdefault(key, []).extend(rows)
        kept[number].clear()
        kept[number].update(joined)


def part_of(processes: Processes, items: Sequence[T]) -> Sequence[T]:
    """The items of this process: neighbours, so that the parts of all in the order of their ranks are the whole."""
    return items[processes.rank * len(items) // processes.world : (processes.rank + 1) * len(items) // processes.world]


def _leave() -> None:
    """At the end of this process: its threads that talk to the others end first. Left to the end of C++, one may abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_devices(place: Place) -> int:
    """How many GPUs this process sees: one for each process of the machine, or, under SLURM, its own alone."""
    found = torch.cuda.device_count()
    if found == 1 and place.launcher == "SLURM":
        return 1
    if found < place.local_world:
        if place.launcher:
            raise ValueError(f"{place.launcher} has started {place.local_world} processes on this machine: it has {found} GPUs")
        raise ValueError(f"--devices {place.local_world}: there are {found}")
    return place.local_world
