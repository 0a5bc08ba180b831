"""The roles of PPO as seen from one rank: their share of the answers, packed, and a forward pass over them.

The answers of a batch are spread over a role's replicas and packed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_xy import device
from megatron_xy.config import TRAINED_ROLES, PlacedRole
from megatron_xy.data.answer_batches import AnswerBatch, pack_answers, plan_answers, width_of
from megatron_xy.parallel import Groups
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.transport import Shipment
from megatron_xy.role import Role
from megatron_xy.training.train_step import DeviceBatch, forward_pass, on_device


@dataclass(frozen=True, kw_only=True)
class PackedBatch(DeviceBatch):
    """A micro-batch of answers on the device, with where its response tokens are (see AnswerBatch)."""

    before: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


TRAINED: tuple[str, ...] = TRAINED_ROLES
OutputsOf = Callable[[Role, PackedBatch, torch.Tensor], dict[str, torch.Tensor]]


class RoleWorker:
    """One role as seen from one rank, which need not be one of the role's: then `role` is None and nothing is done.

    busy_seconds: what this rank has worked for the role since `take_busy_seconds`.
    """

    def __init__(self, placed: PlacedRole, role: Role | None) -> None:
        self.placed, self.role = placed, role
        self.beat: Callable[[str], object] = lambda phase: None  # called with each phase of work
        self.before_update: Callable[[], object] = lambda: None  # called right before weights change
        self._busy_seconds = 0.0
        self._padding = (0, 0)

    @property
    def name(self) -> str:
        """actor, critic, reference or reward."""
        return self.placed.name

    def take_busy_seconds(self) -> float:
        """Seconds of work since the last call."""
        seconds, self._busy_seconds = self._busy_seconds, 0.0
        return seconds

    @contextlib.contextmanager
    def working(self, phase: str) -> Iterator[Role]:
        """Inside, this rank works as the role, in a phase of a name; the time counts as busy."""
        assert self.role is not None, "only the role's own ranks work"
        self.beat(f"{self.name}.{phase}")
        began = time.perf_counter()
        yield self.role
        device.synchronize()
        self._busy_seconds += time.perf_counter() - began

    def take_padding(self) -> tuple[int, int]:
        """(padding, all tokens) of this rank's micro-batches since the last call; of the ranks of a replica the first
        counts."""
        counted, self._padding = self._padding, (0, 0)
        return counted

    def packed(self, role: Role, rollout: Rollout, answers: Sequence[int]) -> list[PackedBatch]:
        """This replica's share of `answers` (indices into the rollout), as micro-batches."""
        prompts, responses = rollout.prompts[self.name], rollout.responses
        lengths = [len(prompts[answer]) + len(responses[answer]) for answer in answers]
        groups = role.groups
        budget, multiple = self.placed.micro_batch_tokens, role.parallel.micro_batches_a_round
        plan = plan_answers(lengths, budget=budget, dp_size=groups.dp_size, multiple=multiple)
        width = width_of(plan, lengths, multiple=groups.tp_size)
        mine = [[answers[index] for index in batch] for batch in plan[groups.dp_rank]]
        batches = pack_answers(mine, prompts, responses, width=width)
        if groups.tp_rank == 0 and groups.is_first_stage:
            padding, room = self._padding
            padding += sum(batch.tokens.num_padding_tokens for batch in batches)
            self._padding = padding, room + width * len(batches)
        return [_on_device(batch) for batch in batches]

    def fill(self, rollout: Rollout, phase: str, outputs_of: OutputsOf, names: Sequence[str]) -> Shipment:
        """A shipment of `names`, one number a response token each, from a forward pass over all answers.

        outputs_of: role and batch to a function of the last stage's output that gives the names' values, each
        [response tokens of the micro-batch].
        """
        tensors = {name: torch.zeros_like(rollout.mask) for name in names}
        if self.role is None:
            return Shipment(tensors)
        with self.working(phase) as role, torch.no_grad(), role.evaluating():
            batches = self.packed(role, rollout, range(len(rollout.responses)))
            outputs = forward_pass(role, batches, partial(outputs_of, role))
            if role.groups.is_last_stage and role.groups.tp_rank == 0:
                for packed, output in zip(batches, outputs, strict=True):
                    for name, tensor in tensors.items():
                        tensor[packed.rows, packed.columns] = output[name]
        return Shipment(tensors)


@dataclass(frozen=True)
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


def _on_device(batch: AnswerBatch) -> PackedBatch:
    before, rows, columns = (device.moved_here(array) for array in (batch.before, batch.rows, batch.columns))
    return PackedBatch(**vars(on_device(batch.tokens)), before=before, rows=rows, columns=columns)
