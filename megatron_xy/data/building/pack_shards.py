"""Token shards -> packed shards of each bucket, window by window; a task writes files of its own, its receipt last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megatron_xy.data.indexed import IndexedReader, bin_path, idx_path
from megatron_xy.data.manifest import Entry, ShardEntry, bucket_folder, file_entry
from megatron_xy.data.origins import Rows, TracedWriter, mask_path, read_mask, read_rows, trace_path
from megatron_xy.data.packing.best_fit import EngineName, start_engine
from megatron_xy.data.packing.pack import Overflow, Packing, pack
from megatron_xy.data.packing.sample_plan import Plan, write_samples
from megatron_xy.storage import file_sha256, storage_error, storage_errors, write_text

RECEIPTS_FOLDER = ".receipts"  # no source has such a name
SHARD_TOKENS = 256 * 1024 * 1024  # windows go into one shard of each bucket until they hold this many, or more
MOST_SHARDS = 512  # of a bucket, over all sources: a run draws from all of them at once, and wants each to stay open


@dataclass(frozen=True)
class Range:
    """Documents first..last of a token shard."""

    prefix: Path
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """Documents that are packed together, and how many tokens they hold."""

    ranges: tuple[Range, ...]
    tokens: int


@dataclass(frozen=True)
class PackTask:
    """Windows of one source that become shard `index` of each bucket, under FOLDER/SOURCE; the receipt comes last."""

    folder: Path
    source: str
    index: int
    buckets: tuple[int, ...]
    windows: tuple[tuple[Range, ...], ...]
    packing: Packing = "best_fit"
    overflow: Overflow = "split"
    engine: EngineName = "auto"
    masked: bool = False  # every token shard says which of its tokens are learned

    @property
    def receipt(self) -> Path:
        """Where it is noted that this task is done; apart from FOLDER/SOURCE, which is moved away in the end."""
        return self.folder / RECEIPTS_FOLDER / f"{self.source}.{self.index:05d}.json"


class PackReceipt(Entry):
    """What one task wrote: counts, and the shard of each bucket (keyed by its size) that got samples."""

    documents: int  # in the samples, wholly or partly
    truncated_documents: int
    dropped_documents: int
    tokens: int
    tokens_lost: int
    tokens_learned: int | None = None  # None: all
    shards: dict[str, ShardEntry]
    engine: str  # what packed, and what it took to get it ready: for people, not the same on every machine


def windows_of(prefixes: Sequence[Path], *, window_documents: int) -> list[Window]:
    """How the documents in the token shards `prefixes` fall into windows, in their order."""
    windows: list[Window] = []
    ranges: list[Range] = []
    documents = tokens = 0
    for prefix in prefixes:
        lengths = IndexedReader(prefix).sequence_lengths
        first = 0
        while first < len(lengths):
            last = min(len(lengths), first + window_documents - documents)
            ranges.append(Range(prefix, first, last))
            documents += last - first
            tokens += int(lengths[first:last].sum(dtype=np.int64))
            first = last
            if documents == window_documents:
                windows.append(Window(tuple(ranges), tokens))
                ranges, documents, tokens = [], 0, 0
    return [*windows, Window(tuple(ranges), tokens)] if ranges else windows


def task_tokens_for(total: int) -> int:
    """How many tokens the shards of all buckets that come of one task hold at least, in a corpus of `total`."""
    return max(SHARD_TOKENS, total // MOST_SHARDS)


def group_windows(windows: Sequence[Window], *, task_tokens: int) -> list[tuple[tuple[Range, ...], ...]]:
    """The windows of one source, in order, as many together as go into one shard of each bucket."""
    groups: list[list[tuple[Range, ...]]] = []
    room = 0  # tokens that the last group still takes
    for window in windows:
        if room <= 0:
            groups.append([])
            room = task_tokens
        groups[-1].append(window.ranges)
        room -= window.tokens
    return [tuple(group) for group in groups]


def pack_shard(task: PackTask, advance: Callable[[int], None]) -> PackReceipt:
    """Pack the windows of one task, unless its receipt says that it is done; `advance` counts documents."""
    done = _read_receipt(task.receipt)
    if done is not None:
        advance(done.documents + done.dropped_documents)
        return done
    documents = truncated = dropped = tokens_lost = 0
    with ExitStack() as stack:
        writers: dict[int, TracedWriter] = {}
        for window in task.windows:
            plan = _pack_window(window, task=task, writers=writers, stack=stack)
            documents += plan.num_documents
            truncated += plan.truncated_documents
            dropped += plan.dropped_documents
            tokens_lost += plan.tokens_lost
            advance(plan.num_documents + plan.dropped_documents)
    shards = {str(size): _shard_entry(task.folder, writer) for size, writer in sorted(writers.items())}
    receipt = PackReceipt(
        documents=documents,
        truncated_documents=truncated,
        dropped_documents=dropped,
        tokens=sum(writer.num_tokens for writer in writers.values()),
        tokens_lost=tokens_lost,
        tokens_learned=sum(writer.num_learned for writer in writers.values()) if task.masked else None,
        shards=shards,
        engine=str(start_engine(task.engine)) if task.packing == "best_fit" else "numpy",
    )
    with storage_errors(task.folder):
        task.receipt.parent.mkdir(exist_ok=True)
    write_text(task.receipt, receipt.model_dump_json())
    return receipt


def _read_receipt(path: Path) -> PackReceipt | None:
    """A task's receipt, if it is done; one that cannot be read is none."""
    try:
        return PackReceipt.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError:
        return None


def _pack_window(
    window: tuple[Range, ...], *, task: PackTask, writers: dict[int, TracedWriter], stack: ExitStack
) -> Plan:
    """Pack one window into the writers of its buckets, which are opened as buckets turn up."""
    lengths: list[NDArray[np.int32]] = []
    document_rows: list[Rows] = []
    # Flat files, however many shards a rare source is spread over: the gather needs descriptors, no mappings.
    with tempfile.TemporaryFile(dir=task.folder) as scratch, tempfile.TemporaryFile(dir=task.folder) as mask_scratch:
        for part in window:
            reader = IndexedReader(part.prefix)
            borders = reader.tokens_before()
            first, last = borders[part.first], borders[part.last]
            lengths.append(np.array(reader.sequence_lengths[part.first : part.last]))
            rows = read_rows(part.prefix, num_sequences=reader.num_sequences)
            document_rows.append(np.array(rows[part.first : part.last]))
            try:
                scratch.write(reader.tokens[first:last].data)
                scratch.flush()
                if task.masked:
                    mask = read_mask(part.prefix, num_tokens=reader.num_tokens)
                    mask_scratch.write(mask[first:last].data)
                    mask_scratch.flush()
            except OSError as error:
                raise storage_error(task.folder, error) from error
        window_lengths = np.concatenate(lengths).astype(np.int64)
        plan = pack(
            window_lengths,
            buckets=task.buckets,
            packing=task.packing,
            overflow=task.overflow,
            engine=task.engine,
        )
        for size in (task.buckets[index] for index in np.flatnonzero(np.bincount(plan.sample_bucket))):
            if size not in writers:
                prefix = task.folder / task.source / bucket_folder(size) / f"shard_{task.index:05d}"
                writer = TracedWriter(prefix, dtype=reader.dtype, masked=task.masked)
                writers[size] = stack.enter_context(writer)
        starts = np.cumsum(window_lengths) - window_lengths
        write_samples(
            plan,
            tokens_file=scratch.fileno(),
            mask_file=mask_scratch.fileno() if task.masked else None,
            document_start=starts,
            document_rows=np.concatenate(document_rows),
            writers=writers,
        )
    return plan


def _shard_entry(folder: Path, writer: TracedWriter) -> ShardEntry:
    prefix, name = writer.prefix, writer.prefix.relative_to(folder).as_posix()
    return ShardEntry(
        name=name,
        samples=writer.num_documents,
        tokens=writer.num_tokens,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        bin_sha256=file_sha256(bin_path(prefix)),
        idx_sha256=file_sha256(idx_path(prefix)),
        trace=file_entry(trace_path(prefix), name=f"{name}.trace"),
        mask=file_entry(mask_path(prefix), name=f"{name}.mask") if writer.masked else None,
    )
