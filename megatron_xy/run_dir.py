"""Whether a run can begin in its folder: room for its checkpoints, and the checkpoint that it would go on from.

From the config, its model complete, and the folder to an error or none; nothing is written.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_xy.checkpoint.continuation import check_parts
from megatron_xy.checkpoint.folders import iteration_folder, no_such_iteration, saved_iterations, swept_bytes
from megatron_xy.config import ModelConfig, RunConfig
from megatron_xy.errors import DataError, StorageError
from megatron_xy.flops import checkpoint_bytes
from megatron_xy.model.source import check_weights


def check_resume(config: RunConfig, current: Mapping[str, dict[str, Any]]) -> None:
    """Raises ConfigError where the run would not go on from what lies there, by its manifests; current: as
    `check_parts` has it.

    A damaged one is left to the run, which verifies every byte, says what it passes over, or ends.
    """
    for iteration in iterations_to_resume(config):
        folder = iteration_folder(config.run_dir / "checkpoints", iteration)
        with contextlib.suppress(DataError):
            allowed = config.checkpoint.allow_changes
            return check_parts(folder, current, allow_changes=allowed, say=lambda line: None)


def iterations_to_resume(config: RunConfig) -> list[int]:
    """The checkpoints that the run would go on from, the first whole one; none where it starts afresh.

    Raises ConfigError where `checkpoint.resume` names one that is not there.
    """
    checkpoints, resume = config.run_dir / "checkpoints", config.checkpoint.resume
    if resume == "never":
        return []
    found = saved_iterations(checkpoints)
    if resume == "auto":
        return found
    if resume not in found:
        raise no_such_iteration(checkpoints, resume)
    return [resume]


def check_weights_to_load(config: RunConfig, model: ModelConfig, *, is_trained: bool = True) -> None:
    """That the weights `model.load` names are there whole, at a glance; not those that a checkpoint stands in for.

    Raises as `check_weights`.
    """
    begins_anew = config.checkpoint.resume == "never" or not saved_iterations(config.run_dir / "checkpoints")
    if begins_anew or not is_trained:
        check_weights(model)


def check_space(config: RunConfig, models: Iterable[ModelConfig]) -> None:
    """Raises StorageError where the disk has no room for the checkpoints that a run keeps, or will come to write.

    models: complete, those that it trains.
    """
    checkpoints, kept = config.run_dir / "checkpoints", config.checkpoint.keep_latest
    found = saved_iterations(checkpoints)
    size = sum(map(checkpoint_bytes, models))
    # One more than are kept, while it is written.
    num_to_come = max(1, min(kept + 1 - len(found), _most_saves(config, found)))
    disk = shutil.disk_usage(next(folder for folder in checkpoints.parents if folder.exists()))
    free = disk.free + swept_bytes(checkpoints)  # which the run does first
    if disk.total and free < num_to_come * size:  # some network file systems tell no size at all
        raise StorageError(
            f"run_dir ({config.run_dir}) has {free / 1e6:,.1f} MB free, and {num_to_come * size / 1e6:,.1f} are "
            f"needed, for {num_to_come} of {size / 1e6:,.1f} MB: checkpoint.keep_latest ({kept}) are kept while "
            f"another is written, {len(found)} are there; make room, choose another run_dir, or lower "
            f"checkpoint.keep_latest"
        )


def _most_saves(config: RunConfig, found: list[int]) -> int:
    """Checkpoints that the run may write from where it begins, at most; a number above all where the data tell it."""
    training, ppo, resume = config.training, config.ppo, config.checkpoint.resume
    # A number may be of a checkpoint that is gone by now: what restarts a run goes on from the newest.
    done = resume if isinstance(resume, int) else 0 if resume == "never" else max(found, default=0)
    if training.epochs is not None:
        return sys.maxsize
    if config.task == "reward":  # after each epoch, too
        return training.train_iters - done
    intervals = [config.checkpoint.save_interval, 0 if ppo is None else ppo.snapshot_interval]
    return 1 + sum(training.train_iters // interval - done // interval for interval in intervals if interval)
