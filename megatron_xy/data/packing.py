"""Packing: document lengths -> samples of the bucket sizes (the plan), and the gather-copy that carries a plan out.

Best fit over several bucket sizes, longest document first, as in "Beyond Fixed Length: Bucket Pre-training is All
You Need" (arXiv 2407.07495) but without its padding threshold: only documents longer than the largest bucket are cut.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path
from megatron_xy.data.manifest import Entry, ShardEntry, bucket_folder
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import file_sha256, storage_error, write_text

Integers = NDArray[np.int64]

WINDOW_DOCUMENTS = 100_000  # packed together: padding 0.004% against 0.16% for 1,000, in bounded memory
SHARD_TOKENS = 256 * 1024 * 1024  # windows go into one shard of each bucket until they hold this many
LARGEST_BUCKET = 1 << 20  # tokens; packing keeps a few tables of this many entries
GATHER_TOKENS = 1 << 21  # tokens copied at a time
# Position of the lowest set bit of x < 2^32: TABLE[((x & -x) * DE_BRUIJN & 0xFFFFFFFF) >> 27] (de Bruijn sequence).
DE_BRUIJN = 0x077CB531
LOWEST_BIT = [0, 1, 28, 2, 29, 14, 24, 3, 30, 22, 20, 15, 25, 17, 4, 8]
LOWEST_BIT += [31, 27, 13, 23, 21, 19, 16, 7, 26, 12, 18, 6, 11, 5, 10, 9]


@dataclass(frozen=True)
class Range:
    """Documents first..last of a token shard."""

    prefix: Path
    first: int
    last: int


@dataclass(frozen=True)
class PackTask:
    """Windows of one source that become shard `index` of each bucket, under FOLDER/SOURCE; the receipt comes last."""

    folder: Path
    source: str
    index: int
    buckets: tuple[int, ...]
    windows: tuple[tuple[Range, ...], ...]

    @property
    def receipt(self) -> Path:
        """Where it is noted that this task is done; apart from FOLDER/SOURCE, which is moved away in the end."""
        return self.folder / f"{self.source}.{self.index:05d}.json"


class PackReceipt(Entry):
    """What one task wrote: counts, and the shard of each bucket (keyed by its size) that got samples."""

    documents: int
    truncated_documents: int
    tokens: int
    shards: dict[str, ShardEntry]


@dataclass(frozen=True)
class Plan:
    """Which pieces of which documents make up which sample.

    Piece p is tokens piece_start[p] .. + piece_length[p] of document piece_document[p]. Sample s holds pieces
    sample_ptr[s] .. sample_ptr[s + 1] in this order, and belongs to buckets[sample_bucket[s]].
    piece_* are [pieces] i64, sample_ptr [samples + 1] i64, sample_bucket [samples] i64.
    """

    buckets: tuple[int, ...]
    num_documents: int  # with at least one token
    truncated_documents: int  # cut into two or more pieces
    piece_document: Integers
    piece_start: Integers
    piece_length: Integers
    sample_ptr: Integers
    sample_bucket: Integers

    @property
    def num_samples(self) -> int:
        """Samples of all buckets."""
        return len(self.sample_bucket)

    def padding_ratio(self) -> float:
        """Padding tokens / all tokens of all samples."""
        capacity = int(np.asarray(self.buckets, dtype=np.int64)[self.sample_bucket].sum())
        return 1.0 - int(self.piece_length.sum()) / capacity if capacity else 0.0

    def truncation_ratio(self) -> float:
        """Documents cut into two or more pieces / documents."""
        return self.truncated_documents / self.num_documents if self.num_documents else 0.0

    def concatenation_ratio(self) -> float:
        """Documents per sample."""
        return self.num_documents / self.num_samples if self.num_samples else 0.0


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """The bucket sizes as a tuple. Raises ConfigError unless they are positive, ascending and each named once."""
    given = tuple(int(bucket) for bucket in buckets)
    if not given or given != tuple(sorted(set(given))) or given[0] < 1 or given[-1] > LARGEST_BUCKET:
        shown = ",".join(str(bucket) for bucket in given)
        raise ConfigError(
            f"buckets ({shown}) must be ascending sizes in tokens, each once, from 1 to {LARGEST_BUCKET}, "
            "such as 2048,4096,8192,16384"
        )
    return given


def pack(lengths: NDArray[np.integer[Any]], *, buckets: Sequence[int]) -> Plan:
    """Pack documents of `lengths` [documents] (tokens) into samples of `buckets` (ascending sizes in tokens).

    A document longer than the largest bucket becomes full samples of it and a remainder, which is packed like a
    document. The longest piece goes first, each into the sample with the least room that still holds it; where none
    does, a sample of the smallest bucket that holds it is opened. Documents of length 0 are skipped. Deterministic;
    O(documents + largest bucket) but for numpy's sorts. Raises ConfigError for a bad list of buckets.
    """
    sizes = check_buckets(buckets)
    capacity = sizes[-1]
    lengths = lengths.astype(np.int64)
    assert not len(lengths) or lengths.min() >= 0, "a length is never negative"
    full_samples = np.where(lengths > capacity, lengths // capacity, 0)
    remainders = lengths - full_samples * capacity
    # Longest first, in input order where equal. Up to 65535 numpy sorts 16-bit keys by radix, in O(documents).
    keys = (capacity - remainders).astype(np.uint16 if capacity < 1 << 16 else np.int64)
    order = np.argsort(keys, kind="stable")[: int(np.count_nonzero(remainders))]
    counts = np.bincount(remainders, minlength=capacity + 1)
    run_sample, run_length, opened_for = best_fit(counts.tolist(), sizes)
    piece_sample = np.repeat(np.asarray(run_sample, dtype=np.int64), np.asarray(run_length, dtype=np.int64))
    by_sample = np.argsort(piece_sample, kind="stable")
    packed = order[by_sample]
    pieces_per_sample = np.bincount(piece_sample, minlength=len(opened_for))
    cut = np.repeat(np.arange(len(lengths)), full_samples)
    first_of_document = np.repeat(np.cumsum(full_samples) - full_samples, full_samples)
    num_pieces = np.concatenate([pieces_per_sample, np.ones(len(cut), dtype=np.int64)])
    return Plan(
        buckets=sizes,
        num_documents=int(np.count_nonzero(lengths)),
        truncated_documents=int(np.count_nonzero(lengths > capacity)),
        piece_document=np.concatenate([packed, cut]),
        piece_start=np.concatenate(
            [(full_samples * capacity)[packed], (np.arange(len(cut)) - first_of_document) * capacity]
        ),
        piece_length=np.concatenate([remainders[packed], np.full(len(cut), capacity, dtype=np.int64)]),
        sample_ptr=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(num_pieces)]),
        sample_bucket=np.concatenate(
            [np.searchsorted(sizes, opened_for).astype(np.int64), np.full(len(cut), len(sizes) - 1, dtype=np.int64)]
        ),
    )


def best_fit(counts: list[int], sizes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The core of `pack`: counts[n] pieces of length n, n from the largest bucket down to 1.

    Returns (run_sample, run_length, opened_for): the pieces, longest first, fall into runs of equal length; run i
    puts run_length[i] of them into sample run_sample[i]; sample s was opened for a piece of length opened_for[s].

    Open samples of equal remaining room form a linked list (last in, first out); a bitmap of the rooms that occur,
    with a bitmap over each of its words and so on, finds the least sufficient room in O(log32 of the largest bucket).
    """
    capacity = sizes[-1]
    level_start, num_levels, bits = _empty_bitmap(capacity + 1)
    first_with_room = [-1] * (capacity + 1)
    next_open: list[int] = []
    run_sample: list[int] = []
    run_length: list[int] = []
    opened_for: list[int] = []
    bucket = len(sizes) - 1
    for length in range(capacity, 0, -1):
        left = counts[length]
        while bucket > 0 and sizes[bucket - 1] >= length:
            bucket -= 1
        while left > 0:
            room = _next_set(bits, level_start, num_levels, length)
            if room < 0:
                sample, room = len(opened_for), sizes[bucket]
                opened_for.append(length)
                next_open.append(-1)
            else:
                sample = first_with_room[room]
                first_with_room[room] = next_open[sample]
                if next_open[sample] < 0:
                    _clear(bits, level_start, num_levels, room)
            # After one piece this sample has less room than any other that fits: equal pieces follow it there.
            run = min(room // length, left)
            run_sample.append(sample)
            run_length.append(run)
            left -= run
            room -= run * length
            if room > 0:
                next_open[sample] = first_with_room[room]
                first_with_room[room] = sample
                _set(bits, level_start, num_levels, room)
    return run_sample, run_length, opened_for


def pack_tasks(
    source: str, prefixes: Sequence[Path], *, folder: Path, buckets: tuple[int, ...], window_documents: int
) -> list[PackTask]:
    """How the documents of one source, in the token shards `prefixes`, fall into windows, and windows into shards."""
    tasks: list[PackTask] = []
    windows: list[tuple[Range, ...]] = []
    window: list[Range] = []
    documents = tokens = 0
    for prefix in prefixes:
        lengths = IndexedReader(prefix).sequence_lengths
        first = 0
        while first < len(lengths):
            last = min(len(lengths), first + window_documents - documents)
            window.append(Range(prefix, first, last))
            documents += last - first
            tokens += int(lengths[first:last].sum(dtype=np.int64))
            first = last
            if documents == window_documents:
                windows.append(tuple(window))
                window, documents = [], 0
                if tokens >= SHARD_TOKENS:
                    tasks.append(PackTask(folder, source, len(tasks), buckets, tuple(windows)))
                    windows, tokens = [], 0
    windows += [tuple(window)] if window else []
    return [*tasks, PackTask(folder, source, len(tasks), buckets, tuple(windows))] if windows else tasks


def pack_shard(task: PackTask, advance: Callable[[int], None]) -> PackReceipt:
    """Pack the windows of one task, unless its receipt says that it is done; `advance` counts documents."""
    if task.receipt.is_file():
        receipt = PackReceipt.model_validate_json(task.receipt.read_bytes())
        advance(receipt.documents)
        return receipt
    documents = truncated = 0
    with ExitStack() as stack:
        writers: dict[int, IndexedWriter] = {}
        for window in task.windows:
            plan = _pack_window(window, task=task, writers=writers, stack=stack)
            documents += plan.num_documents
            truncated += plan.truncated_documents
            advance(plan.num_documents)
    shards = {str(size): _shard_entry(task.folder, writer) for size, writer in sorted(writers.items())}
    receipt = PackReceipt(
        documents=documents,
        truncated_documents=truncated,
        tokens=sum(writer.num_tokens for writer in writers.values()),
        shards=shards,
    )
    write_text(task.receipt, receipt.model_dump_json())
    return receipt


def _pack_window(
    window: tuple[Range, ...], *, task: PackTask, writers: dict[int, IndexedWriter], stack: ExitStack
) -> Plan:
    """Pack one window into the writers of its buckets, which are opened as buckets turn up."""
    lengths: list[NDArray[np.int32]] = []
    # One flat file, however many shards a rare source is spread over: the gather needs one descriptor, no mapping.
    with tempfile.TemporaryFile(dir=task.folder) as scratch:
        for part in window:
            reader = IndexedReader(part.prefix)
            ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(reader.sequence_lengths, dtype=np.int64)])
            lengths.append(np.array(reader.sequence_lengths[part.first : part.last]))
            try:
                scratch.write(reader.tokens[ends[part.first] : ends[part.last]].data)
                scratch.flush()
            except OSError as error:
                raise storage_error(task.folder, error) from error
        window_lengths = np.concatenate(lengths).astype(np.int64)
        plan = pack(window_lengths, buckets=task.buckets)
        for size in (task.buckets[index] for index in np.unique(plan.sample_bucket)):
            if size not in writers:
                prefix = task.folder / task.source / bucket_folder(size) / f"shard_{task.index:05d}"
                writers[size] = stack.enter_context(IndexedWriter(prefix, dtype=reader.dtype))
        starts = np.cumsum(window_lengths) - window_lengths
        write_samples(plan, tokens_file=scratch.fileno(), document_start=starts, writers=writers)
    return plan


def _shard_entry(folder: Path, writer: IndexedWriter) -> ShardEntry:
    files = bin_path(writer.prefix), idx_path(writer.prefix)
    return ShardEntry(
        name=writer.prefix.relative_to(folder).as_posix(),
        samples=writer.num_documents,
        tokens=writer.num_tokens,
        bin_bytes=files[0].stat().st_size,
        idx_bytes=files[1].stat().st_size,
        bin_sha256=file_sha256(files[0]),
        idx_sha256=file_sha256(files[1]),
    )


def write_samples(plan: Plan, *, tokens_file: int, document_start: Integers, writers: dict[int, IndexedWriter]) -> None:
    """Copy the planned samples from a flat file of tokens into the writers {bucket size: writer}, in plan order.

    `tokens_file` is an open file descriptor of tokens of the writers' type, `document_start` [documents] each
    document's first token in it. Read piece by piece and not mapped, so that memory stays at one block of samples.
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


def _gather(tokens_file: int, *, starts: Integers, lengths: Integers, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The pieces at `starts` [pieces] with `lengths` [pieces] (tokens), back to back."""
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    room = tokens.data.cast("B")
    position = 0
    for start, size in zip((starts * dtype.itemsize).tolist(), (lengths * dtype.itemsize).tolist(), strict=True):
        if os.preadv(tokens_file, [room[position : position + size]], start) != size:
            raise DataError("the tokens written a moment ago are cut; remove the output folder and build again")
        position += size
    return tokens


def _empty_bitmap(size: int) -> tuple[list[int], int, list[int]]:
    """(start of each level in the words, number of levels, words) of a bitmap over 0..size - 1, 32 bits a word."""
    level_start, words = [], 0
    while True:
        level_start.append(words)
        size = (size >> 5) + 1  # one bit to spare, so that looking beyond the last word stays inside
        words += size
        if size == 1:
            return level_start, len(level_start), [0] * words


def _set(bits: list[int], level_start: list[int], num_levels: int, index: int) -> None:
    for level in range(num_levels):
        bits[level_start[level] + (index >> 5)] |= 1 << (index & 31)
        index >>= 5


def _clear(bits: list[int], level_start: list[int], num_levels: int, index: int) -> None:
    for level in range(num_levels):
        word = level_start[level] + (index >> 5)
        bits[word] &= ~(1 << (index & 31))
        if bits[word]:
            return
        index >>= 5


def _next_set(bits: list[int], level_start: list[int], num_levels: int, index: int) -> int:
    """The smallest set index >= `index`, or -1."""
    for level in range(num_levels):
        rest = bits[level_start[level] + (index >> 5)] >> (index & 31)
        if rest:
            index += LOWEST_BIT[((rest & -rest) * DE_BRUIJN & 0xFFFFFFFF) >> 27]
            for below in range(level - 1, -1, -1):
                word = bits[level_start[below] + index]
                index = (index << 5) + LOWEST_BIT[((word & -word) * DE_BRUIJN & 0xFFFFFFFF) >> 27]
            return index
        index = (index >> 5) + 1
    return -1
