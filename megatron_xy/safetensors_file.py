"""safetensors files read and written part by part: memory holds a block, never a file and seldom a tensor.

Read by position instead of through a memory map, whose pages would count as this process's memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_xy.dtypes import CODES, Bits, bits_dtype, itemsize
from megatron_xy.errors import DataError, StorageError
from megatron_xy.shards import Placed

DTYPES = {code: dtype for dtype, code in CODES.items()}
BLOCK_BYTES = 8 << 20
WRITE_BYTES = 1 << 20  # at a time, at multiples of it: faster than 8 MB on ext4 (docs/log.md)
STRIDED_BYTES = 1 << 20  # of rows that are read to copy a part of their columns: stays in a core's cache
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH = struct.Struct("<Q")


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
    """One open file. Raises DataError where its header is not that of a whole safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror or error}") from None
        try:
            self.tensors = self._read_header()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
            self.close()
            raise DataError(f"{path} is damaged: {error}; copy it again") from None

    def close(self) -> None:
        """Lets go of the file."""
        self._stream.close()

    def read(self, name: str) -> Bits:
        """The tensor, whole. Raises DataError where the file has none of that name."""
        stored = self.tensors.get(name)
        if stored is None:
            raise DataError(f"{self.path} is damaged: it holds no {name}; copy it again")
        whole = np.empty(stored.shape, bits_dtype(stored.dtype))
        self._fill(whole, stored.start)
        return whole

    def copy(self, name: str, place: Placed, target: Bits) -> None:
        """Copies the block `place` of the tensor into `target`, of its shape, straight or by way of a buffer."""
        stored = self.tensors[name]
        size = itemsize(stored.dtype)
        target = target.reshape(place.inner.with_rows().shape)  # a view: only a scalar's shape changes
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
            count = os.preadv(self._stream.fileno(), [rest], position)
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


def write_safetensors(
    path: Path,
    layout: dict[str, tuple[str, tuple[int, ...]]],
    *,
    blocks_of: Callable[[str], Iterable[Bits]],
    metadata: dict[str, str],
    on_progress: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, Any]:
    """Writes one file, synced to disk; returns its {bytes, sha256}. Raises StorageError.

    layout: {name: (dtype, shape)}. blocks_of: the tensor's contents as contiguous blocks, one after the other; hashed
    and written beside the reading of the next block. on_progress: called after each block with the bytes so far.
    """
    try:
        return _write(path, _file_blocks(layout, blocks_of=blocks_of, metadata=metadata), on_progress=on_progress)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}; make room or choose another folder") from error


def empty_block(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes whose memory goes back to the system with them: an allocator keeps what threads let go."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8) if num_bytes else np.empty(0, np.uint8)


def memory_of(array: Bits) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _write(path: Path, blocks: Iterator[memoryview], *, on_progress: Callable[[int], object]) -> dict[str, Any]:
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as stream, ThreadPoolExecutor(2, thread_name_prefix="safetensors") as pool:

        def write(block: memoryview) -> None:
            while block:
                place = stream.tell()
                count = stream.write(block[: WRITE_BYTES - place % WRITE_BYTES])
                block = block[count:]
                if (end := place + count) % WRITE_BYTES == 0:
                    # On its way to the disk at once, so that little is left for fsync: the system starts to write what
                    # it is to forget, and forgets only what is written.
                    os.posix_fadvise(stream.fileno(), end - WRITE_BYTES, WRITE_BYTES, os.POSIX_FADV_DONTNEED)

        under_way: list[Future[None]] = []
        for block in blocks:
            for work in under_way:
                work.result()
            on_progress(written)
            under_way = [pool.submit(digest.update, block), pool.submit(write, block)]
            written += len(block)
        for work in under_way:
            work.result()
        os.fsync(stream.fileno())
        on_progress(written)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _file_blocks(
    layout: dict[str, tuple[str, tuple[int, ...]]],
    *,
    blocks_of: Callable[[str], Iterable[Bits]],
    metadata: dict[str, str],
) -> Iterator[memoryview]:
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
        for block in blocks_of(name):
            whole = memory_of(block)
            for start in range(0, len(whole), BLOCK_BYTES):
                yield whole[start : start + BLOCK_BYTES]
