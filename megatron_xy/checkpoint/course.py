"""Which course of checkpoints a run follows.

A run that starts anew, or from a number, leaves the checkpoints and HF folders behind that point: they are set aside
under another name, so that neither `auto` nor retention ever mixes two courses. Nothing is deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_xy import device
from megatron_xy.checkpoint.choice import find_resumable
from megatron_xy.checkpoint.continuation import check_parts, short
from megatron_xy.checkpoint.files import Manifest
from megatron_xy.checkpoint.folders import iteration_folder, saved_iterations, sweep
from megatron_xy.config import RunConfig
from megatron_xy.errors import ConfigError, Stopped
from megatron_xy.hf.target import sweep_unfinished
from megatron_xy.parallel import Groups, barrier, gathered_values, sum_over
from megatron_xy.run_folder import current_attempt, read_start, this_start, write_start
from megatron_xy.storage import storage_errors, sync_folder


def find_start(
    config: RunConfig,
    groups: Groups,
    *,
    current: Mapping[str, dict[str, Any]],
    say: Callable[[str], None],
) -> tuple[Path, Manifest] | None:
    """The checkpoint that the run goes on from, with the manifest of the first of its parts; None where it starts anew.

    What a killed save left is swept. current: what `continuation.facts` says of the run now, by part. Collective.
    Raises as `check_agreement`, `find_resumable` and `check_parts`.
    """
    check_agreement(current, groups)
    checkpoints = config.run_dir / "checkpoints"
    swept = sweep(checkpoints) if groups.role_rank == 0 else []
    for name in gathered_values(swept, groups.all_ranks)[0]:
        say(f"swept {name}, which a killed save left half-written")
    found = find_resumable(checkpoints, groups, resume=_wanted_resume(config, groups), say=say, parts=list(current))
    if found is not None:
        check_parts(found[0], current, allow_changes=config.checkpoint.allow_changes, say=say)
    return found


def check_agreement(current: Mapping[str, dict[str, Any]], groups: Groups) -> None:
    """That all ranks know the run by the same facts, contents of files included. Collective.

    Raises ConfigError on all ranks, naming those that are apart.
    """
    own = hashlib.sha256(json.dumps(current, sort_keys=True).encode()).hexdigest()
    digests = gathered_values(own, groups.all_ranks)
    usual = Counter(digests).most_common(1)[0][0]
    apart = [place for place, digest in enumerate(digests) if digest != usual]
    if not apart:
        return
    every = gathered_values(current, groups.all_ranks)
    like, other = digests.index(usual), apart[0]
    theirs, ours = _flat(every[other]), _flat(every[like])
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    first, ranks = names[0], [str(groups.ranks[place]) for place in apart]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(ranks[:8])}{more} differ"
    raise ConfigError(
        f"all ranks must be given the same run: {who} from rank {groups.ranks[like]} in "
        f"{', '.join(names[:8])} ({first}: {short(theirs.get(first))} and not "
        f"{short(ours.get(first))}); give every node the same RUN.yaml and the same files"
    )


def _flat(current: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The facts by the keys that the user knows."""
    found: dict[str, Any] = {}
    for part, told in current.items():
        model = f"roles.{part}.model" if part else "model"
        found |= {f"{model}.{name}": value for name, value in told["model"].items()}
        found |= told["data_order"] | told["settings"]
    return found


def begin(config: RunConfig, groups: Groups, *, iteration: int) -> None:
    """The run goes on from `iteration`: what lies behind it is set aside, and what a killed export left is swept.

    Where the run follows the newest, `auto` has passed over what lies behind it as damaged: that stays to be looked at
    until a new one takes its name. Collective; when it returns, a stop has something to save.
    """
    follows_newest = _wanted_resume(config, groups) == "auto"
    if groups.role_rank == 0:
        if not follows_newest:
            set_aside(config.run_dir, iteration=iteration, say=print)
        hf = config.run_dir / "hf"
        for name in sweep_unfinished(hf, but=iteration_folder(hf, iteration).name):  # which the run goes on with
            print(f"swept hf/{name}, which a killed export left half-written")
        write_start(config.run_dir)
    barrier(groups)


def _wanted_resume(config: RunConfig, groups: Groups) -> str | int:
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


def set_aside(run_dir: Path, *, iteration: int, say: Callable[[str], None]) -> None:
    """Gives checkpoints and HF folders of later iterations than `iteration` another name. One rank calls it."""
    parents = (run_dir / "checkpoints", run_dir / "hf")
    for later in sorted({found for parent in parents for found in saved_iterations(parent) if found > iteration}):
        name, number = iteration_folder(run_dir, later).name, 1
        while any((parent / f"abandoned_{number}_{name}").exists() for parent in parents):
            number += 1
        aside = f"abandoned_{number}_{name}"
        there = [parent for parent in parents if (parent / name).exists()]
        for parent in there:
            with storage_errors(parent / aside):
                (parent / name).rename(parent / aside)
            sync_folder(parent)
        places = ", ".join(parent.name for parent in there)
        say(f"{name} ({places}) lies behind iteration {iteration}, from which this run starts: set aside as {aside}")
