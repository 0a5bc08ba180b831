"""What stands beside PREFIX.bin and .idx: where the sequences come from, and which tokens are learned.

PREFIX.trace is a flat array of rows (line, file, start) in the order of the sequences: in a token shard a row a
document, in a packed shard a row a piece. PREFIX.mask is a byte a token, in the order of PREFIX.bin: 1 where the loss
asks for this token, as the next one of the token before it, else 0. Where there is no PREFIX.mask, it asks for all.
Both are mapped and never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_xy.data.indexed import IndexedWriter
from megatron_xy.errors import DataError
from megatron_xy.storage import replace, storage_errors

# line of the document, from 1; file: number of the input, from 0; start: the sequence's first token in its document.
ROW = np.dtype([("line", "<i8"), ("file", "<i4"), ("start", "<i4")])
Rows = NDArray[Any]
Mask = NDArray[np.uint8]
Numbers = NDArray[np.integer[Any]]


def trace_path(prefix: Path) -> Path:
    """PREFIX.trace"""
    return prefix.with_name(prefix.name + ".trace")


def mask_path(prefix: Path) -> Path:
    """PREFIX.mask"""
    return prefix.with_name(prefix.name + ".mask")


def document_rows(files: Sequence[int] | Numbers, lines: Sequence[int] | Numbers) -> Rows:
    """Rows [documents] of whole documents."""
    rows = np.zeros(len(lines), dtype=ROW)
    rows["file"], rows["line"] = files, lines
    return rows


def piece_rows(documents: Rows, *, piece_document: Numbers, piece_start: Numbers) -> Rows:
    """Rows [pieces] of pieces that begin at token `piece_start` of documents with rows `documents`."""
    rows = documents[piece_document]
    rows["start"] += piece_start
    return rows


def read_rows(prefix: Path, *, num_sequences: int) -> Rows:
    """The rows [num_sequences] of PREFIX.trace, mapped. Raises DataError where it is missing, cut or grown."""
    path = trace_path(prefix)
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the folder or build it again")
    if path.stat().st_size != num_sequences * ROW.itemsize:
        raise DataError(f"{path} has {path.stat().st_size} bytes, must have {num_sequences * ROW.itemsize}: it was cut")
    return np.memmap(path, dtype=ROW, mode="r") if num_sequences else np.zeros(0, dtype=ROW)


def read_mask(prefix: Path, *, num_tokens: int) -> Mask:
    """PREFIX.mask [num_tokens], mapped. Raises DataError where it is missing, cut or grown."""
    path = mask_path(prefix)
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the folder or build it again")
    if path.stat().st_size != num_tokens:
        raise DataError(f"{path} has {path.stat().st_size} bytes, must have {num_tokens}: it was cut or grown")
    return np.memmap(path, dtype=np.uint8, mode="r") if num_tokens else np.zeros(0, dtype=np.uint8)


class TracedWriter(IndexedWriter):
    """An IndexedWriter that also writes PREFIX.trace, and PREFIX.mask if it is `masked`.

    As many rows are added as sequences, and as many bytes of mask as tokens.
    """

    def __init__(self, prefix: Path | str, *, dtype: DTypeLike, masked: bool = False) -> None:
        super().__init__(prefix, dtype=dtype)
        self.masked = masked
        self.num_learned = 0
        self._trace = _SideFile(trace_path(self._temporary), trace_path(self.prefix))
        self._mask = _SideFile(mask_path(self._temporary), mask_path(self.prefix)) if masked else None

    @property
    def _side_files(self) -> list[_SideFile]:
        return [self._trace] if self._mask is None else [self._trace, self._mask]

    def __enter__(self) -> TracedWriter:
        super().__enter__()
        for file in self._side_files:
            file.open()
        return self

    def add_rows(self, rows: Rows) -> None:
        """Append the rows of sequences, in their order."""
        assert rows.dtype == ROW, "rows are what this file makes"
        self._trace.write(rows)

    def add_mask(self, learned: NDArray[Any]) -> None:
        """Append which of the tokens [tokens] are learned, bool or 0 and 1."""
        assert self._mask is not None, "the writer was opened with masked"
        self._mask.write(learned.astype(np.uint8))
        self.num_learned += int(np.count_nonzero(learned))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._close(finish=kind is None)
        except BaseException as failure:
            super().__exit__(type(failure), failure, failure.__traceback__)
            raise
        super().__exit__(kind, error, traceback)

    def _close(self, *, finish: bool) -> None:
        with ExitStack() as stack:
            for file in self._side_files:
                stack.callback(file.take_back)
            if not finish:
                return
            assert self._trace.num_items == len(self._sequence_lengths), "every sequence has its row"
            assert self._mask is None or self._mask.num_items == self.num_tokens, "every token has its mask"
            for file in self._side_files:
                file.finish()


class _SideFile:
    """A flat file that grows under a temporary name beside an indexed file."""

    def __init__(self, temporary: Path, path: Path) -> None:
        self._temporary, self._path = temporary, path
        self._stream: BinaryIO | None = None
        self.num_items = 0

    def open(self) -> None:
        with storage_errors(self._path):
            self._stream = self._temporary.open("wb", buffering=1024 * 1024)

    def write(self, items: NDArray[Any]) -> None:
        assert self._stream is not None, "the writer is used inside its with block"
        with storage_errors(self._path):
            self._stream.write(np.ascontiguousarray(items).data)
        self.num_items += len(items)

    def finish(self) -> None:
        """Gives the file its name."""
        assert self._stream is not None, "the writer is used inside its with block"
        with storage_errors(self._path):
            self._stream.close()
        replace(self._temporary, self._path)

    def take_back(self) -> None:
        """Takes back what has not got its name."""
        if self._stream is not None:
            with suppress(OSError):  # a full disk refuses the last buffered bytes too; the first refusal is reported
                self._stream.close()
        self._temporary.unlink(missing_ok=True)
