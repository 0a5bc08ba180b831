"""The roles of a run as the planner sees them: what is the same on all ranks of one, and what PPO gives it to do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_xy.config import (
    ModelConfig,
    ParallelConfig,
    PlacedRole,
    PPOConfig,
    RunConfig,
    data_parallel_size,
    filling_answer,
    placed_roles,
    room_for_answers,
)
from megatron_xy.data.answer_batches import equal_answers

CACHE_STEP = 64  # tokens, by which generation's cache grows at the least


@dataclass(frozen=True)
class Answers:
    """What a PPO role gets to work on, as memory is told for it; lengths in tokens."""

    ppo: PPOConfig
    budget: int  # of a micro-batch, at most
    room: int  # for an answer with its prompt
    length: int  # of answers, prompts included, that fill micro-batches most
    are_generated_here: bool

    def shape(self, number: int, *, length: int, parallel: ParallelConfig, dp_size: int) -> tuple[int, int]:
        """Micro-batches of a rank, and tokens of each, where `number` answers of one length are shared out."""
        multiple = parallel.micro_batches_a_round
        batches, most = equal_answers(number, length=length, budget=self.budget, dp_size=dp_size, multiple=multiple)
        tp = parallel.tensor_model_parallel_size
        return batches, -(-most * length // tp) * tp

    @property
    def cache_lengths(self) -> tuple[int, int]:
        """Tokens a sequence that generation's cache has room for in the end, and had before it last grew."""
        before, now = 0, _up(self.room - self.ppo.max_response_length)
        while now < self.room:
            before, now = now, _up(max(now + 1, now + now // 2))
        return now, before


@dataclass(frozen=True)
class Job:
    """One role as the planner sees it: what is the same on all its ranks."""

    role: str  # "model" for pretrain, sft and reward
    model: ModelConfig
    parallel: ParallelConfig
    dp_size: int
    micro_batch_tokens: int
    num_micro_batches: int  # a step and replica
    is_trained: bool = True
    has_logprobs: bool = False  # PPO's loss of the actor, in place of the cross-entropy
    ranks: tuple[int, ...] = ()  # global, in placement order
    answers: Answers | None = None  # of a PPO role

    def over(self, dp_size: int) -> Job:
        """The same with as many replicas; a PPO role's micro-batches as its share of the answers makes them."""
        if self.answers is None:
            return replace(self, dp_size=dp_size)
        answers = self.answers
        number, length = answers.ppo.mini_batch_size, answers.length
        batches, tokens = answers.shape(number, length=length, parallel=self.parallel, dp_size=dp_size)
        return replace(self, dp_size=dp_size, num_micro_batches=batches, micro_batch_tokens=tokens)


def jobs(config: RunConfig, *, world_size: int) -> list[Job]:
    """The roles of a run over `world_size` ranks; one, named model, but for task ppo."""
    if config.task == "ppo":
        ppo, placed = config.ppo_section, placed_roles(config, world_size=world_size)
        _, room = room_for_answers(placed.values(), ppo)
        length = filling_answer(placed.values(), ppo)
        return [_job_of_role(role, ppo=ppo, room=room, length=length) for role in placed.values()]
    dp_size = data_parallel_size(config.parallel, world_size=world_size)
    training = config.training
    return [
        Job(
            "model", config.model, config.parallel, dp_size, training.micro_batch_tokens,
            max(1, training.global_batch_tokens // (training.micro_batch_tokens * dp_size)),
            ranks=tuple(range(world_size)),
        )
    ]  # fmt: skip


def _job_of_role(role: PlacedRole, *, ppo: PPOConfig, room: int, length: int) -> Job:
    """A role of PPO at its update by a mini-batch, or at its pass over one."""
    dp_size = len(role.ranks) // role.parallel.model_parallel_size
    return Job(
        role.name,
        role.model,
        role.parallel,
        dp_size,
        role.micro_batch_tokens,
        num_micro_batches=1,
        is_trained=role.optimizer is not None,
        has_logprobs=role.name == "actor",
        ranks=role.ranks,
        answers=Answers(ppo, role.micro_batch_tokens, room, length, are_generated_here=role.name == "actor"),
    ).over(dp_size)


def _up(tokens: int) -> int:
    return -(-tokens // CACHE_STEP) * CACHE_STEP
