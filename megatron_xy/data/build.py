"""`data build`: a corpus -> a data folder of packed samples, through token shards.

Everything grows in OUTPUT/.tmp-tokens under receipts, so that the same command goes on after a kill; sources move to
their place when all is done, and the manifest is written last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from megatron_xy.data.documents import BAD_LINES_LIMIT, BadLinePolicy, LineReport, Part, ScannedFile
from megatron_xy.data.engine_choice import EngineChoice, choose_engine
from megatron_xy.data.examine import dataset_stats
from megatron_xy.data.indexed import dtype_for
from megatron_xy.data.inputs import find_inputs, input_size, is_prefix, scan_file
from megatron_xy.data.manifest import (
    BAD_LINES_NAME,
    MANIFEST_NAME,
    BucketEntry,
    EngineEntry,
    InputEntry,
    Manifest,
    SourceEntry,
    Statistics,
    TokenizerEntry,
    file_entry,
    read_manifest,
    write_manifest,
)
from megatron_xy.data.packing import (
    WINDOW_DOCUMENTS,
    Overflow,
    Packing,
    PackReceipt,
    check_buckets,
    check_policy,
    pack_shard,
    pack_tasks,
)
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
    read_receipt,
    tokenize_shard,
)
from megatron_xy.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from megatron_xy.data.work_folder import WORK_FOLDER, WorkFolderBusy, shared_work_folder, work_folder
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import replace, storage_error, storage_errors, write_text

DEFAULT_BUCKETS = (2048, 4096, 8192, 16384)
WORK_FORMAT = 2  # of what an unfinished build leaves there: another version starts over


@dataclass(frozen=True)
class Share:
    """One of `count` shares of the work of tokenising, numbered from 0."""

    index: int
    count: int

    @staticmethod
    def parse(text: str) -> Share:
        """I/N with I from 0 to N - 1, or from 1 to N: either way of counting covers all shares. Raises ConfigError."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(count) >= 1 and int(index) <= int(count)):
            raise ConfigError(f"shard ({text}) must be I/N, such as 0/8 to 7/8")
        return Share(int(index) % int(count), int(count))


@dataclass(frozen=True)
class Dropped:
    """What an overflow policy left out, over all sources."""

    documents: int
    tokens: int


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
    packing: Packing = "best_fit",
    overflow: Overflow = "split",
    shard: Share | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise and pack a corpus into the data folder `output`; returns `dataset_stats`, "finished" and "reused".

    shard: tokenise this share only, and finish the data set if all other shares are there; else "finished" is false and
    nothing but "missing", the number of token shards not made yet, is returned. Shares may run on several machines that
    see the same folders.

    The result is the same for any number of workers. Killed at any moment, the same call goes on where it was; where
    it is already finished, nothing is done and "reused" is true. `bad_lines` (see BadLinePolicy): all that are left
    out are counted and listed in OUTPUT/bad_lines.txt. `packing` and `overflow`: see packing.py.
    `progress(phase, done, total, unit)` is called about twice a second.
    Raises ConfigError (arguments, paths, another data set in `output`), DataError (corpus, tokenizer), StorageError.
    """
    sizes = check_buckets(buckets)
    check_policy(packing, overflow, buckets=sizes)
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
        "packing": packing,
        "overflow": overflow,
        "work_format": WORK_FORMAT,
    }
    with Workers(workers, progress=progress) as pool:
        total = sum(input_size(file) for file in files)
        part_bytes = part_bytes_for(total)
        to_scan = [(file, index, part_bytes) for index, file in enumerate(files)]
        scanned = list(pool.run("scan", _scan, to_scan, total=total, unit="bytes"))
        fingerprint = _fingerprint(scanned, tokenizer=loaded, options=options)
        if (folder / MANIFEST_NAME).is_file():
            return _reuse(folder, fingerprint, bad_lines=bad_lines)
        tasks = [
            TokenizeTask(
                folder=folder / WORK_FOLDER / "tokens" / f"{index:06d}",
                parts=parts,
                tokenizer=loaded.path,
                text_field=text_field,
                source_field=source_field,
                append_eod=append_eod,
                bad_lines=bad_lines,
            )
            for index, parts in enumerate(_group_parts(scanned, part_bytes=part_bytes))
        ]
        texts = [task for task in tasks if not is_prefix(task.parts[0].path)]
        engine = choose_engine(loaded, texts) if texts else None
        if engine is not None:
            tasks = [replace_fields(task, fast=engine.fast) for task in tasks]
        if shard is not None:
            with shared_work_folder(folder, fingerprint) as work:
                missing = _tokenize_share(pool, tasks, shard=shard, most_lines=_most_lines(scanned), work=work)
            if missing:
                return {"finished": False, "missing": missing}
        build = _Build(folder, fingerprint, scanned, loaded, options, engine)
        try:
            with work_folder(folder, fingerprint) as work:
                if (folder / MANIFEST_NAME).is_file():  # by another share, meanwhile
                    return _reuse(folder, fingerprint, bad_lines=bad_lines)
                _finish(pool, tasks, build=build, work=work, total=total)
        except WorkFolderBusy:
            if shard is None:
                raise
            return {"finished": False, "missing": 0}  # another share is finishing
    return {**dataset_stats(folder), "finished": True, "reused": False}


@dataclass(frozen=True)
class _Build:
    """What is settled before the work begins."""

    folder: Path
    fingerprint: str
    scanned: list[ScannedFile]
    tokenizer: Tokenizer
    options: dict[str, Any]
    engine: EngineChoice | None


def _tokenize_share(
    pool: Workers, tasks: list[TokenizeTask], *, shard: Share, most_lines: int | None, work: Path
) -> int:
    """Make the token shards of one share; returns how many of all are not there yet."""
    mine = tasks[shard.index :: shard.count]
    total = sum(part.stop - part.start for task in mine for part in task.parts)
    _tokenize(pool, mine, total=total, most_lines=most_lines, listing=work / f"bad_lines-{shard.index}.txt")
    return sum(read_receipt(task.folder) is None for task in tasks)


def _finish(pool: Workers, tasks: list[TokenizeTask], *, build: _Build, work: Path, total: int) -> None:
    """Make the token shards that are missing, pack, and give the data folder its contents, the manifest last."""
    options, tokenizer = build.options, build.tokenizer
    listing = work / BAD_LINES_NAME
    tokenized, report = _tokenize(pool, tasks, total=total, most_lines=_most_lines(build.scanned), listing=listing)
    sources, dropped = _pack(
        pool,
        tokenized,
        work=work,
        buckets=tuple(options["buckets"]),
        packing=options["packing"],
        overflow=options["overflow"],
    )
    manifest = Manifest(
        fingerprint=build.fingerprint,
        buckets=options["buckets"],
        append_eod=options["append_eod"],
        text_field=options["text_field"],
        source_field=options["source_field"],
        packing=options["packing"],
        overflow=options["overflow"],
        tokenizer=_tokenizer_entry(tokenizer),
        engine=EngineEntry(**build.engine.entry(tokenized)) if build.engine is not None else None,
        dtype="uint16" if dtype_for(tokenizer.vocab_size).itemsize == 2 else "int32",
        inputs=[InputEntry(path=file.path, size=file.size, sha256=file.sha256) for file in build.scanned],
        sources=sources,
        statistics=_statistics(sources, report, dropped=dropped),
        bad_lines=file_entry(listing, folder=work) if report.bad_lines else None,
    )
    _publish(build.folder, work=work, manifest=manifest, tokenizer=tokenizer)


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
    return {**dataset_stats(folder), "finished": True, "reused": True}


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
    pool: Workers,
    tokenized: Sequence[TokenShard],
    *,
    work: Path,
    buckets: tuple[int, ...],
    packing: Packing,
    overflow: Overflow,
) -> tuple[dict[str, SourceEntry], Dropped]:
    """Pack each source by itself, in the order of the names; a source of which nothing is left has no entry.

    Raises DataError where there is nothing to pack, or nothing left of it.
    """
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
            packing=packing,
            overflow=overflow,
        )
    ]
    total = sum(sum(shard.documents.values()) for shard in tokenized)
    receipts: dict[str, list[PackReceipt]] = {name: [] for name in names}
    for task, receipt in zip(tasks, pool.run("pack", pack_shard, tasks, total=total, unit="documents"), strict=True):
        receipts[task.source].append(receipt)
    entries = {name: _source_entry(of_source, buckets) for name, of_source in receipts.items()}
    sources = {name: entry for name, entry in entries.items() if entry is not None}
    if not sources:
        raise DataError(f"overflow ({overflow}) leaves nothing: every document is longer than {buckets[-1]} tokens")
    every = [receipt for of_source in receipts.values() for receipt in of_source]
    dropped = Dropped(
        documents=sum(receipt.dropped_documents for receipt in every),
        tokens=sum(receipt.tokens_lost for receipt in every),
    )
    return sources, dropped


def _source_entry(receipts: Sequence[PackReceipt], buckets: Sequence[int]) -> SourceEntry | None:
    entries: dict[str, BucketEntry] = {}
    for size in (str(bucket) for bucket in buckets):
        shards = [receipt.shards[size] for receipt in receipts if size in receipt.shards]
        if shards:
            samples, tokens = sum(shard.samples for shard in shards), sum(shard.tokens for shard in shards)
            entries[size] = BucketEntry(samples=samples, tokens=tokens, shards=shards)
    if not entries:
        return None
    return SourceEntry(
        documents=sum(receipt.documents for receipt in receipts),
        truncated_documents=sum(receipt.truncated_documents for receipt in receipts),
        dropped_documents=sum(receipt.dropped_documents for receipt in receipts),
        tokens=sum(receipt.tokens for receipt in receipts),
        tokens_lost=sum(receipt.tokens_lost for receipt in receipts),
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


def _statistics(sources: dict[str, SourceEntry], report: LineReport, *, dropped: Dropped) -> Statistics:
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
        dropped_documents=dropped.documents,
        tokens_lost=dropped.tokens,
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
