"""The roles of a run as one rank sees them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xy.config import TRAINED_ROLES
from megatron_xy.parallel import Groups
from megatron_xy.ppo.worker import RoleWorker

TRAINED: tuple[str, ...] = TRAINED_ROLES


@dataclass
class Cast:
    """A worker for every role; `world` has all ranks."""

    world: Groups
    workers: dict[str, RoleWorker]

    @property
    def trained(self) -> list[RoleWorker]:
        """Actor and critic."""
        return [self.workers[name] for name in TRAINED]

    @property
    def roles_here(self) -> str:
        """The roles that this rank has a part in."""
        return ", ".join(name for name, worker in self.workers.items() if worker.role is not None)
