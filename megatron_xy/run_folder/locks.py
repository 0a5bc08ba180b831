"""Who is at work in a run's folder: one start at a time, on whatever machine.

The kernel's locks on files hold the folder, and tell those who are refused who has it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_xy.errors import ConfigError, StorageError
from megatron_xy.run_folder.files import now
from megatron_xy.run_folder.starts import this_start
from megatron_xy.storage import storage_errors, take_lock

TRAINING_LOCK = ".lock"  # taken by rank 0 of the training
SUPERVISOR_LOCK = ".supervisor.lock"  # taken by `megatron-xy run`

Found = TypeVar("Found")

PATIENCE_SECONDS = 1.0  # a holder that is just leaving, or has not yet written its name, is no reason to refuse
EXIT_LOCK_SECONDS = 10.0  # a record takes milliseconds; a process stopped within it must not hold the others up


class RunDirBusy(ConfigError):
    """Another start is at work in the run folder: this one may write nothing there, exit.json included."""


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
        if not _within_patience(lambda: take_lock(descriptor, fcntl.LOCK_EX, folder=run_dir)):
            raise _busy(run_dir, path)
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": now(), "start": this_start()})
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def told_by_holder(run_dir: Path) -> bytes | None:
    """What the training that holds `run_dir` wrote into its lock: another text at every start; None where none is."""
    try:
        return (run_dir / TRAINING_LOCK).read_bytes()
    except FileNotFoundError:
        return None


def refuse_if_busy(run_dir: Path) -> None:
    """Raises RunDirBusy where another start than this process's holds `run_dir`; for those who do not lock it."""
    if (path := foreign_lock(run_dir)) is not None:
        raise _busy(run_dir, path)


def foreign_lock(run_dir: Path) -> Path | None:
    """The lock of `run_dir` that another start holds; None where none does."""
    for path in (run_dir / SUPERVISOR_LOCK, run_dir / TRAINING_LOCK):
        if path.exists() and not _within_patience(partial(_is_free_or_ours, path)):
            return path
    return None


@contextmanager
def exit_lock(run_dir: Path, *, unless: Callable[[], Found | None] = lambda: None) -> Iterator[Found | None]:
    """Held by whoever looks how the run ends and then writes it, on any machine; raises StorageError after a while.

    Not held once `unless` finds something, which the block is given: a thousand ranks that end at once need not queue.
    """
    path = run_dir / ".exit.lock"
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    found: Found | None = None

    def is_found_or_held() -> bool:
        nonlocal found
        found = unless()
        return found is not None or take_lock(descriptor, fcntl.LOCK_EX, folder=run_dir)

    try:
        if not _within_patience(is_found_or_held, seconds=EXIT_LOCK_SECONDS):
            raise StorageError(f"{path} is held by a process that does not let go of it; end that one")
        yield found
    finally:
        os.close(descriptor)


def _is_free_or_ours(path: Path) -> bool:
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        is_free = take_lock(descriptor, fcntl.LOCK_SH, folder=path.parent)
        return is_free or _holder(path).get("start") == this_start()
    finally:
        os.close(descriptor)


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
