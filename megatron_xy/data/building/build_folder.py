"""One data folder of a build: tokens of the selected documents, packed, published with the manifest last.

Everything grows in FOLDER/.tmp-tokens under receipts, so that the same command goes on after a kill. Any number of
builds do this together, on one machine or several: each task is claimed by one of them, and one of them publishes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from megatron_xy.data.building.claims import CLAIMS_FOLDER, claim
from megatron_xy.data.building.deduplicate import DUPLICATES_FOLDER, find_duplicates
from megatron_xy.data.building.engine_choice import choose_engine, with_checked
from megatron_xy.data.building.options import BuildOptions, Share
from megatron_xy.data.building.pack_sources import pack_sources, statistics_entry, tokenizer_entry
from megatron_xy.data.building.token_shards import make_token_shards
from megatron_xy.data.building.tokenize import TokenizeTask, read_receipt
from megatron_xy.data.building.work_folder import WORK_FOLDER, sweep, work_folder
from megatron_xy.data.building.workers import Workers
from megatron_xy.data.chat.encode import ChatOptions
from megatron_xy.data.corpus.documents import BAD_LINES_LIMIT, Part, ScannedFile
from megatron_xy.data.corpus.inputs import is_prefix
from megatron_xy.data.corpus.row_contents import DEFAULT_SOURCE, RowFields
from megatron_xy.data.corpus.selection import Selection
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.indexed import dtype_for
from megatron_xy.data.inspection.examine import dataset_stats
from megatron_xy.data.manifest import (
    BAD_LINES_NAME,
    MANIFEST_NAME,
    ChatEntry,
    EngineEntry,
    InputEntry,
    Manifest,
    file_entry,
    read_manifest,
    write_manifest,
)
from megatron_xy.data.packing.pack import WINDOW_DOCUMENTS
from megatron_xy.errors import ConfigError, DataError, MegatronXYError
from megatron_xy.storage import (
    TEMPORARY_PREFIX,
    file_sha256,
    replace,
    storage_error,
    storage_errors,
    write_text,
)

WORK_FORMAT = 2  # of what an unfinished build leaves there: another version starts over


@dataclass(frozen=True)
class FolderBuild:
    """What is settled before the work on one data folder begins."""

    folder: Path
    scanned: list[ScannedFile]
    tokenizer: Tokenizer
    options: BuildOptions
    chat: ChatOptions | None
    selection: Selection

    @property
    def fields(self) -> RowFields:
        """Where rows hold what."""
        return RowFields(
            text=self.options.text_field,
            source=self.options.source_field,
            source_optional=self.options.source_optional,
            conversations=self.chat is not None,
            default_source=self.options.source,
        )

    @property
    def most_lines(self) -> int | None:
        """At most so many lines are there in all; None: it is not known before they are read."""
        lines = [file.most_lines for file in self.scanned]
        return None if None in lines else sum(count or 0 for count in lines)

    @property
    def fingerprint(self) -> str:
        """Equal where the result would be: over contents and kinds of the inputs in order, tokenizer and options.

        Without bad_lines and source_optional, which decide whether a line is left out: it is known which were.
        """
        kinds = [Path(file.path).suffixes[-1:] for file in self.scanned]
        content = [[kind, file.size, file.sha256] for kind, file in zip(kinds, self.scanned, strict=True)]
        options = {
            "buckets": list(self.options.buckets),
            "append_eod": self.options.append_eod,
            "text_field": self.options.text_field,
            "source_field": self.options.source_field,
            "window_documents": WINDOW_DOCUMENTS,
            "packing": self.options.packing,
            "overflow": self.options.overflow,
            "deduplicate": self.options.deduplicate,
            "work_format": WORK_FORMAT,
            "selection": asdict(self.selection),
            **({} if self.options.source == DEFAULT_SOURCE else {"source": self.options.source}),
            **({} if self.chat is None else {"chat": asdict(self.chat)}),
        }
        settled: list[Any] = [content, self.tokenizer.sha256, self.tokenizer.eos_id, options]
        if self.tokenizer.config_path is not None:
            settled.append(file_sha256(self.tokenizer.config_path))
        return hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()


def build_folder(
    pool: Workers, groups: Sequence[tuple[Part, ...]], *, build: FolderBuild, shard: Share | None
) -> dict[str, Any]:
    """Build one data folder of the documents that `build.selection` takes; returns what `build_dataset` does.

    groups: the parts of the corpus that become one token shard each. Raises as `build_dataset` does.
    """
    if _is_finished(build.folder):
        return _reuse(build)
    tasks = _tokenize_tasks(groups, build=build)
    texts = [task for task in tasks if not is_prefix(task.parts[0].path)]
    engine = choose_engine(build.tokenizer, texts) if texts else None
    if engine is not None:
        tasks = [replace_fields(task, fast=engine.is_fast) for task in tasks]
    try:
        with work_folder(build.folder, build.fingerprint) as work:
            if build.options.deduplicate:
                find_duplicates(pool, groups, work=work, fields=build.fields)
            if shard is not None:
                mine = tasks[shard.index :: shard.count]
                make_token_shards(pool, mine, most_lines=build.most_lines, work=work)
                if missing := sum(read_receipt(task.folder) is None for task in tasks):
                    return {"finished": False, "missing": missing}
            reused = not _finish(pool, tasks, build=build, engine=engine, work=work)
    except (MegatronXYError, FileNotFoundError):
        if not _is_finished(build.folder):
            raise
        return _reuse(build)  # another build finished it, and may have cleared away what this one was looking for
    return _reuse(build) if reused else {**dataset_stats(build.folder), "finished": True, "reused": False}


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _tokenize_tasks(groups: Sequence[tuple[Part, ...]], *, build: FolderBuild) -> list[TokenizeTask]:
    """One task a token shard, its parts told which documents to take."""
    work, options, selection = build.folder / WORK_FOLDER, build.options, build.selection
    if options.deduplicate:
        selection = replace_fields(selection, duplicates=str(work / DUPLICATES_FOLDER))
    return [
        TokenizeTask(
            folder=work / "tokens" / f"{index:06d}",
            parts=tuple(replace_fields(part, selection=selection) for part in parts),
            tokenizer=build.tokenizer.path,
            fields=build.fields,
            append_eod=options.append_eod,
            bad_lines=options.bad_lines,
            chat=build.chat,
        )
        for index, parts in enumerate(groups)
    ]


def _finish(
    pool: Workers, tasks: list[TokenizeTask], *, build: FolderBuild, engine: EngineEntry | None, work: Path
) -> bool:
    """Make the token shards that are missing, pack, and give the data folder its contents, the manifest last; returns
    whether it was this build that did the last step.
    """
    options, tokenizer, chat = build.options, build.tokenizer, build.chat
    tokenized, report, listing = make_token_shards(pool, tasks, most_lines=build.most_lines, work=work)
    if options.bad_lines == "limit":
        report.raise_if_too_bad()
    if not any(shard.documents for shard in tokenized):
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # where there was more in it before
            build.folder.rmdir()
        raise DataError("no document with text is left; check the text field, the files and held_out")
    sources, receipts = pack_sources(pool, tokenized, work=work, options=options, window_documents=WINDOW_DOCUMENTS)
    manifest = Manifest(
        fingerprint=build.fingerprint,
        buckets=list(options.buckets),
        append_eod=options.append_eod,
        text_field=options.text_field,
        source_field=options.source_field,
        packing=options.packing,
        overflow=options.overflow,
        chat=ChatEntry.model_validate(chat, from_attributes=True) if chat is not None else None,
        tokenizer=tokenizer_entry(tokenizer),
        engine=with_checked(engine, tokenized) if engine is not None else None,
        dtype="uint16" if dtype_for(tokenizer.vocab_size).itemsize == 2 else "int32",
        inputs=[InputEntry.model_validate(file, from_attributes=True) for file in build.scanned],
        sources=sources,
        statistics=statistics_entry(sources, report, receipts),
        bad_lines=file_entry(listing, name=BAD_LINES_NAME) if report.bad_lines else None,
    )
    with claim(work / CLAIMS_FOLDER / "publish", wait=True):
        if _is_finished(build.folder):
            return False
        _publish(build.folder, work=work, manifest=manifest, tokenizer=tokenizer, listing=listing)
        return True


def _reuse(build: FolderBuild) -> dict[str, Any]:
    folder = build.folder
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)  # of no more use, whosever it is
    manifest = read_manifest(folder)
    if manifest.fingerprint != build.fingerprint:
        raise ConfigError(
            f"output ({folder}) holds a finished data set of other inputs or options; name a new folder, or remove it"
        )
    statistics = manifest.statistics
    most = {"fail": 0.0, "limit": BAD_LINES_LIMIT * statistics.lines, "skip": float(statistics.lines)}
    if statistics.bad_lines > most[build.options.bad_lines]:
        raise DataError(
            f"output ({folder}) was built without {statistics.bad_lines} bad line(s) of {statistics.lines}, listed in "
            f"{BAD_LINES_NAME}; accept that with --bad-lines skip, or mend them and build anew"
        )
    return {**dataset_stats(folder), "finished": True, "reused": True}


def _publish(folder: Path, *, work: Path, manifest: Manifest, tokenizer: Tokenizer, listing: Path) -> None:
    """Move the sources to their place, then write the manifest; each step may already be done."""
    sweep(work / "packed")
    with storage_errors(folder):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.is_file():  # a manifest that a killed build had begun
                path.unlink()
    write_text(work / "publish.json", json.dumps(sorted(manifest.sources)))
    try:
        for name in manifest.sources:
            packed = work / "packed" / name
            if packed.exists():
                packed.rename(folder / name)
        files = {tokenizer.file_name: tokenizer.path}
        if tokenizer.config_path is not None:
            files[tokenizer.config_path.name] = tokenizer.config_path
        for name, path in files.items():
            shutil.copyfile(path, work / name)
            replace(work / name, folder / name)
    except OSError as error:
        raise storage_error(folder, error) from error
    if manifest.bad_lines is not None:
        replace(listing, folder / BAD_LINES_NAME)
    write_manifest(folder, manifest)
    shutil.rmtree(work, ignore_errors=True)  # others may still look at it; the next call clears what stays
