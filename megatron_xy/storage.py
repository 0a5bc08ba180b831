"""Writing to disk so that a file is there whole or not at all, even after a kill or a power cut; checksums; locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_xy.errors import ConfigError, DataError, StorageError

TEMPORARY_PREFIX = ".tmp-"
# Another try would meet these again: there is no file of that name, or none for this user.
_NO_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM,
)  # fmt: skip
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def temporary_name(name: str) -> str:
    """A name for what is to become file `name`, which no other process on any machine takes."""
    return f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{name}"


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replaces `path` by `text` in one step; `durable` also waits for the disk. Raises StorageError."""
    write_bytes(path, text.encode(), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replaces `path` by `content` in one step; `durable` also waits for the disk. Raises StorageError."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with storage_errors(path):
            temporary.write_bytes(content)
        replace(temporary, path, durable=durable)
    finally:
        with storage_errors(path):  # a read-only file system refuses this, too
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replaces `path` by `value` as JSON in one step; `durable` also waits for the disk. Raises StorageError."""
    write_text(path, json.dumps(value, indent=1) + "\n", durable=durable)


def without_non_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null; keys become text."""
    if isinstance(value, dict):
        return {str(key): without_non_finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Moves a closed file to its name; `durable` waits until file and name are on the disk. Raises StorageError."""
    with storage_errors(path):
        if durable:
            sync_file(temporary)
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Waits until the file's contents are on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Waits until the folder's names (new, moved, removed files) are on the disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the system says of a write to `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """What the file system answered, as an error with its exit code."""
    return StorageError(f"{path} cannot be written: {error.strerror or error}; make room or choose another folder")


def read_error(path: Path, error: OSError) -> DataError | StorageError:
    """What the file system answered to a read, as an error with its exit code.

    DataError where there is no file of that name; else StorageError: that says nothing of the file.
    """
    text = f"{path} cannot be read: {error.strerror or error}"
    return DataError(text) if is_no_file(error) else StorageError(f"{text}; try again once the storage answers")


def is_no_file(error: OSError) -> bool:
    """Whether the file system found no file of the name that was asked for, so that another try would find none."""
    return error.errno in _NO_FILE


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_sha256(path: Path, *, num_blocks: int = 16, block_bytes: int = 2**12) -> str:
    """Hex SHA-256 of a file's size and of blocks of it, the first and the last among them; of a small one, of all."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for number in range(num_blocks):
            stream.seek(max(0, size - block_bytes) * number // (num_blocks - 1))
            digest.update(stream.read(block_bytes))
    return digest.hexdigest()


def take_lock(descriptor: int, kind: int, *, folder: Path) -> bool:
    """Whether the kernel's lock (`kind`: LOCK_EX or LOCK_SH) on an open file of `folder` was free, and is now held.

    Raises ConfigError where the folder's file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"{folder} must be on a file system that has locks (flock): {error.strerror}; mount it with them (Lustre: "
            "-o flock; NFS: without nolock, its lock service running), or choose another folder"
        ) from None
    return True


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
