"""Which checkpoint a run goes on from: the newest valid one, or the one it names, verified by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_xy import device
from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.folders import iteration_folder, no_such_iteration, saved_iterations
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.parallel import Groups, joined_over, sum_over


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
    (ConfigError) and whole (DataError). Where checkpoints exist and none is whole: DataError, never from scratch.
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
    size = 64
    seen = torch.zeros(size, dtype=torch.int64)
    found = saved_iterations(checkpoints)
    if wanted is not None:
        found = [wanted] if wanted in found else []
    if groups.role_rank == 0:
        for place, iteration in enumerate(found[:size]):
            seen[place] = iteration + 1
    agreed = sum_over(seen.to(device.current()), groups.all_ranks).tolist()
    candidates = [int(value) - 1 for value in agreed if value]
    if wanted is not None and not candidates:
        raise no_such_iteration(checkpoints, wanted)
    return candidates


def shared_problem(folder: Path, groups: Groups) -> str | None:
    """Verifies a checkpoint, each rank its share of the files; all get the first finding. None: it is whole."""
    problem = None
    try:
        manifest = files.read_manifest(folder)
        files.verify_files(folder, manifest, files=sorted(manifest.files)[groups.role_rank :: len(groups.ranks)])
        if groups.role_rank == 0:
            files.verify_coverage(folder, manifest)
    except (ConfigError, DataError) as error:
        problem = str(error)
    size = 1024  # bytes of the message, for a tensor of one shape on all ranks
    text = (problem or "").encode()[:size].ljust(size, b"\0")
    told = joined_over(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device.current()), groups.all_ranks)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in told.reshape(-1, size).tolist()]
    return next((text for text in texts if text), None)
