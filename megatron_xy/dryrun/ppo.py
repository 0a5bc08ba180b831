"""Ranks of ppo: every role that stands on a rank, and an update, or a scoring pass, over one mini-batch of answers.

All answers are of one length. Of generation, the caches are made and grow as they do, and no token is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from megatron_xy import device
from megatron_xy.config import PlacedRole, PPOConfig, RoleName, RunConfig, room_for_answers
from megatron_xy.dryrun.ledger import Ledger
from megatron_xy.dryrun.rank import RankFindings, note_step, pretended_rank
from megatron_xy.model import generate
from megatron_xy.model.inference import ChunkForward
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.ppo.roles import Actor, Critic, Policy, RewardModel
from megatron_xy.ppo.run import build_worker
from megatron_xy.ppo.worker import RoleWorker
from megatron_xy.role import Role


def dry_run(
    config: RunConfig, roles: Mapping[RoleName, PlacedRole], *, rank: int, world_size: int, length: int
) -> list[RankFindings]:
    """The roles on `rank`, each built and run. length: tokens of every answer with its prompt."""
    ppo = config.ppo_section
    with pretended_rank(rank, world_size=world_size) as ledger:
        workers = [build_worker(config, placed) for placed in roles.values()]
        mine = [worker for worker in workers if worker.role is not None]
        experience = _experience(ppo, tuple(roles), length=length)
        # Roles beside each other have their moments from the second round on.
        for _ in mine:
            findings = [_note(worker, experience, ppo=ppo, ledger=ledger, rank=rank) for worker in mine]
        _, room = room_for_answers(roles.values(), ppo)
        return [
            _with_cache(found, worker.role, ppo=ppo, room=room, ledger=ledger)
            if isinstance(worker, Actor) and worker.role is not None
            else found
            for worker, found in zip(mine, findings, strict=True)
        ]


def _note(worker: RoleWorker, experience: Experience, *, ppo: PPOConfig, ledger: Ledger, rank: int) -> RankFindings:
    """One role's work on a mini-batch: an update where it is trained, else the pass that it is there for."""
    assert worker.role is not None, "it stands on this rank"
    answers = range(ppo.mini_batch_size)
    rollout = _part(experience.rollout, number=len(answers))

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


def _part(rollout: Rollout, *, number: int) -> Rollout:
    """The first answers of it."""
    return replace(
        rollout,
        prompts={role: prompts[:number] for role, prompts in rollout.prompts.items()},
        responses=rollout.responses[:number],
        has_ended=rollout.has_ended[:number],
        mask=rollout.mask[:number],
    )


def _with_cache(found: RankFindings, role: Role, *, ppo: PPOConfig, room: int, ledger: Ledger) -> RankFindings:
    """With what a generation's caches take, from prompts to answers that leave no room."""
    groups = role.groups
    sequences = min(generate.MAX_SEQUENCES, -(-ppo.rollout_batch_size // groups.dp_size))
    before = ledger.now
    ledger.begin_peak()
    with torch.inference_mode():
        chunks = [ChunkForward(role, chunk=chunk) for chunk in range(len(role.chunks))]
        rows = -(-sequences // groups.pp_size)
        caches = [chunk.new_cache(rows) for _ in range(groups.pp_size) for chunk in chunks]
        for length in range(room - ppo.max_response_length, room + 1):
            for cache in caches:
                cache.reserve(length)
    cache_bytes = ledger.peak - before
    static = found.beside + found.weights + found.gradients + found.optimizer
    return replace(found, cache=cache_bytes, peak=max(found.peak, static + cache_bytes))


def _experience(ppo: PPOConfig, roles: tuple[RoleName, ...], *, length: int) -> Experience:
    """A step's answers of `length` tokens, prompt included, and numbers for each of their tokens."""
    num_answers, num_tokens = ppo.rollout_batch_size, ppo.max_response_length
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
