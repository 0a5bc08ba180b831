"""Ranks of ppo: every role that stands on a rank, and an update, or a scoring pass, over one mini-batch of answers.

All answers are as long as they may be. Generation is left out: its cache is there while nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from megatron_xy import device
from megatron_xy.config import PlacedRole, PPOConfig, RoleName, RunConfig, placed_roles
from megatron_xy.dryrun.ledger import Ledger
from megatron_xy.dryrun.rank import RankFindings, note_step, pretended_rank
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.ppo.roles import Actor, Critic, Policy, RewardModel, RoleWorker
from megatron_xy.ppo.run import build_worker


def dry_run(
    config: RunConfig, roles: Mapping[RoleName, PlacedRole], *, rank: int, world_size: int, length: int
) -> list[RankFindings]:
    """The roles on `rank`, each built and run. length: tokens of every answer with its prompt."""
    ppo = config.ppo
    assert ppo is not None, "the config's rules ask for it"
    with pretended_rank(rank, world_size=world_size) as ledger:
        workers = [build_worker(config, placed) for placed in roles.values()]
        mine = [worker for worker in workers if worker.role is not None]
        experience = _experience(ppo, tuple(roles), length=length)
        # Roles beside each other have their moments from the second round on.
        for _ in mine:
            findings = [_note(worker, experience, ppo=ppo, ledger=ledger, rank=rank) for worker in mine]
    return findings


def longest_answer(roles: Mapping[RoleName, PlacedRole]) -> int:
    """Tokens that every role has room for, prompt and answer together."""
    return min(min(role.model.max_position_embeddings, role.micro_batch_tokens) for role in roles.values())


def first_ranks(config: RunConfig, *, world_size: int) -> list[int]:
    """The first rank of each pipeline stage of each role."""
    return [
        rank
        for role in placed_roles(config, world_size=world_size).values()
        for rank in role.ranks[:: len(role.ranks) // role.parallel.pipeline_model_parallel_size]
    ]


def _note(worker: RoleWorker, experience: Experience, *, ppo: PPOConfig, ledger: Ledger, rank: int) -> RankFindings:
    """One role's work on a mini-batch: an update where it is trained, else the pass that it is there for."""
    assert worker.role is not None, "it stands on this rank"
    rollout, answers = experience.rollout, range(ppo.mini_batch_size)

    def step(before_update: Callable[[], None]) -> object:
        worker.before_update = before_update
        if isinstance(worker, Actor | Critic):
            return worker.update(experience, [answers], ppo=ppo, lr=0.0)
        if isinstance(worker, Policy):
            return worker.logprobs(rollout)
        assert isinstance(worker, RewardModel), "there are no other roles"
        return worker.score(rollout)

    num_micro_batches = len(worker.packed(worker.role, rollout, answers))
    return note_step(worker.role, step, num_micro_batches=num_micro_batches, ledger=ledger, rank=rank)


def _experience(ppo: PPOConfig, roles: tuple[RoleName, ...], *, length: int) -> Experience:
    """A mini-batch of answers of `length` tokens, prompt included, and numbers for each of their tokens."""
    num_answers, num_tokens = ppo.mini_batch_size, ppo.max_response_length
    prompts = [[1] * (length - num_tokens)] * num_answers
    mask = torch.ones(num_answers, num_tokens, device=device.current())
    rollout = Rollout(
        drawn=[],
        prompts=dict.fromkeys(roles, prompts),
        responses=[[1] * num_tokens] * num_answers,
        has_ended=torch.ones(num_answers, dtype=torch.bool, device=device.current()),
        mask=mask,
    )
    of_tokens = ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns", "actor_mask")
    numbers = {name: torch.zeros_like(mask) for name in of_tokens}
    return Experience(rollout=rollout, scores=torch.zeros(num_answers, device=device.current()), **numbers)
