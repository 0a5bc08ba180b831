"""The folder of one run and its small files: who runs in it, how far every rank is, how the run ended, on what it ran.

Ranks write heartbeats, rank 0 writes env.json, every process may write exit.json; the supervisor and `report` read
them. Each file is JSON and is replaced as a whole, so that a reader never meets half of one. Nobody writes while
another start of a run holds the folder.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

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
    ConfigError,
    DataError,
    StorageError,
)
from megatron_xy.orphans import SUPERVISOR_VARIABLE
from megatron_xy.storage import storage_errors, write_json

FOLDERS = ("logs", "checkpoints", "report", "heartbeats")
TRAINING_LOCK = ".lock"  # taken by rank 0 of the training
SUPERVISOR_LOCK = ".supervisor.lock"  # taken by `megatron-xy run`
COURSE = "course.json"
ATTEMPT_VARIABLE = "MEGATRON_XY_ATTEMPT"  # set by the supervisor: 0, then 1 for the first restart
PATIENCE_SECONDS = 1.0  # a holder that is just leaving, or has not yet written its name, is no reason to refuse
EXIT_LOCK_SECONDS = 10.0  # a record takes milliseconds; a process stopped within it must not hold the others up

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

# Whose versions decide what a run computes, or how it is read afterwards.
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "numpy",
    "safetensors",
    "sentencepiece",
    "transformers",
    "pydantic",
    "tensorboard",
)


class RunDirBusy(ConfigError):
    """Another start is at work in the run folder: this one may write nothing there, exit.json included."""


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
    entered: int  # phases that it has entered; all ranks of a job enter the same ones, in the same order
    time: float
    progress_time: float  # when something last went forward (Unix seconds)
    waits_for: str | None = None  # what of other ranks' doing its main thread waits for


def prepare(run_dir: Path) -> None:
    """Makes `run_dir` and its folders, open to their owner only, or finds them there; raises ConfigError if it cannot.

    A file is written and removed again: neither permission bits nor root's rights tell of a read-only file system.
    """
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in FOLDERS:
            (run_dir / name).mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as probe:
            probe.write(b"x")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise StorageError(f"run_dir ({run_dir}) cannot be written: {error.strerror}; make room there") from None
        raise ConfigError(
            f"run_dir ({run_dir}) must be a folder that can be made and written: {error.strerror}; choose another"
        ) from None


@contextmanager
def lock(run_dir: Path, *, name: str = TRAINING_LOCK) -> Iterator[None]:
    """Holds `run_dir` for this process; raises RunDirBusy where another one holds it.

    The kernel drops the lock with its holder, however that ends. Programs started meanwhile do not inherit it; a forked
    Python process does, and keeps it for as long as it lives.
    """
    path = run_dir / name
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _within_patience(lambda: _flock(descriptor, fcntl.LOCK_EX)):
            raise _busy(run_dir, path)
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": _now(), "start": this_start()})
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def refuse_if_busy(run_dir: Path) -> None:
    """Raises RunDirBusy where another start than this process's holds `run_dir`; for those who do not lock it."""
    if (path := _foreign_lock(run_dir)) is not None:
        raise _busy(run_dir, path)


def new_beat(
    *,
    rank: int,
    iteration: int,
    phase: str,
    entered: int = 0,
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
        time=now,
        progress_time=now if progress_time is None else progress_time,
        waits_for=waits_for,
    )


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Tells it to whoever reads the heartbeats; raises StorageError."""
    write_json(run_dir / "heartbeats" / f"rank-{beat.rank:05d}.json", asdict(beat), durable=False)


def read_heartbeats(run_dir: Path, *, start: str | None = None, attempt: int = 0) -> dict[int, Beat]:
    """{rank: last beat} of every rank that has told one; in one attempt of one start, if that is given."""
    found = {}
    for path in sorted((run_dir / "heartbeats").glob("rank-*.json")):
        try:
            values = _read_json(path)
        except FileNotFoundError:
            continue  # cleared meanwhile, by a start that just begins
        if values.keys() == Beat.__dataclass_fields__.keys():  # else another version's
            beat = Beat(**values)
            if start is None or (beat.start, beat.attempt) == (start, attempt):
                found[beat.rank] = beat
    return found


def clear_heartbeats(run_dir: Path, *, from_rank: int = 0) -> None:
    """Forgets the heartbeats of an earlier start, perhaps with more ranks: all, or those from a rank on."""
    for path in (run_dir / "heartbeats").iterdir():
        kind, _, number = path.stem.partition("-")  # rank-00000.json, rank-00000.stacks, answer-00000.json
        if kind in ("rank", "answer") and number.isdigit() and int(number) >= from_rank:
            path.unlink(missing_ok=True)
    if from_rank == 0:
        (run_dir / "heartbeats" / "hang.json").unlink(missing_ok=True)


def record_exit(
    run_dir: Path, *, code: int, message: str, rank: int | None, attempt: int | None = None
) -> ExitRecord | None:
    """Writes exit.json unless what stands there weighs as much; returns what stands then.

    Of several ranks the cause stands: an error of its own, over a lost peer, over a clean stop, over the end; the
    first of equals. What another start or attempt wrote weighs nothing; `attempt` is this process's own unless given.
    Where another start is at work in the folder nothing is written, and None returned.
    Not for a signal's handler: the record it interrupts may hold the lock that it would wait for.
    """
    record = ExitRecord(
        code=code,
        name=EXIT_NAMES[code],
        message=message,
        rank=rank,
        host=socket.gethostname(),
        time=_now(),
        attempt=current_attempt() if attempt is None else attempt,
        start=this_start(),
    )
    if _foreign_lock(run_dir) is not None:
        return None
    with exit_lock(run_dir):
        standing = read_exit(run_dir)
        is_ours = standing is not None and (standing.start, standing.attempt) == (record.start, record.attempt)
        if standing and is_ours and _weight(standing.code) >= _weight(code):
            return standing
        write_json(run_dir / "exit.json", asdict(record))
        return record


def read_exit(run_dir: Path) -> ExitRecord | None:
    """How the run ended, as far as anyone has said."""
    try:
        return ExitRecord(**_read_json(run_dir / "exit.json"))
    except FileNotFoundError:
        return None


def clear_exit(run_dir: Path, *, of_others_only: bool = False) -> None:
    """Removes exit.json: before a start, by whoever starts the ranks, so that no rank's early end is lost.

    `of_others_only` leaves what a rank of this very start wrote: for a rank 0 that nobody cleared it for.
    """
    with exit_lock(run_dir):
        standing = read_exit(run_dir) if of_others_only else None
        if standing is None or standing.start != this_start():
            (run_dir / "exit.json").unlink(missing_ok=True)


def write_env(run_dir: Path, *, extra: Mapping[str, Any]) -> None:
    """Writes env.json: what the run ran on, and `extra` (JSON values) beside it."""
    environment = {
        "time": _now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "python": sys.version.split()[0],
        "packages": _package_versions(),
        "git_revision": _git_revision(),
        "argv": sys.argv,
        "attempt": current_attempt(),
    }
    write_json(run_dir / "env.json", {**environment, **extra})


def current_attempt() -> int:
    """Which try of its start this process belongs to: 0, then 1 for the supervisor's first restart."""
    return int(os.environ.get(ATTEMPT_VARIABLE, "0"))


def _weight(code: int) -> int:
    return {EXIT_DONE: 0, EXIT_STOPPED: 1, EXIT_PEER_LOST: 2}.get(code, 3)


def read_start(run_dir: Path) -> str | None:
    """Which start last began, or went on with, the course of checkpoints in `run_dir`."""
    try:
        return str(_read_json(run_dir / COURSE)["start"])
    except FileNotFoundError:
        return None


def write_start(run_dir: Path) -> None:
    """Says that it is this start. One rank calls it."""
    write_json(run_dir / COURSE, {"start": this_start(), "time": _now()})


def this_start() -> str:
    """One word for all processes of one start: a supervisor with its ranks, a bare torchrun's ranks, or this alone."""
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None and "RANK" in os.environ:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"  # of which there is one at a time
    return f"{socket.gethostname()}:pid {supervisor or os.getpid()}"


def _foreign_lock(run_dir: Path) -> Path | None:
    """The lock of `run_dir` that another start holds; None where none does."""
    for path in (run_dir / SUPERVISOR_LOCK, run_dir / TRAINING_LOCK):
        if path.exists() and not _within_patience(partial(_is_free_or_ours, path)):
            return path
    return None


def _is_free_or_ours(path: Path) -> bool:
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _flock(descriptor, fcntl.LOCK_SH) or _holder(path).get("start") == this_start()
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _within_patience(holds: Callable[[], bool], *, seconds: float = PATIENCE_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def _holder(path: Path) -> dict[str, Any]:
    """What the lock's holder wrote into it; empty between its lock and its name."""
    text = path.read_text(encoding="utf-8")
    return dict(json.loads(text)) if text else {}


def _busy(run_dir: Path, path: Path) -> RunDirBusy:
    holder = _holder(path)
    who = f"pid {holder['pid']}, host {holder['host']}, since {holder['time']}" if holder else "it has just begun"
    return RunDirBusy(f"another run is active in {run_dir} ({who}); wait for it, stop it, or choose another run_dir")


@contextmanager
def exit_lock(run_dir: Path) -> Iterator[None]:
    """Held by whoever looks how the run ends and then writes it, on any machine; raises StorageError after a while."""
    path = run_dir / ".exit.lock"
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _within_patience(lambda: _flock(descriptor, fcntl.LOCK_EX), seconds=EXIT_LOCK_SECONDS):
            raise StorageError(f"{path} is held by a process that does not let go of it; end that one")
        yield
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} must be JSON as the run wrote it: {error}; remove it") from None


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return versions


def _git_revision() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():  # an installed package may lie inside somebody else's checkout
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
