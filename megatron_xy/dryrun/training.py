"""Ranks of pretrain, sft and reward: the job's one role and a training step, on samples that fill their bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_xy.config import RunConfig
from megatron_xy.data.dataset import MicroBatch, Sample, collate
from megatron_xy.dryrun.ledger import Ledger
from megatron_xy.dryrun.rank import RankFindings, note_step, pretended_rank
from megatron_xy.reward.batches import pair_micro_batches
from megatron_xy.reward.objective import reward_objective
from megatron_xy.reward.pairs import Pair
from megatron_xy.role import Role
from megatron_xy.training import pretrain
from megatron_xy.training.train_step import train_step


def dry_run(config: RunConfig, *, rank: int, world_size: int, bucket: int) -> list[RankFindings]:
    """A step of `rank` in a job of a checked config with a whole shape; bucket: tokens of every sample, or pair."""
    with pretended_rank(rank, world_size=world_size) as ledger:
        role = pretrain.build(config)
        batches = micro_batches(config, dp_size=role.groups.dp_size, bucket=bucket)
        return [note_training_step(config, role, batches, ledger=ledger, rank=rank)]


def note_training_step(
    config: RunConfig, role: Role, batches: Sequence[MicroBatch], *, ledger: Ledger, rank: int
) -> RankFindings:
    """One training step of a fresh role, under an entered `ledger` that has seen it built."""

    def step(before_update: Callable[[], None]) -> None:
        train_step(
            role,
            batches,
            num_sources=1,
            lr=config.optimizer.lr,
            clip_grad=config.optimizer.clip_grad,
            objective=reward_objective(config.reward_section) if config.task == "reward" else None,
            before_update=before_update,
        )

    return note_step(role, step, num_micro_batches=len(batches), ledger=ledger, rank=rank)


def micro_batches(config: RunConfig, *, dp_size: int, bucket: int) -> list[MicroBatch]:
    """A step's micro-batches of one data parallel rank, of samples, or pairs, that fill the bucket."""
    training = config.training
    number = max(1, training.global_batch_tokens // (training.micro_batch_tokens * dp_size))  # pairs may fill less
    per_micro_batch = training.micro_batch_tokens // bucket
    if config.has_pairs:
        return pair_micro_batches(
            [_pair(bucket)] * (number * per_micro_batch),
            source_ids=[0] * (number * per_micro_batch),
            width=training.micro_batch_tokens,
            reward=config.reward_section,
            dp_size=1,
            dp_rank=0,
            multiple=config.parallel.micro_batches_a_round,
        )
    sample = Sample(tokens=np.ones(bucket, dtype=np.int64), piece_lengths=np.array([bucket]))
    batch = collate(
        [sample] * per_micro_batch,
        source_indices=[0] * per_micro_batch,
        bucket=bucket,
        micro_batch_tokens=training.micro_batch_tokens,
        split_documents=config.data.split_documents,
    )
    return [batch] * number


def _pair(num_tokens: int) -> Pair:
    """Two answers, each with its prompt half of the tokens."""
    prompt = np.ones(num_tokens // 4, dtype=np.int32)
    chosen, rejected = (np.full(num_tokens // 2 - len(prompt), token, dtype=np.int32) for token in (1, 2))
    return Pair("", "", prompt, chosen, rejected, strength=1, source="", models=("", ""))
