"""Tasks -> results, in the tasks' order, by worker processes that share nothing but files; progress on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from megatron_xy.errors import EXIT_PEER_LOST, ConfigError, PeerLost

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Progress = Callable[[str, int, int, str], None]  # phase, done, total, unit

PROGRESS_SECONDS = 0.5


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
