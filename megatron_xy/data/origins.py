"""What stands beside PREFIX.bin and .idx: where the sequences come from, and which tokens are learned.

PREFIX.trace is a flat array of rows (line, file, start) in the order of the sequences: in a token shard a row a
document, in a packed shard a row a piece. PREFIX.mask is a byte a token, in the order of PREFIX.bin: 1 where the loss
asks for this token, as the next one of the token before it, else 0. Where there is no PREFIX.mask, it asks for all.
Both are mapped and never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_xy.data.indexed import GrowingFile, IndexedWriter, mapped
from megatron_xy.errors import DataError

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
    return _mapped(trace_path(prefix), ROW, num_sequences)


def read_mask(prefix: Path, *, num_tokens: int) -> Mask:
    """PREFIX.mask [num_tokens], mapped. Raises DataError where it is missing, cut or grown."""
    return _mapped(mask_path(prefix), np.dtype(np.uint8), num_tokens)


def _mapped(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the folder or build it again")
    if (size := path.stat().st_size) != length * dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, must have {length * dtype.itemsize}: it was cut or grown")
    return mapped(path, dtype)


class TracedWriter(IndexedWriter):
    """An IndexedWriter that also writes PREFIX.trace, and PREFIX.mask if it is `masked`.

    As many rows are added as sequences, and as many bytes of mask as tokens.
    """

    def __init__(self, prefix: Path | str, *, dtype: DTypeLike, masked: bool = False) -> None:
        super().__init__(prefix, dtype=dtype)
        self.masked = masked
        self.num_learned = 0
        self._trace, self._mask = GrowingFile(trace_path(self.prefix)), GrowingFile(mask_path(self.prefix))
        self._files += [self._trace, self._mask] if masked else [self._trace]  # behind .bin

    def add_rows(self, rows: Rows) -> None:
        """Append the rows of sequences, in their order."""
        assert rows.dtype == ROW, "rows are what this file makes"
        self._trace.write(rows)

    def add_mask(self, learned: NDArray[Any]) -> None:
        """Append which of the tokens [tokens] are learned, bool or 0 and 1."""
        assert self.masked, "the writer was opened with masked"
        self._mask.write(learned.astype(np.uint8))
        self.num_learned += int(np.count_nonzero(learned))

    def _finish(self) -> None:
        assert self._trace.num_items == len(self._sequence_lengths), "every sequence has its row"
        assert not self.masked or self._mask.num_items == self.num_tokens, "every token has its mask"
        for file in self._files[1:]:
            file.finish()
        super()._finish()
