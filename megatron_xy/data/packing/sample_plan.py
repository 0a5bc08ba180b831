"""The plan of samples that packing makes, and the copy that carries it out: flat files of tokens and of their mask ->
bucket writers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.origins import Rows, TracedWriter, piece_rows
from megatron_xy.errors import DataError

Integers = NDArray[np.int64]

GATHER_TOKENS = 1 << 21  # tokens copied at a time


@dataclass(frozen=True)
class Plan:
    """Which pieces of which documents make up which sample.

    Piece p is tokens piece_start[p] .. + piece_length[p] of document piece_document[p]. Sample s holds pieces
    sample_ptr[s] .. sample_ptr[s + 1] in this order, and belongs to buckets[sample_bucket[s]].
    piece_* are [pieces] i32, sample_ptr [samples + 1] i64, sample_bucket [samples] i32.
    """

    buckets: tuple[int, ...]
    num_documents: int  # with at least one token in a sample
    truncated_documents: int  # of these: cut into two or more pieces, or cut short
    dropped_documents: int  # in no sample, though not empty
    tokens_lost: int  # of the documents given, in no sample
    piece_document: NDArray[np.int32]
    piece_start: NDArray[np.int32]
    piece_length: NDArray[np.int32]
    sample_ptr: Integers
    sample_bucket: NDArray[np.int32]

    @property
    def num_samples(self) -> int:
        """Samples of all buckets."""
        return len(self.sample_bucket)

    @property
    def num_tokens(self) -> int:
        """Tokens in the samples, without padding."""
        return int(self.piece_length.sum(dtype=np.int64))

    @property
    def packed_length(self) -> int:
        """Tokens in the samples, padding included."""
        return int(np.asarray(self.buckets, dtype=np.int64)[self.sample_bucket].sum())


def write_samples(
    plan: Plan,
    *,
    tokens_file: int,
    document_start: Integers,
    document_rows: Rows,
    writers: dict[int, TracedWriter],
    mask_file: int | None = None,
) -> None:
    """Copy the planned samples from a flat file of tokens into the writers {bucket size: writer}, in plan order.

    `tokens_file` is an open file descriptor of tokens of the writers' type, `document_start` [documents] each
    document's first token in it, `mask_file` likewise a byte a token, where the writers are masked. Read piece by piece
    and not mapped, so that memory stays at one block of samples.
    """
    pieces_per_sample = np.diff(plan.sample_ptr)
    for index, size in enumerate(plan.buckets):
        samples = np.flatnonzero(plan.sample_bucket == index)
        if not len(samples):
            continue
        pieces = np.flatnonzero(np.repeat(plan.sample_bucket == index, pieces_per_sample))
        starts = document_start[plan.piece_document[pieces]] + plan.piece_start[pieces]
        lengths = plan.piece_length[pieces]
        block = max(1, GATHER_TOKENS // size)
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(pieces_per_sample[samples])])
        for first in range(0, len(samples), block):
            last = min(first + block, len(samples))
            part = slice(int(ends[first]), int(ends[last]))
            tokens = _gather(tokens_file, starts=starts[part], lengths=lengths[part], dtype=writers[size].dtype)
            writers[size].add_documents(
                tokens, lengths=lengths[part], num_pieces=pieces_per_sample[samples[first:last]]
            )
            if mask_file is not None:
                byte = np.dtype(np.uint8)
                writers[size].add_mask(_gather(mask_file, starts=starts[part], lengths=lengths[part], dtype=byte))
        documents, starts_within = plan.piece_document[pieces], plan.piece_start[pieces]
        writers[size].add_rows(piece_rows(document_rows, piece_document=documents, piece_start=starts_within))


def _gather(tokens_file: int, *, starts: Integers, lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The pieces at `starts` [pieces] with `lengths` [pieces] (tokens), back to back."""
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    room = tokens.data.cast("B")
    position = 0
    for start, size in zip((starts * dtype.itemsize).tolist(), (lengths * dtype.itemsize).tolist(), strict=True):
        if os.preadv(tokens_file, [room[position : position + size]], start) != size:
            raise DataError("the tokens written a moment ago are cut; remove the output folder and build again")
        position += size
    return tokens
