"""Token shards -> packed sources, each packed by itself, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_xy.data.building.claims import CLAIMS_FOLDER
from megatron_xy.data.building.options import BuildOptions
from megatron_xy.data.building.pack_shards import (
    PackReceipt,
    PackTask,
    group_windows,
    pack_shard,
    task_tokens_for,
    windows_of,
)
from megatron_xy.data.building.tokenize import MOST_SOURCES, TokenShard, mixed_source
from megatron_xy.data.building.workers import Workers
from megatron_xy.data.corpus.documents import LineReport
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.indexed import IndexedReader
from megatron_xy.data.inspection.alternatives import profile_lengths
from megatron_xy.data.manifest import BucketEntry, SourceEntry, Statistics, TokenizerEntry, file_entry
from megatron_xy.data.origins import mask_path
from megatron_xy.data.packing.pack import Overflow
from megatron_xy.errors import ConfigError, DataError

FEW_DOCUMENTS = 200_000  # packed by plain Python before numba would be ready


def pack_sources(
    pool: Workers,
    tokenized: Sequence[TokenShard],
    *,
    work: Path,
    options: BuildOptions,
    window_documents: int,
) -> tuple[dict[str, SourceEntry], list[PackReceipt]]:
    """Pack each source by itself, in the order of the names; a source of which nothing is left has no entry. Also
    returns what became of each task.

    Raises DataError where nothing is left, or a source holds texts and conversations; ConfigError for too many sources.
    """
    buckets = tuple(options.buckets)
    chat_overflow: Overflow = "truncate_left" if options.chat_overflow == "truncate_left" else "split"
    names = sorted({name for shard in tokenized for name in shard.documents})
    assert names, "there is something to pack"
    if len(names) > MOST_SOURCES:
        raise ConfigError(
            f"source_field names {len(names)} sources, at most {MOST_SOURCES} can be told apart; name another"
        )
    prefixes = {name: [shard.folder / name for shard in tokenized if name in shard.documents] for name in names}
    total = sum(sum(shard.documents.values()) for shard in tokenized)
    masked = {name: _is_masked(name, prefixes[name]) for name in names}
    windows = {name: windows_of(prefixes[name], window_documents=window_documents) for name in names}
    task_tokens = task_tokens_for(sum(window.tokens for of_source in windows.values() for window in of_source))
    tasks = [
        PackTask(
            folder=work / "packed",
            source=name,
            index=index,
            buckets=buckets,
            windows=ranges,
            packing=options.packing,
            overflow=chat_overflow if masked[name] else options.overflow,
            masked=masked[name],
            engine="python" if total < FEW_DOCUMENTS else "auto",
        )
        for name in names
        for index, ranges in enumerate(group_windows(windows[name], task_tokens=task_tokens))
    ]
    receipts: dict[str, list[PackReceipt]] = {name: [] for name in names}
    claims = [work / CLAIMS_FOLDER / f"pack-{task.receipt.stem}" for task in tasks]
    packed = pool.run("pack", pack_shard, tasks, total=total, unit="documents", claims=claims)
    for task, receipt in zip(tasks, packed, strict=True):
        receipts[task.source].append(receipt)
    entries = {name: _source_entry(of_source, buckets, prefixes[name]) for name, of_source in receipts.items()}
    sources = {name: entry for name, entry in entries.items() if entry is not None}
    if not sources:
        raise DataError(
            f"overflow ({options.overflow}) leaves nothing: every document is longer than {buckets[-1]} tokens; "
            f"give a larger bucket, or another overflow"
        )
    return sources, [receipt for of_source in receipts.values() for receipt in of_source]


def _is_masked(source: str, prefixes: Sequence[Path]) -> bool:
    """Whether a source holds conversations. Raises DataError where it holds texts, too."""
    kinds = {mask_path(prefix).is_file() for prefix in prefixes}
    if len(kinds) > 1:
        raise DataError(mixed_source(source))
    return kinds.pop()


def _source_entry(
    receipts: Sequence[PackReceipt], buckets: Sequence[int], prefixes: Sequence[Path]
) -> SourceEntry | None:
    entries: dict[str, BucketEntry] = {}
    for size in (str(bucket) for bucket in buckets):
        shards = [receipt.shards[size] for receipt in receipts if size in receipt.shards]
        if shards:
            samples, tokens = sum(shard.samples for shard in shards), sum(shard.tokens for shard in shards)
            entries[size] = BucketEntry(samples=samples, tokens=tokens, shards=shards)
    if not entries:
        return None
    learned = [receipt.tokens_learned for receipt in receipts if receipt.tokens_learned is not None]
    return SourceEntry(
        documents=sum(receipt.documents for receipt in receipts),
        truncated_documents=sum(receipt.truncated_documents for receipt in receipts),
        dropped_documents=sum(receipt.dropped_documents for receipt in receipts),
        tokens=sum(receipt.tokens for receipt in receipts),
        tokens_lost=sum(receipt.tokens_lost for receipt in receipts),
        tokens_learned=sum(learned) if learned else None,
        buckets=entries,
        lengths=profile_lengths((IndexedReader(prefix).sequence_lengths for prefix in prefixes), sizes=buckets),
    )


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    """What a manifest keeps of the tokenizer."""
    return TokenizerEntry(
        file=tokenizer.file_name,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        config=file_entry(config, name=config.name) if (config := tokenizer.config_path) is not None else None,
    )


def statistics_entry(
    sources: dict[str, SourceEntry], report: LineReport, receipts: Sequence[PackReceipt]
) -> Statistics:
    """The sums over all sources, and what reading and packing left out, of sources without an entry too."""
    documents = sum(source.documents for source in sources.values())
    tokens = sum(source.tokens for source in sources.values())
    samples = sum(source.samples for source in sources.values())
    return Statistics(
        documents=documents,
        tokens=tokens,
        samples=samples,
        padding_ratio=1 - tokens / sum(source.packed_length for source in sources.values()),
        truncation_ratio=sum(source.truncated_documents for source in sources.values()) / documents,
        concatenation_ratio=documents / samples,
        dropped_documents=sum(receipt.dropped_documents for receipt in receipts),
        tokens_lost=sum(receipt.tokens_lost for receipt in receipts),
        skipped_empty=report.skipped_empty,
        duplicates=report.duplicates,
        held_out_documents=report.held_out,
        bad_lines=report.bad_lines,
        lines=report.lines,
    )
