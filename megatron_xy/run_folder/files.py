"""A run's folder is made, and what its small files have in common: JSON, and times with their zone."""

from __future__ import annotations

import errno
import fcntl
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.storage import take_lock

FOLDERS = ("logs", "checkpoints", "report", "heartbeats")


def prepare(run_dir: Path, *, key: str = "run_dir") -> None:
    """Makes `run_dir` and its folders, open to their owner only, or finds them there.

    key: as which the user knows the folder. Raises ConfigError, or StorageError where its disk is full or fails. A file
    is written, locked and removed again: permission bits tell neither of a read-only file system nor of one without
    locks.
    """
    with _refusals(run_dir, key=key):
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in FOLDERS:
            (run_dir / name).mkdir(mode=0o700, exist_ok=True)
        probe(run_dir)


def check_place(run_dir: Path) -> None:
    """Raises as `prepare` would, and makes nothing: the nearest folder that is there is tried."""
    with _refusals(run_dir, key="run_dir"):
        probe(next(folder for folder in (run_dir, *run_dir.parents) if folder.exists()))


@contextmanager
def _refusals(run_dir: Path, *, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise StorageError(f"{key} ({run_dir}) cannot be written: {error.strerror}; make room there") from None
        raise ConfigError(
            f"{key} ({run_dir}) must be a folder that can be made and written: {error.strerror}; choose another"
        ) from None


def probe(folder: Path) -> None:
    """Writes and locks a file in `folder`. Raises OSError, and ConfigError where its file system has no locks."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        take_lock(file.fileno(), fcntl.LOCK_EX, folder=folder)


def read_json(path: Path) -> Any:
    """What a file of the run holds. Raises DataError where it is no JSON; FileNotFoundError as it comes."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} must be JSON as the run wrote it: {error}; remove it") from None


def read_standing_json(path: Path) -> Any | None:
    """Likewise; None where there is no file, or a file server has just replaced or removed it."""
    try:
        return read_json(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return None


def now() -> str:
    """The time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
