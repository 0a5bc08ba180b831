"""Megatron's .bin/.idx as input -> token shards: no tokenising, documents as they lie, their sequences joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_xy.data.building.tokenize import TokenizeTask, TokenShard, leave_alone_if_made
from megatron_xy.data.building.workers import Advance
from megatron_xy.data.corpus.documents import LineReport, Part, changed, reading_unchanged
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.indexed import IndexedReader, dtype_for
from megatron_xy.data.origins import TracedWriter, document_rows
from megatron_xy.errors import DataError

COPY_TOKENS = 1 << 22  # held in memory at a time, or one document


def copy_documents(task: TokenizeTask, advance: Advance) -> TokenShard:
    """One token shard of Megatron datasets: documents as they lie; those without a token are left out and counted.

    Raises DataError where a dataset is damaged or an id lies outside the tokenizer's vocabulary.
    """
    vocab_size = load_tokenizer(task.tokenizer).vocab_size
    report, source = LineReport(), task.fields.default_source
    with TracedWriter(task.folder / source, dtype=dtype_for(vocab_size)) as writer:
        for part in task.parts:
            with reading_unchanged(part):
                _copy(part, writer, vocab_size=vocab_size, report=report, advance=advance)
        leave_alone_if_made(task.folder)
    return TokenShard(task.folder, {source: writer.num_documents} if writer.num_documents else {}, report)


def _copy(part: Part, writer: TracedWriter, *, vocab_size: int, report: LineReport, advance: Advance) -> None:
    reader = IndexedReader(Path(part.path).with_suffix(""))
    itemsize = reader.dtype.itemsize
    # [documents of this part + 1]: tokens of the dataset before each of its documents.
    ends = reader.tokens_before()[reader.document_indices[part.first_line - 1 :]]
    ends = ends[: int(np.searchsorted(ends, part.stop // itemsize, side="right"))]
    if not len(ends) or int(ends[0]) * itemsize != part.start or int(ends[-1]) * itemsize != part.stop:
        raise changed(part.path)
    first = 0
    while first < len(ends) - 1:
        last = int(np.searchsorted(ends, ends[first] + COPY_TOKENS, side="left"))
        last = min(max(last, first + 1), len(ends) - 1)
        tokens = reader.tokens[ends[first] : ends[last]]
        bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(bad):
            place = int(ends[first]) + int(bad[0])
            document = part.first_line + int(np.searchsorted(ends, place, side="right")) - 1
            raise DataError(
                f"{part.path}:{document}: token id {tokens[bad[0]]} is outside the vocabulary of {vocab_size}; "
                "the dataset is damaged or was made with another tokenizer"
            )
        lengths = np.diff(ends[first : last + 1])
        report.lines += len(lengths)
        report.skipped_empty += int(np.count_nonzero(lengths == 0))
        writer.add_documents(tokens.astype(writer.dtype), lengths=lengths[lengths > 0])
        numbers = part.first_line + first + np.flatnonzero(lengths)
        writer.add_rows(document_rows(np.full(len(numbers), part.file), numbers))
        advance(tokens.nbytes)
        first = last
