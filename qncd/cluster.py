"""Lightning Fabric's view of where a process stands; imported where there are several processes, since Fabric takes seconds."""

from __future__ import annotations

from lightning_fabric.plugins.environments import ClusterEnvironment

from qncd.launchers import Place


class PlacedEnvironment(ClusterEnvironment):
    """A place as Fabric asks for it: all processes are there already.

    Args:
        place: of this process.
        local_rank: which of the devices that it sees is its own.
    """

    def __init__(self, place: Place, local_rank: int) -> None:
        super().__init__()
        self.place, self._local_rank = place, local_rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.place.address

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.world

    def set_world_size(self, size: int) -> None:
        """Nothing: Fabric counts devices times machines, which need not all have as many."""

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing, likewise."""

    def local_rank(self) -> int:
        return self._local_rank

    def node_rank(self) -> int:
        return self.place.node
