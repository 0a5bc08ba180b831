"""safetensors files read and written part by part: memory holds a block, never a file and seldom a tensor.

Read by position instead of through a memory map, whose pages would count as this process's memory. What goes from one
file into another as it is, the kernel copies, as cp does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_xy.errors import DataError, StorageError
from megatron_xy.storage import read_error
from megatron_xy.tensors.dtypes import CODES, Bits, itemsize
from megatron_xy.tensors.shards import Placed

DTYPES = {code: dtype for dtype, code in CODES.items()}
BLOCK_BYTES = 2 << 20  # of memory at a time: stays in a core's cache between reading and writing
STRIDED_BYTES = 1 << 18  # of rows at a time, of which a part of the columns is copied
HASHED_BYTES = 1 << 18  # at a time
PART_BYTES = 8 << 20  # written between two looks at what is hashed and on its way to the disk
WRITE_BYTES = 1 << 20  # at a time, at multiples of it: faster than 8 MB on ext4 (docs/log.md)
BEHIND_BYTES = 1 << 27  # so much is written before it is on its way to the disk, and hashed
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH = struct.Struct("<Q")
# What copy_file_range answers where a kernel or a file system has none, or not from the one to the other.
_NOT_BY_THE_KERNEL = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM}


class FileRange(NamedTuple):
    """Bytes that lie in an open file one behind the other."""

    path: Path
    descriptor: int
    position: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * itemsize(self.dtype)


class SafetensorsFile:
    """One open file. Raises DataError where its header is not that of a whole safetensors file, StorageError, as do the
    methods that read, where the storage does not give it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            raise read_error(path, error) from None
        try:
            self.tensors = self._read_header()
        except OSError as error:
            self.close()
            raise read_error(path, error) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
            self.close()
            raise DataError(f"{path} is damaged: {error}; copy it again") from None

    def close(self) -> None:
        """Lets go of the file."""
        self._stream.close()

    def range(self, name: str, start: int = 0, stop: int | None = None) -> FileRange:
        """Where the elements [start, stop) of the flattened tensor lie, by default all of it."""
        stored = self.tensors[name]
        size = itemsize(stored.dtype)
        num_bytes = stored.num_bytes - start * size if stop is None else (stop - start) * size
        return FileRange(self.path, self._stream.fileno(), stored.start + start * size, num_bytes)

    def copy(self, name: str, place: Placed, target: Bits) -> None:
        """Copies the block `place` of the tensor into `target`, of its shape, straight or by way of a buffer."""
        stored = self.tensors[name]
        size = itemsize(stored.dtype)
        is_straight = place.inner.shape[1:] == place.outer.shape[1:] and target.flags.c_contiguous
        for rows, part in place.in_rows((BLOCK_BYTES if is_straight else STRIDED_BYTES) // size):
            row_numel = math.prod(part.outer.shape[1:])
            first = part.offset + (part.inner.start[0] - part.outer.start[0]) * row_numel
            if is_straight:
                self._fill(target[rows], stored.start + first * size)
            else:
                buffer = np.empty((rows.stop - rows.start, *part.outer.shape[1:]), target.dtype)
                self._fill(buffer, stored.start + first * size)
                target[rows] = buffer[(slice(None), *part.inner.slices_in(part.outer)[1:])]

    def _fill(self, array: Bits, position: int) -> None:
        rest = memory_of(array)
        while rest:
            try:
                count = os.preadv(self._stream.fileno(), [rest], position)
            except OSError as error:
                raise read_error(self.path, error) from None
            if count == 0:
                raise DataError(f"{self.path} is damaged: it ends at byte {position}; copy it again")
            rest, position = rest[count:], position + count

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._stream.fileno()).st_size
        (length,) = _LENGTH.unpack(self._stream.read(_LENGTH.size))
        if length > min(size - _LENGTH.size, MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {length} bytes, the file has {size}")
        header = json.loads(self._stream.read(length))
        header.pop("__metadata__", None)
        data = _LENGTH.size + length
        tensors, edge = {}, data
        for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            is_shape = all(type(number) is int and number >= 0 for number in facts["shape"])
            if facts["dtype"] not in DTYPES or not is_shape:
                raise ValueError(f"{name} is of type {facts['dtype']} and shape {facts['shape']}")
            stored = StoredTensor(DTYPES[facts["dtype"]], tuple(facts["shape"]), edge)
            start, stop = facts["data_offsets"]
            if (data + start, data + stop) != (edge, edge + stored.num_bytes):
                raise ValueError(f"{name} does not lie where its header says")
            tensors[name] = stored
            edge += stored.num_bytes
        if edge != size:
            raise ValueError(f"{size} bytes instead of {edge}")
        return tensors


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What the file's header says is in it. Raises as SafetensorsFile."""
    file = SafetensorsFile(path)
    file.close()
    return file.tensors


def write_safetensors(
    path: Path,
    layout: dict[str, tuple[str, tuple[int, ...]]],
    *,
    parts_of: Callable[[str], Iterable[Bits | FileRange]],
    metadata: dict[str, str],
    on_progress: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, Any]:
    """Writes one file, synced to disk; returns its {bytes, sha256}. Raises StorageError.

    layout: {name: (dtype, shape)}. parts_of: the tensor's contents, one part after the other: contiguous arrays, which
    may change once the next part is asked for, or ranges of other files. on_progress: called after each 8 MB or less,
    with the bytes written so far. The file is hashed while it is written, from what the system gives back.
    """
    try:
        return _write(path, _file_parts(layout, parts_of=parts_of, metadata=metadata), on_progress=on_progress)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}; make room or choose another folder") from error


def empty_block(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes whose memory goes back to the system with them: an allocator keeps what threads let go."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8) if num_bytes else np.empty(0, np.uint8)


def memory_of(array: Bits) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


class FollowingDigest:
    """SHA-256 of a file that is being written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.position = descriptor, 0
        self._buffer, self._digest = memoryview(bytearray(HASHED_BYTES)), hashlib.sha256()

    def reach(self, end: int) -> None:
        """Takes in what lies before `end`."""
        while self.position < end:
            count = os.preadv(self._descriptor, [self._buffer[: end - self.position]], self.position)
            assert count, "what was written can be read"
            self._digest.update(self._buffer[:count])
            self.position += count

    def hexdigest(self) -> str:
        """Of what was taken in."""
        return self._digest.hexdigest()


def _write(
    path: Path, parts: Iterator[memoryview | FileRange], *, on_progress: Callable[[int], object]
) -> dict[str, Any]:
    written = flushed = 0
    with path.open("w+b", buffering=0) as stream, ThreadPoolExecutor(2, thread_name_prefix="safetensors") as pool:
        file = stream.fileno()
        digest = FollowingDigest(file)
        hashing = flushing = pool.submit(digest.reach, 0)
        for part in parts:
            on_progress(written)
            written += _copy(part, file, written) if isinstance(part, FileRange) else _put(part, file, written)
            if hashing.done() or written - digest.position > BEHIND_BYTES:
                hashing.result()
                hashing = pool.submit(digest.reach, written)
            if flushing.done() and written - flushed > BEHIND_BYTES:
                flushing.result()
                flushing, flushed = pool.submit(os.fdatasync, file), written
        hashing.result()
        flushing.result()
        flushing = pool.submit(os.fsync, file)
        digest.reach(written)
        flushing.result()
        on_progress(written)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _put(part: memoryview, file: int, position: int) -> int:
    rest = part
    while rest:
        count = os.pwrite(file, rest[: WRITE_BYTES - position % WRITE_BYTES], position)
        rest, position = rest[count:], position + count
    return len(part)


def _copy(part: FileRange, file: int, position: int) -> int:
    """By the kernel, as far as it does; a file system may also answer that it has copied nothing."""
    done = 0
    try:
        while done < part.num_bytes:
            rest = part.num_bytes - done
            count = os.copy_file_range(part.descriptor, file, rest, part.position + done, position + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        if error.errno not in _NOT_BY_THE_KERNEL:
            raise
    while done < part.num_bytes:
        block = os.pread(part.descriptor, min(WRITE_BYTES, part.num_bytes - done), part.position + done)
        if not block:
            raise DataError(f"{part.path} is damaged: it ends at byte {part.position + done}; copy it again")
        done += _put(memoryview(block), file, position + done)
    return done


def _file_parts(
    layout: dict[str, tuple[str, tuple[int, ...]]],
    *,
    parts_of: Callable[[str], Iterable[Bits | FileRange]],
    metadata: dict[str, str],
) -> Iterator[memoryview | FileRange]:
    """The header's length, the header as JSON, the tensors one after the other.

    As the format asks: wider elements first, then by name, so that every tensor is aligned; the header padded with
    spaces to 8 bytes.
    """
    ordered = sorted(layout.items(), key=lambda item: (-itemsize(item[1][0]), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * itemsize(dtype)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield memoryview(_LENGTH.pack(len(encoded)) + encoded)
    for name, _ in ordered:
        for part in parts_of(name):
            num_bytes = part.num_bytes if isinstance(part, FileRange) else part.nbytes
            for start in range(0, num_bytes, PART_BYTES):
                stop = min(start + PART_BYTES, num_bytes)
                if isinstance(part, FileRange):
                    yield part._replace(position=part.position + start, num_bytes=stop - start)
                else:
                    yield memory_of(part)[start:stop]
