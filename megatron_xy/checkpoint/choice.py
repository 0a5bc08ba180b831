"""Which checkpoint a run goes on from: the newest valid one, or the one it names, verified by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.folders import iteration_folder, no_such_iteration, saved_iterations
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.parallel import Groups, gathered_values


def find_resumable(
    checkpoints: Path,
    groups: Groups,
    *,
    resume: str | int,
    say: Callable[[str], None],
    parts: Sequence[str] = ("",),
) -> tuple[Path, files.Manifest] | None:
    """The checkpoint to go on from, verified by all ranks together; None where a run starts afresh. Collective.

    parts: the roles' folders in it; the manifest is the first one's.

    `auto` takes the newest valid one and says which were passed over; a number names one, which must be there
    (ConfigError) and whole (DataError). Where checkpoints exist and none is whole: DataError, never from scratch. Where
    the storage does not tell: StorageError, never from an older one.
    """
    if resume == "never":
        return None
    wanted = None if resume == "auto" else int(resume)
    damaged = []
    for iteration in _agreed_candidates(checkpoints, groups, wanted=wanted):
        folder = iteration_folder(checkpoints, iteration)
        problem = next((found for part in parts if (found := shared_problem(folder / part, groups))), None)
        if problem is None:
            return folder, files.read_manifest(folder / parts[0])
        if wanted is not None:
            raise DataError(
                f"{problem}; checkpoint.resume names iteration {wanted}: use `auto` for the newest valid one"
            )
        say(f"checkpoint {folder.name} is passed over: {problem}")
        damaged.append(problem)
    if damaged:
        raise DataError(
            f"no checkpoint in {checkpoints} is whole ({damaged[0]}); restore one, choose another run_dir, or start "
            f"afresh with checkpoint.resume=never"
        )
    return None


def _agreed_candidates(checkpoints: Path, groups: Groups, *, wanted: int | None) -> list[int]:
    """The leader's view of the folder, on all ranks: a shared file system may show them different ones."""
    candidates: list[int] = gathered_values(saved_iterations(checkpoints), groups.all_ranks)[0]
    if wanted is None:
        return candidates
    if wanted not in candidates:
        raise no_such_iteration(checkpoints, wanted)
    return [wanted]


def shared_problem(folder: Path, groups: Groups) -> str | None:
    """Verifies a checkpoint, each rank its share of the files; all get the first finding. None: it is whole.

    Raises StorageError, on all ranks alike, where a rank cannot read its share and none finds damage.
    """
    problem = unread = None
    try:
        manifest = files.read_manifest(folder)
        files.verify_files(folder, manifest, files=sorted(manifest.files)[groups.role_rank :: len(groups.ranks)])
        if groups.role_rank == 0:
            files.verify_coverage(folder, manifest)
    except (ConfigError, DataError) as error:
        problem = str(error)
    except (StorageError, OSError) as error:
        unread = str(error)
    problems, unreads = zip(*gathered_values([problem, unread], groups.all_ranks), strict=True)
    if any(unreads) and not any(problems):
        raise StorageError(next(filter(None, unreads)))
    return next(filter(None, problems), None)
