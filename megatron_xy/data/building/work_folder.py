"""The folder of an unfinished build: for which data set it is, and that nobody clears it under those who work in it.

Its lock is the kernel's, so it goes with its holders, however they end. All builds of one data set hold it together;
who finds it free may clear away what a build of another data set left.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_xy.data.building.claims import CLAIMS_FOLDER
from megatron_xy.data.manifest import MANIFEST_NAME
from megatron_xy.errors import ConfigError
from megatron_xy.storage import TEMPORARY_PREFIX, storage_errors, take_lock, write_text

WORK_FOLDER = ".tmp-tokens"


@contextmanager
def work_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """The work folder of `folder`, shared with all builds of the same data set; what a build of another one left there
    is cleared away first.

    Raises ConfigError where a build of another data set works there, or one has finished meanwhile.
    """
    with _opened(folder) as (work, lock):
        if take_lock(lock.fileno(), fcntl.LOCK_EX, folder=folder):  # the first one makes it ready
            _refuse_finished(folder)
            _make_ready(folder, work, fingerprint)
        fcntl.flock(lock, fcntl.LOCK_SH)
        _refuse_finished(folder)
        if (work / "fingerprint").read_text(encoding="utf-8") != fingerprint:
            raise ConfigError(f"output ({folder}): a build of other inputs or options is at work there; name another")
        yield work


def sweep(folder: Path) -> None:
    """Remove what killed writers left half-written below `folder`."""
    with storage_errors(folder):
        for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
            path.unlink()


def _refuse_finished(folder: Path) -> None:
    """Asked under the lock: who finishes a folder writes its manifest, and only then clears away lock and work."""
    if (folder / MANIFEST_NAME).is_file():
        raise ConfigError(f"output ({folder}): another build has finished it meanwhile; name another")


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
    for name in ("packed", CLAIMS_FOLDER):
        (work / name).mkdir(exist_ok=True)


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
