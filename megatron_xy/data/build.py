"""`data build`: a corpus -> a data folder of packed samples, through token shards; its statistics, its verification.

Everything grows in OUTPUT/.tmp-tokens under receipts, so that the same command goes on after a kill; sources move to
their place when all is done, and the manifest is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xy.data.documents import BadLinePolicy, LineReport, ScannedFile, find_inputs, scan_file
from megatron_xy.data.indexed import IndexedReader, bin_path, dtype_for, idx_path
from megatron_xy.data.manifest import (
    MANIFEST_NAME,
    BucketEntry,
    InputEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    Statistics,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from megatron_xy.data.packing import WINDOW_DOCUMENTS, PackReceipt, check_buckets, pack_shard, pack_tasks
from megatron_xy.data.tokenize import (
    MOST_SOURCES,
    Advance,
    Progress,
    TokenizeTask,
    TokenShard,
    Workers,
    group_parts,
    part_bytes_for,
    tokenize_shard,
)
from megatron_xy.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import file_sha256, replace, storage_error, write_text

DEFAULT_BUCKETS = (2048, 4096, 8192, 16384)
WORK_FOLDER = ".tmp-tokens"


def build_dataset(
    inputs: Sequence[Path | str],
    *,
    tokenizer: Path | str,
    output: Path | str,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    source_field: str | None = None,
    text_field: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    bad_lines: BadLinePolicy = "fail",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise and pack a corpus into the data folder `output`; returns `dataset_stats` and "reused".

    The result is the same for any number of workers. Killed at any moment, the same call goes on where it was; where
    it is already finished, nothing is done and "reused" is true. `bad_lines`: "fail" raises DataError with all bad
    lines of a file, "skip" counts them. `progress(phase, done, total, unit)` is called about twice a second.
    Raises ConfigError (arguments, paths, another data set in `output`), DataError (corpus, tokenizer), StorageError.
    """
    sizes = check_buckets(buckets)
    loaded = load_tokenizer(tokenizer)
    if append_eod and loaded.eos_id is None:
        raise ConfigError(f"append_eod (true): the tokenizer {loaded.path} has no end token; leave it off")
    files = find_inputs(inputs)
    folder = Path(output)
    _check_output(folder, inputs)
    options = {
        "buckets": list(sizes),
        "append_eod": append_eod,
        "text_field": text_field,
        "source_field": source_field,
        "bad_lines": bad_lines,
        "window_documents": WINDOW_DOCUMENTS,
    }
    with Workers(workers, progress=progress) as pool:
        total = sum(file.stat().st_size for file in files)
        part_bytes = part_bytes_for(total)
        scanned = list(pool.run("scan", _scan, [(file, part_bytes) for file in files], total=total, unit="bytes"))
        fingerprint = _fingerprint(scanned, tokenizer=loaded, options=options)
        if (folder / MANIFEST_NAME).is_file():
            return _reuse(folder, fingerprint)
        with _work_folder(folder, fingerprint) as work:
            tokenized = _tokenize(
                pool,
                [
                    TokenizeTask(
                        folder=work / "tokens" / f"{index:06d}",
                        parts=parts,
                        tokenizer=loaded.path,
                        text_field=text_field,
                        source_field=source_field,
                        append_eod=append_eod,
                        bad_lines=bad_lines,
                    )
                    for index, parts in enumerate(group_parts(scanned, part_bytes=part_bytes))
                ],
                total=total,
            )
            report = LineReport()
            for shard in tokenized:
                report.add(shard.report)
            sources = _pack(pool, tokenized, work=work, buckets=sizes)
            manifest = Manifest(
                fingerprint=fingerprint,
                buckets=list(sizes),
                append_eod=append_eod,
                text_field=text_field,
                source_field=source_field,
                tokenizer=_tokenizer_entry(loaded),
                dtype="uint16" if dtype_for(loaded.vocab_size).itemsize == 2 else "int32",
                inputs=[InputEntry(path=file.path, size=file.size, sha256=file.sha256) for file in scanned],
                sources=sources,
                statistics=_statistics(sources, report),
            )
            _publish(folder, work=work, manifest=manifest, tokenizer=loaded)
    return {**dataset_stats(folder), "reused": False}


def dataset_stats(directory: Path | str) -> dict[str, Any]:
    """Documents, tokens, samples, the three ratios; per source and bucket samples, tokens, share and padding.

    `share` is the part of all samples' length, padding included. Raises ConfigError, DataError as `read_manifest`.
    """
    manifest = read_manifest(Path(directory))
    whole = sum(source.packed_length for source in manifest.sources.values())
    sources: dict[str, Any] = {}
    for name, source in manifest.sources.items():
        sources[name] = {
            "documents": source.documents,
            "tokens": source.tokens,
            "samples": source.samples,
            "share": source.packed_length / whole,
            "padding_ratio": 1 - source.tokens / source.packed_length,
            "truncation_ratio": source.truncated_documents / source.documents,
            "concatenation_ratio": source.documents / source.samples,
            "buckets": {
                size: {
                    "samples": bucket.samples,
                    "tokens": bucket.tokens,
                    "share": int(size) * bucket.samples / whole,
                    "padding_ratio": 1 - bucket.tokens / (int(size) * bucket.samples),
                }
                for size, bucket in source.buckets.items()
            },
        }
    return {**manifest.statistics.model_dump(), "buckets": manifest.buckets, "sources": sources}


def verify_dataset(directory: Path | str, *, progress: Progress | None = None) -> None:
    """Read a whole data folder: sizes, checksums, every sample within its bucket, every id within the vocabulary.

    Raises ConfigError where the folder is missing, DataError with the file and the reason where anything is wrong.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    tokenizer = folder / manifest.tokenizer.file
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer.sha256:
        raise DataError(f"{tokenizer} is missing or not the tokenizer of the manifest; copy the right one there")
    shards = [
        (shard, int(size))
        for source in manifest.sources.values()
        for size, bucket in source.buckets.items()
        for shard in bucket.shards
    ]
    done, total = 0, sum(shard.bin_bytes + shard.idx_bytes for shard, _ in shards)
    for shard, size in shards:
        if progress is not None:
            progress("verify", done, total, "bytes")
        _verify_shard(folder, shard, bucket=size, manifest=manifest)
        done += shard.bin_bytes + shard.idx_bytes
    if progress is not None:
        progress("verify", total, total, "bytes")


def _check_output(folder: Path, inputs: Sequence[Path | str]) -> None:
    """The output folder is new, empty, finished, or of an unfinished build; and no input folder holds it."""
    for given in inputs:
        if Path(given).is_dir() and folder.resolve().is_relative_to(Path(given).resolve()):
            raise ConfigError(f"output ({folder}) lies inside the input {given}; name a folder elsewhere")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output ({folder}) is a file; name a folder")
    ours = (folder / MANIFEST_NAME).exists() or (folder / WORK_FOLDER).exists()
    if folder.is_dir() and not ours and any(folder.iterdir()):
        raise ConfigError(f"output ({folder}) holds other files; name a new or empty folder")


def _scan(task: tuple[Path, int], advance: Advance) -> ScannedFile:
    path, part_bytes = task
    return scan_file(path, part_bytes=part_bytes, advance=advance)


def _fingerprint(scanned: Sequence[ScannedFile], *, tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """Equal where the result would be: over contents and kinds of the inputs in order, tokenizer and options."""
    kinds = [Path(file.path).suffixes[-1:] for file in scanned]
    content = [[kind, file.size, file.sha256] for kind, file in zip(kinds, scanned, strict=True)]
    return hashlib.sha256(json.dumps([content, tokenizer.sha256, options], sort_keys=True).encode()).hexdigest()


def _reuse(folder: Path, fingerprint: str) -> dict[str, Any]:
    if read_manifest(folder).fingerprint != fingerprint:
        raise ConfigError(
            f"output ({folder}) holds a finished data set of other inputs or options; name a new folder, or remove it"
        )
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    return {**dataset_stats(folder), "reused": True}


@contextmanager
def _work_folder(folder: Path, fingerprint: str) -> Iterator[Path]:
    """The folder of the unfinished build, locked; what another build left there is cleared away."""
    work = folder / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise storage_error(work, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"output ({folder}): another build is writing it; wait for it, or stop it") from error
        mark = work / "fingerprint"
        if not mark.is_file() or mark.read_text() != fingerprint:
            _clear(folder, work)
            write_text(mark, fingerprint)
        (work / "packed").mkdir(exist_ok=True)
        yield work


def _clear(folder: Path, work: Path) -> None:
    """Remove another build's leavings: its work, and the sources that it had already moved to their place."""
    moved = work / "publish.json"
    names = json.loads(moved.read_text()) if moved.is_file() else []
    for path in [*(folder / name for name in names), work / "tokens", work / "packed"]:
        if path.exists():
            shutil.rmtree(path)
    moved.unlink(missing_ok=True)


def _tokenize(pool: Workers, tasks: list[TokenizeTask], *, total: int) -> list[TokenShard]:
    """Run all tasks. Raises DataError with all bad lines of a file once its last part is read, under "fail"."""
    shards: list[TokenShard] = []
    report = LineReport()
    for index, shard in enumerate(pool.run("tokenize", tokenize_shard, tasks, total=total, unit="bytes")):
        shards.append(shard)
        report.add(shard.report)
        file_ends = index + 1 == len(tasks) or tasks[index + 1].parts[0].path != tasks[index].parts[-1].path
        if file_ends and tasks[index].bad_lines == "fail":
            report.raise_if_bad()
    return shards


def _pack(
    pool: Workers, tokenized: Sequence[TokenShard], *, work: Path, buckets: tuple[int, ...]
) -> dict[str, SourceEntry]:
    """Pack each source by itself, in the order of the names. Raises DataError where there is nothing to pack."""
    names = sorted({name for shard in tokenized for name in shard.documents})
    if not names:
        raise DataError("the inputs hold no document with text; check the text field and the files")
    if len(names) > MOST_SOURCES:
        raise ConfigError(f"source_field names {len(names)} sources, at most {MOST_SOURCES} can be told apart")
    tasks = [
        task
        for name in names
        for task in pack_tasks(
            name,
            [shard.folder / name for shard in tokenized if name in shard.documents],
            folder=work / "packed",
            buckets=buckets,
            window_documents=WINDOW_DOCUMENTS,
        )
    ]
    total = sum(sum(shard.documents.values()) for shard in tokenized)
    receipts: dict[str, list[PackReceipt]] = {name: [] for name in names}
    for task, receipt in zip(tasks, pool.run("pack", pack_shard, tasks, total=total, unit="documents"), strict=True):
        receipts[task.source].append(receipt)
    return {name: _source_entry(of_source, buckets) for name, of_source in receipts.items()}


def _source_entry(receipts: Sequence[PackReceipt], buckets: Sequence[int]) -> SourceEntry:
    entries: dict[str, BucketEntry] = {}
    for size in (str(bucket) for bucket in buckets):
        shards = [receipt.shards[size] for receipt in receipts if size in receipt.shards]
        if shards:
            samples, tokens = sum(shard.samples for shard in shards), sum(shard.tokens for shard in shards)
            entries[size] = BucketEntry(samples=samples, tokens=tokens, shards=shards)
    return SourceEntry(
        documents=sum(receipt.documents for receipt in receipts),
        truncated_documents=sum(receipt.truncated_documents for receipt in receipts),
        tokens=sum(receipt.tokens for receipt in receipts),
        buckets=entries,
    )


def _tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(
        file=TOKENIZER_FILE,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _statistics(sources: dict[str, SourceEntry], report: LineReport) -> Statistics:
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
        skipped_empty=report.skipped_empty,
        bad_lines=report.bad_lines,
    )


def _publish(folder: Path, *, work: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Move the sources to their place, then write the manifest; each step may already be done."""
    write_text(work / "publish.json", json.dumps(sorted(manifest.sources)))
    try:
        for name in manifest.sources:
            packed = work / "packed" / name
            if packed.exists():
                packed.rename(folder / name)
        copy = work / TOKENIZER_FILE
        shutil.copyfile(tokenizer.path, copy)
    except OSError as error:
        raise storage_error(folder, error) from error
    replace(copy, folder / TOKENIZER_FILE)
    write_manifest(folder, manifest)
    shutil.rmtree(work)


def _verify_shard(folder: Path, shard: ShardEntry, *, bucket: int, manifest: Manifest) -> None:
    prefix = folder / shard.name
    expected = {
        bin_path(prefix): (shard.bin_bytes, shard.bin_sha256),
        idx_path(prefix): (shard.idx_bytes, shard.idx_sha256),
    }
    for path, (size, sha256) in expected.items():
        if not path.is_file():
            raise DataError(f"{path} is missing; copy or build it again")
        if path.stat().st_size != size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}: it was cut or grown")
        if file_sha256(path) != sha256:
            raise DataError(f"{path} is damaged: its checksum is not the manifest's; copy or build it again")
    reader = IndexedReader(prefix)
    reader.verify(vocab_size=manifest.tokenizer.vocab_size)
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(reader.sequence_lengths, dtype=np.int64)])
    lengths = np.diff(ends[reader.document_indices])
    if (reader.dtype.name, reader.num_documents, reader.num_tokens) != (manifest.dtype, shard.samples, shard.tokens):
        raise DataError(f"{prefix} holds other counts or another type of ids than the manifest says; build it again")
    if lengths.min() < 1 or lengths.max() > bucket:
        raise DataError(f"{prefix} holds samples of {lengths.min()} to {lengths.max()} tokens in bucket {bucket}")
