"""The folders of a run's checkpoints: their names, which of them there are, and how one is let go of."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from megatron_xy.errors import ConfigError
from megatron_xy.storage import TEMPORARY_PREFIX


def iteration_folder(checkpoints: Path, iteration: int) -> Path:
    """CHECKPOINTS/iter_0000100."""
    return checkpoints / f"iter_{iteration:07d}"


def saved_iterations(checkpoints: Path) -> list[int]:
    """Iterations that have a folder of their own, newest first; whether they are whole is not looked at."""
    if not checkpoints.is_dir():
        return []
    names = (folder.name.removeprefix("iter_") for folder in checkpoints.glob("iter_*") if folder.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def no_such_iteration(checkpoints: Path, wanted: int) -> ConfigError:
    """What is said where `checkpoint.resume` names an iteration that has no folder."""
    there = ", ".join(map(str, saved_iterations(checkpoints))) or "none"
    return ConfigError(f"checkpoint.resume ({wanted}): {checkpoints} holds no such iteration; there are: {there}")


def sweep(checkpoints: Path) -> list[str]:
    """Removes what a killed save left half-written; returns the names. Only the run's one leader calls it."""
    leftovers = sorted(checkpoints.glob(f"{TEMPORARY_PREFIX}*")) if checkpoints.is_dir() else []
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]


def swept_bytes(checkpoints: Path) -> int:
    """What `sweep` would make free."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # a run that is under way gives one its name meanwhile
        for path in checkpoints.glob(f"{TEMPORARY_PREFIX}*/**/*"):
            total += path.lstat().st_size
    return total


def remove(folder: Path) -> None:
    """Takes the name away first, so that a kill in between leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
