"""Where the sequences of an indexed file come from: PREFIX.trace beside PREFIX.bin and .idx, a row a sequence.

A flat array of rows (line, file, start) in the order of the sequences, mapped and never loaded: in a token shard a row
a document, in a packed shard a row a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
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
Numbers = NDArray[np.integer[Any]]


def trace_path(prefix: Path) -> Path:
    """PREFIX.trace"""
    return prefix.with_name(prefix.name + ".trace")


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


class TracedWriter(IndexedWriter):
    """An IndexedWriter that also writes PREFIX.trace; as many rows are added as sequences."""

    def __init__(self, prefix: Path | str, *, dtype: DTypeLike) -> None:
        super().__init__(prefix, dtype=dtype)
        self._temporary_trace = trace_path(self._temporary)
        self._trace: BinaryIO | None = None
        self._num_rows = 0

    def __enter__(self) -> TracedWriter:
        super().__enter__()
        with storage_errors(self._temporary_trace):
            self._trace = self._temporary_trace.open("wb", buffering=1024 * 1024)
        return self

    def add_rows(self, rows: Rows) -> None:
        """Append the rows of sequences, in their order."""
        assert self._trace is not None, "the writer is used inside its with block"
        assert rows.dtype == ROW, "rows are what this file makes"
        with storage_errors(trace_path(self.prefix)):
            self._trace.write(np.ascontiguousarray(rows).data)
        self._num_rows += len(rows)

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
        assert self._trace is not None, "the writer is used inside its with block"
        try:
            with storage_errors(trace_path(self.prefix)) if finish else suppress(OSError):
                self._trace.close()
            if finish:
                assert self._num_rows == len(self._sequence_lengths), "every sequence has its row"
                replace(self._temporary_trace, trace_path(self.prefix))
        finally:
            self._temporary_trace.unlink(missing_ok=True)
