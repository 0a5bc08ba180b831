"""The checkpoints of a run that are asked: whole ones, and of a PPO run the actor's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.folders import iteration_folder, saved_iterations
from megatron_xy.errors import ConfigError, DataError

ACTOR = "actor"


def newest_checkpoint(run_dir: Path, *, say: Callable[[str], None]) -> Path:
    """The folder of the newest whole one; says which are passed over.

    Raises ConfigError where there is none or the run is one of reward models, DataError where none is whole.
    """
    checkpoints = run_dir / "checkpoints"
    found = saved_iterations(checkpoints)
    if not found:
        raise ConfigError(f"{run_dir}: there is no run with a checkpoint; name a run_dir, or ckpt:DIR or hf:DIR")
    for iteration in found:
        folder = asked_folder(run_dir, iteration)
        try:
            check_whole(folder, run_dir=run_dir)
        except DataError as error:
            say(f"iteration {iteration} is passed over: {error}")
        else:
            say(f"iteration {iteration}: evaluating")
            return folder
    raise DataError(f"no checkpoint in {checkpoints} is whole; restore one")


def asked_folder(run_dir: Path, iteration: int) -> Path:
    """Where the weights of an iteration lie that are asked."""
    folder = iteration_folder(run_dir / "checkpoints", iteration)
    return folder / ACTOR if (folder / ACTOR).is_dir() else folder


def check_whole(folder: Path, *, run_dir: Path) -> None:
    """Compares all checksums. Raises DataError, and ConfigError where `run_dir` is one of reward models."""
    manifest = files.read_manifest(folder)
    if manifest.state.get("task") == "reward":
        raise ConfigError(f"{run_dir}: is a run of reward models, which answer no questions; `score` asks them")
    files.verify_files(folder, manifest, files=sorted(manifest.files))
