"""Which course of checkpoints a run follows.

A run that starts anew, or from a number, leaves the checkpoints behind that point: they are set aside under another
name, so that neither `auto` nor retention ever mixes two courses. Nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_xy import device
from megatron_xy.checkpoint.folders import iteration_folder, saved_iterations
from megatron_xy.config import RunConfig
from megatron_xy.errors import Stopped
from megatron_xy.parallel import Groups, sum_over
from megatron_xy.run_folder import current_attempt, read_start, this_start, write_start
from megatron_xy.storage import storage_errors, sync_folder


def wanted_resume(config: RunConfig, groups: Groups) -> str | int:
    """`checkpoint.resume`, but `auto` in a restart of a run that has begun its course: it follows its own checkpoints.

    Collective: the first rank's view of the folder decides.
    """
    own = groups.role_rank == 0 and current_attempt() > 0 and read_start(config.run_dir) == this_start()
    agreed = sum_over(torch.tensor([int(own)], device=device.current()), groups.all_ranks)
    return "auto" if agreed.item() else config.checkpoint.resume


def stopped_after(iteration: int, config: RunConfig) -> Stopped:
    """What a run that saved on request ends with: how it goes on, too."""
    resume = config.checkpoint.resume
    goes_on = "the same command" if resume == "auto" else f"with checkpoint.resume=auto in place of {resume} it"
    return Stopped(f"stopped on request after step {iteration}, state saved; {goes_on} goes on from there")


def begin(run_dir: Path, *, iteration: int | None, say: Callable[[str], None]) -> None:
    """Sets later checkpoints than `iteration` aside and notes that this start's course has begun. One rank calls it.

    iteration: None where the run follows the newest: what `auto` passed over there is damaged, and stays to be looked
    at until a new one takes its name.
    """
    checkpoints = run_dir / "checkpoints"
    later_ones = [found for found in saved_iterations(checkpoints) if iteration is not None and found > iteration]
    for later in later_ones:
        folder = iteration_folder(checkpoints, later)
        number = 1
        while (aside := folder.with_name(f"abandoned_{number}_{folder.name}")).exists():
            number += 1
        with storage_errors(aside):
            folder.rename(aside)
        say(f"{folder.name} lies behind iteration {iteration}, from which this run starts: set aside as {aside.name}")
    sync_folder(checkpoints)
    write_start(run_dir)
