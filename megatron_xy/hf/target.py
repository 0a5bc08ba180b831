"""A folder that is there whole or not at all, and that a killed command goes on with where it stopped.

Its files are written into .tmp-NAME beside it; of each weight file that is done a receipt tells size and checksum. Once
all is there, the receipts go and the folder gets its name. It keeps a digest of the work, by which the same command
knows what it has finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.data.building.claims import claim
from megatron_xy.errors import ConfigError, StorageError
from megatron_xy.hf.source import Source
from megatron_xy.runtime.liveness import went_forward
from megatron_xy.storage import TEMPORARY_PREFIX, storage_errors, sync_file, sync_folder, temporary_name, write_json
from megatron_xy.tensors.block_reader import BlockReader
from megatron_xy.tensors.dtypes import Bits, itemsize
from megatron_xy.tensors.safetensors_file import FileRange, write_safetensors
from megatron_xy.tensors.shards import ParameterShard

MAX_WRITERS = 8  # files at a time; each takes some blocks of memory and up to three threads
_WORK = "conversion.json"
_FINISHED = ".conversion.json"
_RECEIPT = ".receipt.json"


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its name in the file, and the part of which global tensor it is."""

    name: str
    tensor: str
    shard: ParameterShard
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.shard.numel * itemsize(self.dtype)


class AlreadyWritten(ConfigError):
    """The target is there, and it is what the same command has finished before."""


@contextmanager
def whole_or_absent(target: Path, *, work: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder beside `target` that gets its name once the block is done.

    work: says exactly what is to be written. What a killed command with the same one has done is still there; an error
    inside leaves nothing. Raises AlreadyWritten where the target is that of the same work, ConfigError where it is
    another or another command is at it, StorageError.
    """
    finished = {"work_sha256": hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()}
    _refuse_existing(target, finished=finished)
    folder = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    with storage_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
    with claim(folder / _WORK) as is_ours:
        if not is_ours:
            raise ConfigError(f"{target}: another command is writing it at this moment; wait for it")
        if target.exists():  # it ended between the two looks, and its folder's name was free
            shutil.rmtree(folder, ignore_errors=True)
            _refuse_existing(target, finished=finished)
        _clear(folder, keep_receipts=_told(folder / _WORK) == work)
        with storage_errors(target):
            (folder / _WORK).write_text(json.dumps(work), encoding="utf-8")  # in place: its lock is ours
        try:
            yield folder
            with storage_errors(target):
                _publish(folder, target, finished=finished)
        except Exception:  # an interrupt is as a kill: what is done stays
            shutil.rmtree(folder, ignore_errors=True)
            raise


def sweep_unfinished(parent: Path, *, but: str) -> list[str]:
    """Removes what killed exports left of PARENT/iter_N, but of one that is named; returns the names."""
    swept = []
    for folder in sorted(parent.glob(f"{TEMPORARY_PREFIX}iter_*")):
        if folder.name == f"{TEMPORARY_PREFIX}{but}":
            continue
        with claim(folder / _WORK) as is_ours:
            if is_ours:
                shutil.rmtree(folder, ignore_errors=True)
                swept.append(folder.name)
        if is_ours:  # a network file system keeps what was open
            shutil.rmtree(folder, ignore_errors=True)
    return swept


def plan_files(outputs: Sequence[Output], *, max_bytes: int) -> list[list[Output]]:
    """The outputs in files of at most `max_bytes`, but for a larger single one, in their order."""
    files: list[list[Output]] = [[]]
    for output in outputs:
        if files[-1] and sum(other.num_bytes for other in files[-1]) + output.num_bytes > max_bytes:
            files.append([])
        files[-1].append(output)
    return files


def write_files(
    folder: Path,
    files: dict[str, list[Output]],
    *,
    source: Source,
    metadata: dict[str, str],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Writes safetensors files out of the source's pieces, some at a time; returns {file: {bytes, sha256}}."""

    def write(path: Path, outputs: list[Output]) -> dict[str, Any]:
        by_name = {output.name: output for output in outputs}
        with BlockReader(source.folder, source.manifest) as reader:

            def parts_of(name: str) -> Iterable[Bits | FileRange]:
                output = by_name[name]
                return reader.parts(output.tensor, output.shard, dtype=output.dtype)

            return write_safetensors(
                path,
                {output.name: (output.dtype, output.shard.local_shape) for output in outputs},
                parts_of=parts_of,
                metadata=metadata,
                on_progress=lambda num_bytes: went_forward(),  # a run's own export is a part of its save
            )

    return finish_files(folder, files, write=write, num_writers=MAX_WRITERS, say=say)


def finish_files(
    folder: Path,
    files: dict[str, list[Output]],
    *,
    write: Callable[[Path, list[Output]], dict[str, Any]],
    num_writers: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Has each file written under a temporary name and given its own; returns {file: {bytes, sha256}}, as `write` says.

    Files that an earlier command has done are left as they are.
    """
    total = sum(output.num_bytes for outputs in files.values() for output in outputs)
    progress = _Progress(total, say)

    def finish(item: tuple[str, list[Output]]) -> tuple[str, dict[str, Any]]:
        file, outputs = item
        path, receipt = folder / file, folder / f"{file}{_RECEIPT}"
        facts = _told(receipt)
        if facts is None or not path.is_file() or path.stat().st_size != facts["bytes"]:
            temporary = path.with_name(temporary_name(file))
            facts = write(temporary, outputs)
            with storage_errors(path):
                temporary.replace(path)
            write_json(receipt, facts)
        progress.add(sum(output.num_bytes for output in outputs))
        return file, facts

    with ThreadPoolExecutor(min(num_writers, os.cpu_count() or 1)) as pool:
        try:
            return dict(pool.map(finish, files.items()))
        except Exception:
            raise
        except BaseException:  # a signal
            say("stopping once the files that are being written are done; a second signal stops at once")
            raise


class _Progress:
    """Says how far a long conversion is, at each tenth."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.done, self.tenths, self.say = max(total, 1), 0, 0, say
        self.lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.done += num_bytes
            tenths = 10 * self.done // self.total
            if self.tenths < tenths < 10 and self.total > 10**9:
                self.say(f"{self.done / 1e9:,.1f} of {self.total / 1e9:,.1f} GB written")
            self.tenths = tenths


def _told(path: Path) -> dict[str, Any] | None:
    """The object in the file; None where a killed command left none, or not all of it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _clear(folder: Path, *, keep_receipts: bool) -> None:
    """Removes what a killed command left, but for files with a receipt where these are kept."""
    found = (path.name for path in folder.glob(f"*{_RECEIPT}"))
    receipts = {name for name in found if keep_receipts and not name.startswith(TEMPORARY_PREFIX)}
    kept = {_WORK, *receipts, *(name.removesuffix(_RECEIPT) for name in receipts)}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def _refuse_existing(target: Path, *, finished: dict[str, str]) -> None:
    """Raises AlreadyWritten or ConfigError where the target is there."""
    if not target.exists():
        return
    if _told(target / _FINISHED) == finished:
        with storage_errors(target):
            (target / _WORK).unlink(missing_ok=True)  # of a command that was killed in its last step
        raise AlreadyWritten(f"{target} exists, written by this command; remove it to write it anew")
    raise ConfigError(f"{target} exists; name a folder that does not, or remove it")


def _publish(folder: Path, target: Path, *, finished: dict[str, str]) -> None:
    """Gives the folder its name; the claim goes last, or another command would clear the folder meanwhile."""
    write_json(folder / _FINISHED, finished)
    for path in folder.iterdir():
        sync_file(path)
    for receipt in folder.glob(f"*{_RECEIPT}"):
        receipt.unlink()
    sync_folder(folder)
    if target.exists():
        raise StorageError(f"{target} has come into being meanwhile; remove it, and give the command again")
    folder.rename(target)
    sync_folder(target.parent)
    (target / _WORK).unlink(missing_ok=True)
    sync_folder(target)
