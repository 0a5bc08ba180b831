"""How a run ended: exit.json, which every process may write and whose cause outweighs what followed from it."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from megatron_xy.errors import (
    EXIT_BAD_CONFIG,
    EXIT_BAD_DATA,
    EXIT_BUG,
    EXIT_COMPARISON_FAILED,
    EXIT_DONE,
    EXIT_IO,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    EXIT_USAGE,
)
from megatron_xy.run_folder.files import now, read_standing_json
from megatron_xy.run_folder.locks import exit_lock, foreign_lock
from megatron_xy.run_folder.starts import current_attempt, this_start
from megatron_xy.storage import write_json

STAGGER_SECONDS = 2.0
EXIT_NAMES = {
    EXIT_DONE: "done",
    EXIT_COMPARISON_FAILED: "comparison_failed",
    EXIT_USAGE: "usage",
    EXIT_BAD_DATA: "bad_data",
    EXIT_BUG: "bug",
    EXIT_IO: "io",
    EXIT_STOPPED: "stopped",
    EXIT_PEER_LOST: "peer_lost",
    EXIT_BAD_CONFIG: "bad_config",
}


@dataclass(frozen=True)
class ExitRecord:
    """RUN/exit.json: how the run ended. `rank` is None where no rank could say so itself."""

    code: int
    name: str
    message: str
    rank: int | None
    host: str
    time: str
    attempt: int
    start: str  # which start of the run wrote it


def record_exit(
    run_dir: Path, *, code: int, message: str, rank: int | None, attempt: int | None = None, found: float | None = None
) -> ExitRecord | None:
    """Writes exit.json unless what stands there weighs as much; returns what stands then.

    Of several ranks the cause stands: an error of its own, over a lost peer, over a clean stop, over the end; the
    first of equals, which for one that took long to tell is that `found` (Unix seconds) first. What another start or
    attempt wrote weighs nothing; `attempt` is this process's own unless given.
    Where another start is at work in the folder nothing is written, and None returned.
    Not for a signal's handler: the record it interrupts may hold the lock that it would wait for.
    """
    record = ExitRecord(
        code=code,
        name=EXIT_NAMES[code],
        message=message,
        rank=rank,
        host=socket.gethostname(),
        time=now(),
        attempt=current_attempt() if attempt is None else attempt,
        start=this_start(),
    )
    if foreign_lock(run_dir) is not None:
        return None

    def standing() -> ExitRecord | None:
        other = read_exit(run_dir)
        if other is None or (other.start, other.attempt) != (record.start, record.attempt):
            return None
        is_first = found is None or _seconds(other.time) <= found
        return other if (_weight(other.code), is_first) >= (_weight(code), True) else None

    with exit_lock(run_dir, unless=standing) as stands:
        if stands := stands or standing():
            return stands
        write_json(run_dir / "exit.json", asdict(record))
        return record


def read_exit(run_dir: Path) -> ExitRecord | None:
    """How the run ended, as far as anyone has said. What other versions say besides is passed over."""
    values = read_standing_json(run_dir / "exit.json")
    if values is None:
        return None
    return ExitRecord(**{field.name: values[field.name] for field in fields(ExitRecord)})


def read_failure(run_dir: Path, *, began: float) -> ExitRecord | None:
    """The failure that a process of this start and attempt has recorded, neither the end nor a clean stop.

    began: the wall time at which this process did. What was recorded before may be an earlier torchrun's, at the same
    address and port: to miss a failure costs a time-out, to leave for a foreign one the run.
    """
    found = read_exit(run_dir)
    if found is None or (found.start, found.attempt) != (this_start(), current_attempt()):
        return None
    if _seconds(found.time) < int(began):  # records have whole seconds
        return None
    return None if found.code in (EXIT_DONE, EXIT_STOPPED) else found


def clear_exit(run_dir: Path, *, began: float | None = None) -> None:
    """Removes exit.json: before a start, by whoever starts the ranks, so that no rank's early end is lost.

    `began`, the wall time at which this process did, leaves what a rank of this very start has written since: for a
    rank 0 that nobody cleared it for. An earlier torchrun may have had the same address and port.
    """
    with exit_lock(run_dir):
        standing = read_exit(run_dir) if began is not None else None
        if standing is None or began is None or standing.start != this_start() or _is_before(standing, began):
            (run_dir / "exit.json").unlink(missing_ok=True)


def _is_before(record: ExitRecord, began: float) -> bool:
    """Ranks begin within seconds of each other; between two starts of torchrun lie more than these."""
    return _seconds(record.time) + STAGGER_SECONDS < began


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _weight(code: int) -> int:
    return {EXIT_DONE: 0, EXIT_STOPPED: 1, EXIT_PEER_LOST: 2}.get(code, 3)
