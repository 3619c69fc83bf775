"""Several devices: Lightning Fabric starts one process a device, which run the same command and share out the batches.

The batches are the same whatever the number of processes, so what a network computes of them is too.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Processes wait for one another while the first of them works alone; one that ends in an error ends the others.
PATIENCE = datetime.timedelta(days=7)


class OneProcess:
    """The one process that there is without `--devices` and `--num_nodes`."""

    rank, world = 0, 1
    is_first = True

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def share(self, value: Any) -> Any:
        """The value of the first process."""
        return value

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
    """One process a device under Lightning Fabric. The constructor starts the others: they run the same command again.

    Args:
        device: cpu or cuda.
        devices: processes on this machine.
        num_nodes: machines.

    Raises:
        ValueError: there are not that many devices.
    """

    def __init__(self, device: str, devices: int, num_nodes: int = 1) -> None:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        kind = torch.device(device).type
        if kind == "cuda" and torch.cuda.device_count() < devices:
            raise ValueError(f"--devices {devices}: there are {torch.cuda.device_count()}")
        self.fabric = Fabric(
            accelerator="cuda" if kind == "cuda" else "cpu",
            devices=devices,
            num_nodes=num_nodes,
            strategy=DDPStrategy(timeout=PATIENCE),
        )
        self.fabric.launch()
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size
        self.is_first = self.rank == 0
        self.device = self.fabric.device

    def share(self, value: Any) -> Any:
        """The value of the first process, in every process."""
        return self.fabric.broadcast(value, src=0)

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
        mean: Any = self.fabric.all_reduce(value.to(self.device), reduce_op="mean")
        return value.copy_(mean)

    def agree(self, error: str | None) -> None:
        """Raise ValueError in every process where one of them met an error."""
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, error)
        for message in everyone:
            if message is not None:
                raise ValueError(message)

    @contextlib.contextmanager
    def quiet_failure(self) -> Iterator[None]:
        """Errors of bad input are the first process's to print: the others end without a word, with the same status."""
        try:
            yield
        except (ValueError, OSError):
            if self.is_first:
                raise
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
        torch.distributed.gather_object(mine, received, dst=0)
        return [part for part in received or [] if part is not None]


Processes = OneProcess | FabricProcesses


def start_processes(device: str, devices: int = 1, num_nodes: int = 1) -> Processes:
    """The processes that the flags ask for. Raises ValueError where there are not that many devices."""
    if devices * num_nodes == 1:
        return OneProcess(device)
    return FabricProcesses(device, devices, num_nodes)
