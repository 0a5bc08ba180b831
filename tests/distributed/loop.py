"""A whole small training job on the ranks of a test: data, config, and the loop as `pretrain` runs it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_xy import run_folder
from megatron_xy.config import RunConfig
from megatron_xy.errors import MegatronXYError
from megatron_xy.log import RunLog
from megatron_xy.preflight import open_data
from megatron_xy.runtime import signals
from megatron_xy.runtime.watchdog import END, Watchdog
from megatron_xy.training import pretrain
from tests.end_to_end.tiny_run import BUCKETS, VOCAB_SIZE


def config_of(data_folder: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of 12 steps of 1,024 tokens, saved every 4; sections add to it or replace."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": BUCKETS[-1],
        },
        "data": {"path": str(data_folder)},
        "training": {"train_iters": 12, "global_batch_tokens": 1024, "micro_batch_tokens": BUCKETS[-1]},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 2, "lr_decay_iters": 12},
        "checkpoint": {"save_interval": 4, "keep_latest": 10},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


def until(config: RunConfig, iteration: int) -> RunConfig:
    """The same job, ended early: a run that is broken off there, and goes on with `config`."""
    return config.model_copy(update={"training": config.training.model_copy(update={"train_iters": iteration})})


def train(*configs: RunConfig) -> None:
    """On one rank: each config's job, one after the other, in its run folder; a later one there goes on."""
    signals.block_stop_signals()
    stop = signals.StopRequest(on_leave=print)
    for config in configs:
        run_folder.prepare(config.run_dir)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        log = RunLog(config.run_dir, rank=rank, is_leader=rank == pretrain.leader_rank(config, world_size=world_size))
        dataset, held_out = open_data(config)
        watchdog = Watchdog(
            config.run_dir, rank=rank, world_size=world_size, timeout_seconds=120, phase="import", stop=stop
        )
        try:
            data_of = partial(pretrain.data_of, config, dataset, held_out)
            pretrain.train(config, data_of, log=log, watchdog=watchdog, stop=stop)
        finally:
            watchdog.close(phase=END)
        log.close()


def train_into_an_error(config: RunConfig) -> str:
    """On one rank: the error that the job ends with, as its exit code and words."""
    try:
        train(config)
    except MegatronXYError as error:
        return f"{error.exit_code}: {error}"
    return "no error"
