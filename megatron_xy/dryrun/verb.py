"""`megatron-xy dryrun RUN.yaml --world-size N`: chosen ranks of a job, one after the other, as tables or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.table import Table

from megatron_xy.config import (
    ModelConfig,
    ParallelConfig,
    RunConfig,
    check_role_shapes,
    check_shape,
    filling_answer,
    placed_roles,
    room_for_answers,
)
from megatron_xy.dryrun import ppo, training
from megatron_xy.dryrun.rank import RankFindings
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.model.source import resolve_model

SIZES = ("weights", "gradients", "optimizer", "activations", "update", "cache", "beside", "peak")

OfRank = Callable[..., list[RankFindings]]  # of rank and world_size


def chosen_ranks(config: RunConfig, *, ranks: Sequence[int], all_stages: bool, world_size: int) -> list[int]:
    """The ranks to build: those asked for, and with `all_stages` the first of each stage of each role; else rank 0.

    Raises UsageError for a rank outside the world.
    """
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise UsageError(
                f"--rank {rank}: a world of {world_size} has ranks 0 to {world_size - 1}; name one of them"
            )
    of_stages: list[int] = []
    if all_stages:
        placed: list[tuple[Sequence[int], ParallelConfig]] = [(range(world_size), config.parallel)]
        if config.task == "ppo":
            placed = [(role.ranks, role.parallel) for role in placed_roles(config, world_size=world_size).values()]
        for of_role, parallel in placed:
            of_stages += of_role[:: len(of_role) // parallel.pipeline_model_parallel_size]
    return sorted({*ranks, *of_stages}) or [0]


def run(
    config: RunConfig, *, ranks: Sequence[int], world_size: int, bucket: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """A step of each of `ranks`, as one JSON document. Raises ConfigError where bucket or model do not fit."""
    began = time.perf_counter()
    of_rank, bucket = _of_training(config, bucket) if config.task != "ppo" else _of_ppo(config, bucket, world_size)
    findings = []
    for rank in ranks:
        for role in of_rank(rank=rank, world_size=world_size):
            say(f"rank {rank}, {role.role}, stage {role.pp_rank}: {role.seconds:.1f} s")
            findings.append(asdict(role))
    return {
        "task": config.task,
        "world_size": world_size,
        "bucket": bucket,
        "ranks": findings,
        "seconds": time.perf_counter() - began,
    }


def _of_training(config: RunConfig, bucket: int | None) -> tuple[OfRank, int]:
    """What finds out about a rank of pretrain, sft or reward, and the tokens of a sample."""
    width = config.training.micro_batch_tokens
    if width % (bucket or width):
        raise ConfigError(
            f"--bucket {bucket}: training.micro_batch_tokens ({width}) must be a multiple of it; give one of the data's"
        )
    if config.has_pairs and bucket == 1:
        raise ConfigError("--bucket 1: a pair has two answers, so at least 2 tokens; give such a number")
    config = config.model_copy(update={"model": _shaped(config.model)})
    check_shape(config)
    return partial(training.dry_run, config, bucket=bucket or width), bucket or width


def _of_ppo(config: RunConfig, bucket: int | None, world_size: int) -> tuple[OfRank, int]:
    """What finds out about a rank of ppo, and the tokens of an answer with its prompt."""
    roles = {
        name: replace(role, model=_shaped(role.model))
        for name, role in placed_roles(config, world_size=world_size).items()
    }
    check_role_shapes(roles)
    answer_limit = config.ppo_section.max_response_length
    _, room = room_for_answers(roles.values(), config.ppo_section)
    length = bucket or filling_answer(roles.values(), config.ppo_section)
    if not answer_limit < length <= room:
        raise ConfigError(
            f"--bucket {length}: an answer with its prompt has more than ppo.max_response_length "
            f"({answer_limit}) and at most {room} tokens, the roles' room; give such a number"
        )
    return partial(ppo.dry_run, config, roles, length=length), length


def tables(result: dict[str, Any]) -> list[Table]:
    """What people want to see of the result: what each rank holds, and what it sends in a step."""
    unit, num_bytes = ("GiB", 2**30) if max(found["peak"] for found in result["ranks"]) >= 2**30 else ("MiB", 2**20)
    title = f"{result['task']} on {result['world_size']} ranks, samples of {result['bucket']} tokens: {unit} a rank"
    memory = Table(title=title, title_justify="left")
    sizes = [size for size in SIZES if any(found[size] for found in result["ranks"])]
    for column in ("rank", "role", "stage", "tp", "dp", "layers", "micro-batches", "parameters", *sizes):
        memory.add_column(column, justify="left" if column == "role" else "right")
    ranks_by_traffic: dict[tuple[Any, ...], list[str]] = {}
    for found in result["ranks"]:
        memory.add_row(
            *(str(found[key]) for key in ("rank", "role", "pp_rank", "tp_rank", "dp_rank", "num_layers")),
            str(found["num_micro_batches"]),
            f"{found['parameters']:,}",
            *(f"{found[size] / num_bytes:,.3f}" for size in sizes),
        )
        traffic = (found["role"], *(tuple(part.values()) for part in found["collectives"]))
        ranks_by_traffic.setdefault(traffic, []).append(str(found["rank"]))
    collectives = Table(title="collectives a step", title_justify="left")
    for column in ("ranks", "role", "group", "kind", "of ranks", "calls", f"{unit} in all"):
        collectives.add_column(column, justify="left" if column in ("ranks", "role", "group", "kind") else "right")
    for (role, *parts), ranks in ranks_by_traffic.items():
        for place, (kind, group, size, calls, whole) in enumerate(parts):
            whose = ("", "") if place else (", ".join(ranks), role)
            collectives.add_row(*whose, group, kind, str(size), f"{calls:,}", f"{whole / num_bytes:,.3f}")
        collectives.add_section()
    return [memory, collectives]


def _shaped(model: ModelConfig) -> ModelConfig:
    """The model with a whole shape, from the weights that it loads where the config leaves out a part of it.

    Transformer Engine's layers want a GPU: those of torch hold the same.
    """
    if model.load is not None and model.missing_shape:
        model = resolve_model(model)
    return model.model_copy(update={"layer_spec": "torch"})
