"""Documents -> token shards: each part of the corpus (about 8 MB) becomes one indexed file a source, by one worker.

Workers share nothing but files. The cut into shards depends on the corpus alone, so the result is the same for any
number of workers; a shard's receipt is written last, and a shard that has one is not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from megatron_xy.data.documents import BadLinePolicy, Document, LineReport, Part, ScannedFile, read_part
from megatron_xy.data.indexed import IndexedWriter, dtype_for
from megatron_xy.data.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.errors import EXIT_PEER_LOST, ConfigError, PeerLost
from megatron_xy.storage import write_text

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Progress = Callable[[str, int, int, str], None]  # phase, done, total, unit

PART_BYTES = 8 * 1024 * 1024
MOST_SHARDS = 10_000  # beyond 80 GB of text the parts grow instead
BATCH_CHARACTERS = 1_000_000  # handed to the tokenizer at a time
MOST_SOURCES = 256  # each has files of its own open while a shard is written
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class TokenizeTask:
    """One shard: parts of the corpus, and how to read and encode them. Output: FOLDER/SOURCE.{bin,idx}, FOLDER.json."""

    folder: Path
    parts: tuple[Part, ...]
    tokenizer: Path
    text_field: str
    source_field: str | None
    append_eod: bool
    bad_lines: BadLinePolicy


@dataclass(frozen=True)
class TokenShard:
    """The receipt of one finished shard; its sources in the order of their names."""

    folder: Path
    documents: dict[str, int]
    report: LineReport

    @staticmethod
    def receipt(folder: Path) -> Path:
        """FOLDER.json"""
        return folder.with_name(folder.name + ".json")


def part_bytes_for(total_bytes: int) -> int:
    """How many bytes a part has in a corpus of `total_bytes`."""
    return max(PART_BYTES, total_bytes // MOST_SHARDS)


def group_parts(files: Sequence[ScannedFile], *, part_bytes: int) -> list[tuple[Part, ...]]:
    """All parts in order, small neighbours together until they have `part_bytes`."""
    groups: list[tuple[Part, ...]] = []
    group: list[Part] = []
    size = 0
    for part in (part for file in files for part in file.parts):
        group.append(part)
        size += part.stop - part.start
        if size >= part_bytes:
            groups.append(tuple(group))
            group, size = [], 0
    return [*groups, tuple(group)] if group else groups


def tokenize_shard(task: TokenizeTask, advance: Advance) -> TokenShard:
    """Tokenise one shard, unless its receipt says that it is done. Memory: one batch of text and one document.

    Under "fail" nothing is encoded after the first bad line; all bad lines of the shard are in the report.
    Raises DataError (a damaged file), ConfigError (too many sources).
    """
    done = read_receipt(task.folder)
    if done is not None:
        advance(sum(part.stop - part.start for part in task.parts))
        return done
    tokenizer = _tokenizer(task.tokenizer)
    report = LineReport()
    with ExitStack() as stack:
        writers: dict[str, IndexedWriter] = {}
        for batch in _batches(task, report, advance):
            if report.bad_lines and task.bad_lines == "fail":
                continue
            _encode(batch, task=task, tokenizer=tokenizer, writers=writers, stack=stack, report=report)
    counts = {name: writers[name].num_documents for name in sorted(writers)}
    shard = TokenShard(task.folder, {name: count for name, count in counts.items() if count}, report)
    if not (report.bad_lines and task.bad_lines == "fail"):
        receipt = {"documents": shard.documents, "report": asdict(report)}
        task.folder.parent.mkdir(parents=True, exist_ok=True)
        write_text(TokenShard.receipt(task.folder), json.dumps(receipt))
    return shard


def read_receipt(folder: Path) -> TokenShard | None:
    """The receipt of the shard in `folder`, if it is finished."""
    path = TokenShard.receipt(folder)
    if not path.is_file():
        return None
    receipt = json.loads(path.read_text(encoding="utf-8"))
    return TokenShard(folder, receipt["documents"], LineReport(**receipt["report"]))


def _batches(task: TokenizeTask, report: LineReport, advance: Advance) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for part in task.parts:
        documents = read_part(
            part, text_field=task.text_field, source_field=task.source_field, report=report, advance=advance
        )
        for document in documents:
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    yield batch


def _encode(
    batch: list[Document],
    *,
    task: TokenizeTask,
    tokenizer: Tokenizer,
    writers: dict[str, IndexedWriter],
    stack: ExitStack,
    report: LineReport,
) -> None:
    """Append a batch to the writers of its sources, which are opened as sources turn up."""
    dtype = dtype_for(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_id] if task.append_eod else [], dtype=dtype)
    by_source: dict[str, list[np.ndarray[Any, Any]]] = {}
    for document, tokens in zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True):
        if len(tokens):
            by_source.setdefault(document.source, []).append(np.concatenate([tokens.astype(dtype), end]))
        else:
            report.skipped_empty += 1
    for source, documents in by_source.items():
        if source not in writers:
            if len(writers) == MOST_SOURCES:
                raise ConfigError(
                    f"source_field ({task.source_field}) names more than {MOST_SOURCES} sources in "
                    f"{batch[0].path}; name a field that says where a text comes from, not which it is"
                )
            writers[source] = stack.enter_context(IndexedWriter(task.folder / source, dtype=dtype))
        lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
        writers[source].add_documents(np.concatenate(documents), lengths=lengths)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """Loaded once a process."""
    return load_tokenizer(path)


class Workers:
    """Runs tasks in `count` spawned processes (in this one, if 1) and reports progress; a context manager."""

    def __init__(self, count: int, *, progress: Progress | None) -> None:
        if count < 1:
            raise ConfigError(f"workers ({count}) must be at least 1")
        self._count = count
        self._progress = progress
        self._executor: ProcessPoolExecutor | None = None
        self._shared_done: Any = None

    def __enter__(self) -> Workers:
        if self._count > 1:
            context = multiprocessing.get_context("spawn")
            self._shared_done = context.Value("q", 0)
            self._executor = ProcessPoolExecutor(
                self._count, mp_context=context, initializer=_start_worker, initargs=(self._shared_done,)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(
        self, phase: str, function: Callable[[Task, Advance], Result], tasks: Sequence[Task], *, total: int, unit: str
    ) -> Iterator[Result]:
        """The results of function(task, advance), in the order of the tasks; `advance(n)` adds to the progress.

        `function` and its tasks travel to other processes. Raises what a task raised, and PeerLost where a worker
        process was killed.
        """
        report = _Ticker(self._progress, phase, total, unit)
        report.tick(0, force=True)
        if self._executor is None:
            for task in tasks:
                yield function(task, report.advance)
        else:
            yield from self._run_apart(self._executor, function, tasks, report)
        report.tick(total, force=True)

    def _run_apart(
        self,
        executor: ProcessPoolExecutor,
        function: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        report: _Ticker,
    ) -> Iterator[Result]:
        self._shared_done.value = 0
        waiting: deque[Future[Result]] = deque()
        left = iter(tasks)
        try:
            while True:
                while len(waiting) < 4 * self._count and (task := next(left, None)) is not None:
                    waiting.append(executor.submit(_call, function, task))
                if not waiting:
                    return
                while not wait([waiting[0]], timeout=PROGRESS_SECONDS).done:
                    report.tick(self._shared_done.value)
                report.tick(self._shared_done.value)
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise PeerLost(
                "a worker process of the build was killed (out of memory?); run the same command again with fewer "
                "workers: it goes on where it was"
            ) from error


class _Ticker:
    """Calls the progress function at most every half second."""

    def __init__(self, progress: Progress | None, phase: str, total: int, unit: str) -> None:
        self._progress, self._phase, self._total, self._unit = progress, phase, total, unit
        self._done = 0
        self._last = 0.0

    def advance(self, amount: int) -> None:
        self._done += amount
        self.tick(self._done)

    def tick(self, done: int, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (force or now - self._last >= PROGRESS_SECONDS):
            self._progress(self._phase, done, self._total, self._unit)
            self._last = now


_shared_done: Any = None  # this worker process's handle on the counter that all workers add to


def _start_worker(shared_done: Any) -> None:
    global _shared_done
    _shared_done = shared_done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; what is begun is finished and kept
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when its parent is gone, so that a build started anew is alone in its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is spawned by the build"
    parent.join()
    os._exit(EXIT_PEER_LOST)


def _call(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    return function(task, _advance_shared)


def _advance_shared(amount: int) -> None:
    with _shared_done.get_lock():
        _shared_done.value += amount
