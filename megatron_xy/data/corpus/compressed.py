"""Lines of files, plain or compressed (.gz, .zst); a cut compressed file is never passed off as a shorter one."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_xy.errors import DataError

COMPRESSED = (".gz", ".zst")
COMPRESSED_BLOCK = 8 * 1024  # bytes given to the decompressor at a time; what comes out of one lies in memory
LARGEST_WINDOW = 1 << 31  # files written with `zstd --long=31` too


def numbered_lines(path: Path, stream: io.BufferedReader[Any], *, first_line: int = 1) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line of `stream`, the open file `path`, from where it stands: there line `first_line`
    begins. A byte order mark stays in the first one. Raises DataError where a compressed file is cut or damaged.
    """
    line = first_line - 1
    try:
        lines = _decompressed(path, stream) if path.name.endswith(COMPRESSED) else stream
        for line, raw in enumerate(lines, start=first_line):
            yield line, raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged after line {line}: {error}; copy it again") from error


def _decompressed(path: Path, stream: io.BufferedReader[Any]) -> io.BufferedIOBase | gzip.GzipFile:
    if not stream.peek(1):  # a cut file: what compresses nothing still writes a header
        raise EOFError("the file has no bytes")
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)
    return io.BufferedReader(_ZstandardFile(stream), buffer_size=1024 * 1024)


class _ZstandardFile(io.RawIOBase):
    """All frames of a .zst file; zstandard's own reader takes the end of a cut file for the end of its data."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._frame: Any = None  # of which some bytes have been read and the end has not
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._stream.read(COMPRESSED_BLOCK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends before its data do")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
