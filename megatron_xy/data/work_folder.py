"""The folder of an unfinished build: who works in it, and for which data set.

Its lock is the kernel's, so it goes with its holder, however that ends. One build holds it alone; the shares of a build
over several machines hold it together while they tokenise, and the one that finishes holds it alone again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_xy.errors import ConfigError
from megatron_xy.storage import storage_errors, write_text

WORK_FOLDER = ".tmp-tokens"


class WorkFolderBusy(ConfigError):
    """Another process works in the folder."""


@contextmanager
def work_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """The work folder of `folder`, for this process alone; what another build left there is cleared away.

    Raises WorkFolderBusy where another process works there.
    """
    with _opened(folder) as (work, lock):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkFolderBusy(f"output ({folder}): another build is writing it; wait for it, or stop it") from error
        _make_ready(folder, work, fingerprint)
        yield work


@contextmanager
def shared_work_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """The same for one of several shares of one build, together with the others.

    Raises ConfigError where what works there is a build of another data set, or one that has no shares.
    """
    with _opened(folder) as (work, lock):
        try:  # the first one makes it ready
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _make_ready(folder, work, fingerprint)
        except BlockingIOError:
            pass
        fcntl.flock(lock, fcntl.LOCK_SH)
        if (work / "fingerprint").read_text(encoding="utf-8") != fingerprint:
            raise ConfigError(f"output ({folder}): a build of other inputs or options is at work there; name another")
        yield work


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Path, TextIO]]:
    work = folder / WORK_FOLDER
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w", encoding="utf-8")
    with lock:
        yield work, lock


def _make_ready(folder: Path, work: Path, fingerprint: str) -> None:
    mark = work / "fingerprint"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint:
        _clear(folder, work)
        write_text(mark, fingerprint)
    (work / "packed").mkdir(exist_ok=True)


def _clear(folder: Path, work: Path) -> None:
    """Remove another build's leavings: its work, and the sources that it had already moved to their place."""
    moved = work / "publish.json"
    names = json.loads(moved.read_text(encoding="utf-8")) if moved.is_file() else []
    for path in [
        *(folder / name for name in names),
        *(work / name for name in ("hashes", "duplicates", "tokens", "packed")),
    ]:
        if path.exists():
            shutil.rmtree(path)
    moved.unlink(missing_ok=True)
