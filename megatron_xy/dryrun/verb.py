"""`megatron-xy dryrun RUN.yaml --world-size N`: chosen ranks of a job, one after the other, as tables or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from megatron_xy.config import ModelConfig, RunConfig, check_shape
from megatron_xy.dryrun.rank import dry_run, first_ranks
from megatron_xy.errors import ConfigError
from megatron_xy.weights import resolve_model

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
SIZES = ("weights", "gradients", "optimizer", "activations", "update", "peak")


def chosen_ranks(config: RunConfig, *, ranks: Sequence[int], all_stages: bool, world_size: int) -> list[int]:
    """The ranks to build: those asked for, and with `all_stages` the first of each stage; else rank 0.

    Raises ConfigError for a rank outside the world.
    """
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"--rank {rank}: a world of {world_size} has ranks 0 to {world_size - 1}; name one of them"
            )
    of_stages = first_ranks(config, world_size=world_size) if all_stages else []
    return sorted({*ranks, *of_stages}) or [0]


def run(
    config: RunConfig, *, ranks: Sequence[int], world_size: int, bucket: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """A step of each of `ranks`, as one JSON document. Raises ConfigError where bucket or model do not fit."""
    began = time.perf_counter()
    width = config.training.micro_batch_tokens
    bucket = bucket or width
    if width % bucket:
        raise ConfigError(
            f"--bucket {bucket}: training.micro_batch_tokens ({width}) must be a multiple of it; give one of the data's"
        )
    config = config.model_copy(update={"model": _shaped(config.model)})
    check_shape(config)
    findings = []
    for rank in ranks:
        for role in dry_run(config, rank=rank, world_size=world_size, bucket=bucket):
            say(f"rank {rank}, {role.role}, stage {role.pp_rank}: {role.seconds:.1f} s")
            findings.append(asdict(role))
    return {
        "task": config.task,
        "world_size": world_size,
        "micro_batch_tokens": width,
        "bucket": bucket,
        "ranks": findings,
        "seconds": time.perf_counter() - began,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """What people want to see of the result: what each rank holds, and what it sends in a step."""
    title = f"{result['task']} on {result['world_size']} ranks, samples of {result['bucket']} tokens: GiB a rank"
    memory = Table(title=title, title_justify="left")
    for column in ("rank", "role", "stage", "tp", "dp", "layers", "micro-batches", "parameters", *SIZES):
        memory.add_column(column, justify="left" if column == "role" else "right")
    ranks_by_traffic: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
    for found in result["ranks"]:
        memory.add_row(
            *(str(found[key]) for key in ("rank", "role", "pp_rank", "tp_rank", "dp_rank", "num_layers")),
            str(found["num_micro_batches"]),
            f"{found['parameters']:,}",
            *(_gib(found[size]) for size in SIZES),
        )
        traffic = tuple(tuple(part.values()) for part in found["collectives"])
        ranks_by_traffic.setdefault(traffic, []).append(f"{found['rank']}")
    collectives = Table(title="collectives a step", title_justify="left")
    for column in ("ranks", "kind", "group", "of ranks", "calls", "GiB in all"):
        collectives.add_column(column, justify="left" if column in ("ranks", "kind", "group") else "right")
    for traffic, ranks in ranks_by_traffic.items():
        for place, (kind, group, size, calls, num_bytes) in enumerate(traffic):
            first = "" if place else ", ".join(ranks)
            collectives.add_row(first, kind, group, str(size), f"{calls:,}", _gib(num_bytes))
        collectives.add_section()
    return [memory, collectives]


def _shaped(model: ModelConfig) -> ModelConfig:
    """The model with a whole shape, from the weights that it loads where the config leaves out a part of it.

    Transformer Engine's layers want a GPU: those of torch hold the same.
    """
    if model.load is not None and any(getattr(model, key) is None for key in SHAPE):
        model = resolve_model(model)
    return model.model_copy(update={"layer_spec": "torch"})


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f}"
