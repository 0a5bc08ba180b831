"""`data build`: a corpus -> a data folder of packed samples, through token shards; its statistics, its verification.

Everything grows in OUTPUT/.tmp-tokens under receipts, so that the same command goes on after a kill; sources move to
their place when all is done, and the manifest is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xy.data.documents import BAD_LINES_LIMIT, BadLinePolicy, LineReport, Part, ScannedFile
from megatron_xy.data.indexed import IndexedReader, bin_path, dtype_for, idx_path
from megatron_xy.data.inputs import find_inputs, input_size, is_prefix, scan_file
from megatron_xy.data.manifest import (
    BAD_LINES_NAME,
    MANIFEST_NAME,
    BucketEntry,
    InputEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    Statistics,
    TokenizerEntry,
    file_entry,
    read_manifest,
    write_manifest,
)
from megatron_xy.data.origins import read_rows
from megatron_xy.data.packing import WINDOW_DOCUMENTS, PackReceipt, check_buckets, pack_shard, pack_tasks
from megatron_xy.data.prefixes import copy_documents
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
from megatron_xy.storage import file_sha256, replace, storage_error, storage_errors, write_text

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
    bad_lines: BadLinePolicy = "limit",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise and pack a corpus into the data folder `output`; returns `dataset_stats` and "reused".

    The result is the same for any number of workers. Killed at any moment, the same call goes on where it was; where
    it is already finished, nothing is done and "reused" is true. `bad_lines` (see BadLinePolicy): all that are left
    out are counted and listed in OUTPUT/bad_lines.txt. `progress(phase, done, total, unit)` is called about twice a
    second.
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
        "window_documents": WINDOW_DOCUMENTS,
    }
    with Workers(workers, progress=progress) as pool:
        total = sum(input_size(file) for file in files)
        part_bytes = part_bytes_for(total)
        to_scan = [(file, index, part_bytes) for index, file in enumerate(files)]
        scanned = list(pool.run("scan", _scan, to_scan, total=total, unit="bytes"))
        fingerprint = _fingerprint(scanned, tokenizer=loaded, options=options)
        if (folder / MANIFEST_NAME).is_file():
            return _reuse(folder, fingerprint, bad_lines=bad_lines)
        with _work_folder(folder, fingerprint) as work:
            tokenized, report = _tokenize(
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
                    for index, parts in enumerate(_group_parts(scanned, part_bytes=part_bytes))
                ],
                total=total,
                most_lines=_most_lines(scanned),
                listing=work / BAD_LINES_NAME,
            )
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
                bad_lines=file_entry(work / BAD_LINES_NAME, folder=work) if report.bad_lines else None,
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
    if manifest.bad_lines is not None:
        _verify_file(folder / manifest.bad_lines.name, size=manifest.bad_lines.size, sha256=manifest.bad_lines.sha256)
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


def _scan(task: tuple[Path, int, int], advance: Advance) -> ScannedFile:
    path, index, part_bytes = task
    return scan_file(path, part_bytes=part_bytes, file=index, advance=advance)


def _fingerprint(scanned: Sequence[ScannedFile], *, tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """Equal where the result would be: over contents and kinds of the inputs in order, tokenizer and options."""
    kinds = [Path(file.path).suffixes[-1:] for file in scanned]
    content = [[kind, file.size, file.sha256] for kind, file in zip(kinds, scanned, strict=True)]
    return hashlib.sha256(json.dumps([content, tokenizer.sha256, options], sort_keys=True).encode()).hexdigest()


def _reuse(folder: Path, fingerprint: str, *, bad_lines: BadLinePolicy) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest.fingerprint != fingerprint:
        raise ConfigError(
            f"output ({folder}) holds a finished data set of other inputs or options; name a new folder, or remove it"
        )
    statistics = manifest.statistics
    most = {"fail": 0.0, "limit": BAD_LINES_LIMIT * statistics.lines, "skip": float(statistics.lines)}
    if statistics.bad_lines > most[bad_lines]:
        raise DataError(
            f"output ({folder}) was built without {statistics.bad_lines} bad line(s) of {statistics.lines}, listed in "
            f"{BAD_LINES_NAME}; accept that with bad_lines = skip, or mend them and build anew"
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


def _group_parts(files: Sequence[ScannedFile], *, part_bytes: int) -> list[tuple[Part, ...]]:
    """What becomes one token shard each; texts and Megatron datasets never come together."""
    runs = [list(run) for _, run in itertools.groupby(files, key=lambda file: is_prefix(file.path))]
    return [group for run in runs for group in group_parts(run, part_bytes=part_bytes)]


def _most_lines(files: Sequence[ScannedFile]) -> int | None:
    """At most so many lines are in all files; None where that is not known before they are read."""
    lines = [0 if is_prefix(file.path) else file.most_lines for file in files]
    return None if None in lines else sum(count or 0 for count in lines)


def _make_shard(task: TokenizeTask, advance: Advance) -> TokenShard:
    return copy_documents(task, advance) if is_prefix(task.parts[0].path) else tokenize_shard(task, advance)


def _tokenize(
    pool: Workers, tasks: list[TokenizeTask], *, total: int, most_lines: int | None, listing: Path
) -> tuple[list[TokenShard], LineReport]:
    """Run all tasks; bad lines are listed in the file `listing`. Raises DataError, with those seen, at the end of the
    file from which on the policy does not allow them.
    """
    shards: list[TokenShard] = []
    report = LineReport()
    last_task = {part.path: index for index, task in enumerate(tasks) for part in task.parts}
    judged_after = len(tasks) - 1  # the task that ends the first file with bad lines
    with storage_errors(listing), listing.open("w", encoding="utf-8") as stream:
        for index, shard in enumerate(pool.run("tokenize", _make_shard, tasks, total=total, unit="bytes")):
            shards.append(shard)
            if shard.report.bad_lines and not report.bad_lines:
                judged_after = min(last_task[path] for path in _bad_files(tasks[index], shard.report))
            report.add(shard.report)
            stream.writelines(f"{line}\n" for line in shard.report.listed)
            if more := shard.report.bad_lines - len(shard.report.listed):
                stream.write(f"{tasks[index].parts[-1].path}: {more} more\n")
            if index >= judged_after:
                _judge(report, policy=tasks[index].bad_lines, most_lines=most_lines)
    if tasks and tasks[0].bad_lines == "limit":
        report.raise_if_too_bad()
    return shards, report


def _bad_files(task: TokenizeTask, report: LineReport) -> list[str]:
    """The files of one task that have bad lines."""
    return [path for path in {part.path for part in task.parts} if any(x.startswith(f"{path}:") for x in report.listed)]


def _judge(report: LineReport, *, policy: BadLinePolicy, most_lines: int | None) -> None:
    """Raises DataError where what is known so far breaks the policy."""
    if policy == "fail":
        report.raise_if_bad()
    if policy == "limit" and most_lines is not None:
        report.raise_if_too_bad(most_lines=most_lines)


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
        lines=report.lines,
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
    if manifest.bad_lines is not None:
        replace(work / BAD_LINES_NAME, folder / BAD_LINES_NAME)
    write_manifest(folder, manifest)
    shutil.rmtree(work)


def _verify_shard(folder: Path, shard: ShardEntry, *, bucket: int, manifest: Manifest) -> None:
    prefix = folder / shard.name
    _verify_file(bin_path(prefix), size=shard.bin_bytes, sha256=shard.bin_sha256)
    _verify_file(idx_path(prefix), size=shard.idx_bytes, sha256=shard.idx_sha256)
    reader = IndexedReader(prefix)
    if shard.trace is not None:
        _verify_file(folder / shard.trace.name, size=shard.trace.size, sha256=shard.trace.sha256)
        files = read_rows(prefix, num_sequences=reader.num_sequences)["file"]
        if files.min() < 0 or files.max() >= len(manifest.inputs):
            raise DataError(f"{folder / shard.trace.name} names inputs that the manifest does not list; build it again")
    reader.verify(vocab_size=manifest.tokenizer.vocab_size)
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(reader.sequence_lengths, dtype=np.int64)])
    lengths = np.diff(ends[reader.document_indices])
    if (reader.dtype.name, reader.num_documents, reader.num_tokens) != (manifest.dtype, shard.samples, shard.tokens):
        raise DataError(f"{prefix} holds other counts or another type of ids than the manifest says; build it again")
    if lengths.min() < 1 or lengths.max() > bucket:
        raise DataError(f"{prefix} holds samples of {lengths.min()} to {lengths.max()} tokens in bucket {bucket}")


def _verify_file(path: Path, *, size: int, sha256: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; copy or build it again")
    if path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}: it was cut or grown")
    if file_sha256(path) != sha256:
        raise DataError(f"{path} is damaged: its checksum is not the manifest's; copy or build it again")
