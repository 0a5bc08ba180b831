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
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from megatron_xy.data.deduplicate import DUPLICATES_FOLDER, find_duplicates
from megatron_xy.data.documents import BAD_LINES_LIMIT, BadLinePolicy, Part, ScannedFile
from megatron_xy.data.engine_choice import EngineChoice, choose_engine
from megatron_xy.data.examine import dataset_stats
from megatron_xy.data.indexed import dtype_for
from megatron_xy.data.inputs import find_inputs, input_size, is_prefix, scan_file
from megatron_xy.data.manifest import (
    BAD_LINES_NAME,
    HELD_OUT_NAME,
    MANIFEST_NAME,
    EngineEntry,
    InputEntry,
    Manifest,
    file_entry,
    read_manifest,
    write_manifest,
)
from megatron_xy.data.pack_sources import pack_sources, statistics_entry, tokenizer_entry
from megatron_xy.data.packing import (
    WINDOW_DOCUMENTS,
    Overflow,
    Packing,
    check_buckets,
    check_policy,
)
from megatron_xy.data.selection import MOST_FILES, Selection
from megatron_xy.data.token_shards import make_token_shards
from megatron_xy.data.tokenize import TokenizeTask, group_parts, part_bytes_for, read_receipt
from megatron_xy.data.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.data.work_folder import WORK_FOLDER, WorkFolderBusy, shared_work_folder, work_folder
from megatron_xy.data.workers import Advance, Progress, Workers
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import replace, storage_error, write_text

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
    deduplicate: bool = False,
    held_out: float = 0.0,
    shard: Share | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise and pack a corpus into the data folder `output`; returns `dataset_stats`, "finished" and "reused".

    deduplicate: of documents with the same text, over all inputs, the first one stays. held_out: this fraction of the
    documents, chosen by the hash of their text, goes into OUTPUT/held_out, a data folder of its own.

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
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out ({held_out}) must be a fraction from 0 to below 1, such as 0.01")
    files = find_inputs(inputs)
    _check_selection(files, deduplicate=deduplicate, held_out=held_out)
    folder = Path(output)
    _check_output(folder, inputs, held_out=held_out)
    options = {
        "buckets": list(sizes),
        "append_eod": append_eod,
        "text_field": text_field,
        "source_field": source_field,
        "window_documents": WINDOW_DOCUMENTS,
        "packing": packing,
        "overflow": overflow,
        "deduplicate": deduplicate,
        "work_format": WORK_FORMAT,
    }
    with Workers(workers, progress=progress) as pool:
        total = sum(input_size(file) for file in files)
        part_bytes = part_bytes_for(total)
        to_scan = [(file, index, part_bytes) for index, file in enumerate(files)]
        scanned = list(pool.run("scan", _scan, to_scan, total=total, unit="bytes"))
        groups = _group_parts(scanned, part_bytes=part_bytes)
        main = Selection(held_out_fraction=held_out)
        sides = {folder: main}
        if held_out:  # the held-out data first, so that a finished data set has its held-out part
            sides = {folder / HELD_OUT_NAME: replace_fields(main, held_out=True), folder: main}
        results = [
            _build_side(
                pool,
                groups,
                build=_Build(side, scanned, loaded, {**options, "selection": asdict(selection)}, selection, bad_lines),
                shard=shard,
            )
            for side, selection in sides.items()
        ]
    if not all(result["finished"] for result in results):
        return {"finished": False, "missing": sum(result.get("missing", 0) for result in results)}
    return results[-1]


@dataclass(frozen=True)
class _Build:
    """What is settled before the work on one data folder begins."""

    folder: Path
    scanned: list[ScannedFile]
    tokenizer: Tokenizer
    options: dict[str, Any]
    selection: Selection
    bad_lines: BadLinePolicy

    @property
    def fingerprint(self) -> str:
        """Equal where the result would be."""
        return _fingerprint(self.scanned, tokenizer=self.tokenizer, options=self.options)


def _build_side(
    pool: Workers, groups: Sequence[tuple[Part, ...]], *, build: _Build, shard: Share | None
) -> dict[str, Any]:
    """Build one data folder of the documents that `build.selection` takes; returns what `build_dataset` does."""
    folder, fingerprint = build.folder, build.fingerprint
    if (folder / MANIFEST_NAME).is_file():
        return _reuse(folder, fingerprint, bad_lines=build.bad_lines)
    tasks = _tokenize_tasks(groups, build=build)
    texts = [task for task in tasks if not is_prefix(task.parts[0].path)]
    engine = choose_engine(build.tokenizer, texts) if texts else None
    if engine is not None:
        tasks = [replace_fields(task, fast=engine.fast) for task in tasks]
    if shard is not None:
        with shared_work_folder(folder, fingerprint) as work:
            _find_duplicates(pool, groups, build=build, work=work)
            missing = _tokenize_share(pool, tasks, shard=shard, most_lines=_most_lines(build.scanned), work=work)
        if missing:
            return {"finished": False, "missing": missing}
    try:
        with work_folder(folder, fingerprint) as work:
            if (folder / MANIFEST_NAME).is_file():  # by another share, meanwhile
                return _reuse(folder, fingerprint, bad_lines=build.bad_lines)
            _find_duplicates(pool, groups, build=build, work=work)
            _finish(pool, tasks, build=build, engine=engine, work=work)
    except WorkFolderBusy:
        if shard is None:
            raise
        return {"finished": False, "missing": 0}  # another share is finishing
    return {**dataset_stats(folder), "finished": True, "reused": False}


def _tokenize_tasks(groups: Sequence[tuple[Part, ...]], *, build: _Build) -> list[TokenizeTask]:
    """One task a token shard, its parts told which documents to take."""
    work, options, selection = build.folder / WORK_FOLDER, build.options, build.selection
    if options["deduplicate"]:
        selection = replace_fields(selection, duplicates=str(work / DUPLICATES_FOLDER))
    taken = None if selection == Selection() else selection
    return [
        TokenizeTask(
            folder=work / "tokens" / f"{index:06d}",
            parts=tuple(replace_fields(part, selection=taken) for part in parts),
            tokenizer=build.tokenizer.path,
            text_field=options["text_field"],
            source_field=options["source_field"],
            append_eod=options["append_eod"],
            bad_lines=build.bad_lines,
        )
        for index, parts in enumerate(groups)
    ]


def _find_duplicates(pool: Workers, groups: Sequence[tuple[Part, ...]], *, build: _Build, work: Path) -> None:
    options = build.options
    if options["deduplicate"]:
        find_duplicates(pool, groups, work=work, text_field=options["text_field"], source_field=options["source_field"])


def _tokenize_share(
    pool: Workers, tasks: list[TokenizeTask], *, shard: Share, most_lines: int | None, work: Path
) -> int:
    """Make the token shards of one share; returns how many of all are not there yet."""
    mine = tasks[shard.index :: shard.count]
    total = sum(part.stop - part.start for task in mine for part in task.parts)
    make_token_shards(pool, mine, total=total, most_lines=most_lines, listing=work / f"bad_lines-{shard.index}.txt")
    return sum(read_receipt(task.folder) is None for task in tasks)


def _finish(
    pool: Workers, tasks: list[TokenizeTask], *, build: _Build, engine: EngineChoice | None, work: Path
) -> None:
    """Make the token shards that are missing, pack, and give the data folder its contents, the manifest last."""
    options, tokenizer = build.options, build.tokenizer
    listing = work / BAD_LINES_NAME
    total = sum(file.size for file in build.scanned)
    most_lines = _most_lines(build.scanned)
    tokenized, report = make_token_shards(pool, tasks, total=total, most_lines=most_lines, listing=listing)
    sources, dropped = pack_sources(
        pool,
        tokenized,
        work=work,
        buckets=tuple(options["buckets"]),
        packing=options["packing"],
        overflow=options["overflow"],
        window_documents=options["window_documents"],
    )
    manifest = Manifest(
        fingerprint=build.fingerprint,
        buckets=options["buckets"],
        append_eod=options["append_eod"],
        text_field=options["text_field"],
        source_field=options["source_field"],
        packing=options["packing"],
        overflow=options["overflow"],
        tokenizer=tokenizer_entry(tokenizer),
        engine=EngineEntry(**engine.entry(tokenized)) if engine is not None else None,
        dtype="uint16" if dtype_for(tokenizer.vocab_size).itemsize == 2 else "int32",
        inputs=[InputEntry(path=file.path, size=file.size, sha256=file.sha256) for file in build.scanned],
        sources=sources,
        statistics=statistics_entry(sources, report, dropped=dropped),
        bad_lines=file_entry(listing, folder=work) if report.bad_lines else None,
    )
    _publish(build.folder, work=work, manifest=manifest, tokenizer=tokenizer)


def _check_selection(files: Sequence[Path], *, deduplicate: bool, held_out: float) -> None:
    tokens = [file for file in files if is_prefix(file)]
    if tokens and (deduplicate or held_out):
        raise ConfigError(
            f"deduplicate and held_out look at texts, and input ({tokens[0]}) holds tokens; build from the texts"
        )
    if len(files) >= MOST_FILES:
        raise ConfigError(f"input names {len(files)} files, must be fewer than {MOST_FILES}; join small ones")


def _check_output(folder: Path, inputs: Sequence[Path | str], *, held_out: float) -> None:
    """The output folder is new, empty, finished, or of an unfinished build; and no input folder holds it."""
    for given in inputs:
        if Path(given).is_dir() and folder.resolve().is_relative_to(Path(given).resolve()):
            raise ConfigError(f"output ({folder}) lies inside the input {given}; name a folder elsewhere")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output ({folder}) is a file; name a folder")
    if not held_out and (folder / HELD_OUT_NAME).exists():
        raise ConfigError(f"output ({folder}) holds a {HELD_OUT_NAME} of a build with held_out; name another folder")
    begun = [folder / name for name in (MANIFEST_NAME, WORK_FOLDER)]
    begun += [folder / HELD_OUT_NAME / name for name in (MANIFEST_NAME, WORK_FOLDER)]
    ours = any(path.exists() for path in begun)
    if folder.is_dir() and not ours and any(folder.iterdir()):
        raise ConfigError(f"output ({folder}) holds other files; name a new or empty folder")


def _scan(task: tuple[Path, int, int], advance: Advance) -> ScannedFile:
    path, index, part_bytes = task
    return scan_file(path, part_bytes=part_bytes, file=index, advance=advance)


def _fingerprint(scanned: Sequence[ScannedFile], *, tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """Equal where the result would be: over contents and kinds of the inputs in order, tokenizer and options."""
    kinds = [Path(file.path).suffixes[-1:] for file in scanned]
    content = [[kind, file.size, file.sha256] for kind, file in zip(kinds, scanned, strict=True)]
    settled = [content, tokenizer.sha256, tokenizer.eos_id, options]
    return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()


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


def _publish(folder: Path, *, work: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Move the sources to their place, then write the manifest; each step may already be done."""
    write_text(work / "publish.json", json.dumps(sorted(manifest.sources)))
    try:
        for name in manifest.sources:
            packed = work / "packed" / name
            if packed.exists():
                packed.rename(folder / name)
        copy = work / tokenizer.file_name
        shutil.copyfile(tokenizer.path, copy)
    except OSError as error:
        raise storage_error(folder, error) from error
    replace(copy, folder / tokenizer.file_name)
    if manifest.bad_lines is not None:
        replace(work / BAD_LINES_NAME, folder / BAD_LINES_NAME)
    write_manifest(folder, manifest)
    shutil.rmtree(work)
