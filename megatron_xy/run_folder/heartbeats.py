"""How far every rank of a run is: each writes its own heartbeat, the supervisor and the other ranks read them."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xy.run_folder.files import read_json
from megatron_xy.run_folder.starts import current_attempt, this_start
from megatron_xy.storage import TEMPORARY_PREFIX, write_json


@dataclass(frozen=True)
class Beat:
    """RUN/heartbeats/rank-00000.json: where a rank was at `time` (Unix seconds)."""

    rank: int
    pid: int
    host: str
    start: str  # which start of the run it belongs to
    attempt: int
    iteration: int
    phase: str
    entered: int  # phases that it has entered
    entered_by_all: int  # of these such as all ranks of a job enter, in the same order
    time: float
    progress_time: float  # when something last went forward (Unix seconds)
    waits_for: str | None = None  # what of other ranks' doing its main thread waits for


def new_beat(
    *,
    rank: int,
    iteration: int,
    phase: str,
    entered: int = 0,
    entered_by_all: int = 0,
    progress_time: float | None = None,
    waits_for: str | None = None,
) -> Beat:
    """Where this process is now; something has just gone forward, unless `progress_time` says when it last did."""
    now = time.time()
    return Beat(
        rank=rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        start=this_start(),
        attempt=current_attempt(),
        iteration=iteration,
        phase=phase,
        entered=entered,
        entered_by_all=entered_by_all,
        time=now,
        progress_time=now if progress_time is None else progress_time,
        waits_for=waits_for,
    )


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Tells it to whoever reads the heartbeats; raises StorageError."""
    write_json(run_dir / "heartbeats" / _name(beat.rank), asdict(beat), durable=False)


def sweep_heartbeat(run_dir: Path, rank: int) -> None:
    """Removes what a kill has left of a heartbeat that this rank's process was writing, in an earlier start."""
    for path in (run_dir / "heartbeats").glob(f"{TEMPORARY_PREFIX}*-{_name(rank)}"):
        path.unlink(missing_ok=True)


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def read_heartbeats(run_dir: Path, *, start: str | None = None, attempt: int = 0) -> dict[int, Beat]:
    """{rank: last beat} of every rank that has told one; in one attempt of one start, if that is given."""
    found = {}
    for path in sorted((run_dir / "heartbeats").glob("rank-*.json")):
        try:
            values = read_json(path)
        except OSError:
            continue  # cleared meanwhile, by a start that just begins, or replaced while a file server was asked for it
        if values.keys() == Beat.__dataclass_fields__.keys():  # else another version's
            beat = Beat(**values)
            if start is None or (beat.start, beat.attempt) == (start, attempt):
                found[beat.rank] = beat
    return found


def clear_heartbeats(run_dir: Path, *, from_rank: int = 0) -> None:
    """Forgets the heartbeats of an earlier start, perhaps with more ranks: all, or those from a rank on."""
    for path in (run_dir / "heartbeats").iterdir():
        kind, _, number = path.stem.partition("-")  # rank-00000.json, rank-00000.stacks, answer-00000.json
        if kind in ("rank", "answer") and number.isdecimal() and int(number) >= from_rank:
            path.unlink(missing_ok=True)
    if from_rank == 0:
        (run_dir / "heartbeats" / "hang.json").unlink(missing_ok=True)
