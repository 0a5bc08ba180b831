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

import torch

from megatron_xy.errors import DataError, StorageError
from megatron_xy.shards import Placed

CODES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
BLOCK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


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

    def read(self, name: str) -> torch.Tensor:
        """The tensor, whole. Raises DataError where the file has none of that name."""
        stored = self.tensors.get(name)
        if stored is None:
            raise DataError(f"{self.path} is damaged: it holds no {name}; copy it again")
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self._fill(whole, stored.start)
        return whole

    def copy(self, name: str, place: Placed, target: torch.Tensor) -> None:
        """Copies the block `place` of the tensor into `target`, of the block's shape and any dtype, blockwise."""
        stored = self.tensors[name]
        inner, outer = place.inner.with_rows(), place.outer.with_rows()
        target = target.detach().view(inner.shape) if target.dim() == 0 else target.detach()
        row_numel = math.prod(outer.shape[1:])
        row_bytes = row_numel * stored.dtype.itemsize
        first = stored.start + place.offset * stored.dtype.itemsize + (inner.start[0] - outer.start[0]) * row_bytes
        columns = inner.slices_in(outer)[1:]
        is_whole_width = inner.shape[1:] == outer.shape[1:]
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for row in range(0, inner.shape[0], step):
            part = target[row : row + step]
            position = first + row * row_bytes
            if is_whole_width and part.dtype == stored.dtype and part.is_cpu and part.is_contiguous():
                self._fill(part, position)
            else:
                block = empty_block((part.shape[0], *outer.shape[1:]), stored.dtype)
                self._fill(block, position)
                part.copy_(block[(slice(None), *columns)])

    def _fill(self, tensor: torch.Tensor, position: int) -> None:
        rest = memory_of(tensor)
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
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    *,
    blocks_of: Callable[[str], Iterable[torch.Tensor]],
    metadata: dict[str, str],
    on_progress: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, Any]:
    """Writes one file, synced to disk; returns its {bytes, sha256}. Raises StorageError.

    blocks_of: the tensor's contents as blocks on the CPU, contiguous, one after the other. Hashed and written beside
    the reading of the next block. on_progress: called after each block with the bytes written so far.
    """
    try:
        return _write(path, _file_blocks(layout, blocks_of=blocks_of, metadata=metadata), on_progress=on_progress)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}; make room or choose another folder") from error


def empty_block(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor whose memory goes back to the system with it: an allocator keeps what threads let go."""
    numel = math.prod(shape)
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype).view(shape)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, blocks: Iterator[memoryview], *, on_progress: Callable[[int], object]) -> dict[str, Any]:
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as stream, ThreadPoolExecutor(2, thread_name_prefix="safetensors") as pool:

        def write(block: memoryview) -> None:
            while block:
                block = block[stream.write(block) :]

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
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    *,
    blocks_of: Callable[[str], Iterable[torch.Tensor]],
    metadata: dict[str, str],
) -> Iterator[memoryview]:
    """The header's length, the header as JSON, the tensors one after the other.

    As the format asks: wider elements first, then by name, so that every tensor is aligned; the header padded with
    spaces to 8 bytes.
    """
    ordered = sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield memoryview(_LENGTH.pack(len(encoded)) + encoded)
    for name, _ in ordered:
        for block in blocks_of(name):
            whole = memory_of(block)
            for start in range(0, len(whole), BLOCK_BYTES):
                yield whole[start : start + BLOCK_BYTES]
