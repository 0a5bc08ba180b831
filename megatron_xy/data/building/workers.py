"""Tasks -> results, in the tasks' order, by worker processes that share nothing but files; progress on the way.

The workers are processes of this machine, or of a Ray cluster. Where tasks have claims, other builds may be at the same
tasks: each does what nobody else is doing, and waits for the rest.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from megatron_xy.data.building.claims import claim
from megatron_xy.errors import EXIT_PEER_LOST, ConfigError, PeerLost
from megatron_xy.runtime.signals import STOP_SIGNALS

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Progress = Callable[[str, int, int, str], None]  # phase, done, total, unit
ExecutorName = Literal["local", "ray"]

PROGRESS_SECONDS = 0.5
CLAIM_SECONDS = 0.2  # between two looks at tasks that other builds have claimed

_AGAIN = "run the same command again with fewer workers: it goes on where it was"
_KILLED = f"a worker process of the build was killed (out of memory?); {_AGAIN}"
_UNGUARDED = (
    "a worker process of the build ended as it began: a script that builds must guard its own code by "
    f"if __name__ == '__main__', since workers of a process with threads import it; or it was killed: {_AGAIN}"
)


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    """What became of one task: its result, None while another build has claimed it; and its share of the progress."""

    result: Result | None
    amount: int


class Workers:
    """Runs tasks in `count` processes and reports progress; a context manager.

    executor: "local", processes of their own (this one, if `count` is 1); "ray", tasks of the Ray cluster that is
    running. prepare: loads what the workers need, before they are forked from this process; a worker that is not forked
    loads it when it needs it.
    """

    def __init__(
        self,
        count: int,
        *,
        progress: Progress | None,
        executor: ExecutorName = "local",
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Raises ConfigError where there is no Ray, or no cluster."""
        if count < 1:
            raise ConfigError(f"workers ({count}) must be at least 1")
        self._count = count
        self._progress = progress
        self._kind = executor
        self._prepare = prepare
        self._executor: Executor | None = None
        self._spawned = False  # workers that import the calling script
        self._has_results = False
        self._shared_done: Any = None  # what local processes have done; others tell at the end of each task

    def __enter__(self) -> Workers:
        if self._kind == "ray":
            from megatron_xy.data.building.ray_executor import RayExecutor  # an extra; takes seconds to import

            self._executor = RayExecutor()
        elif self._count > 1:
            # A fork copies one thread; what another held at that moment, it would hold for ever.
            method = "fork" if _has_one_thread() else "spawn"
            self._spawned = method == "spawn"
            if method == "fork":
                self._prepare()
                gc.freeze()  # what is loaded stays: no collection goes through it again, here or in the workers
            context = multiprocessing.get_context(method)
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
        self,
        phase: str,
        function: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        *,
        total: int,
        unit: str,
        claims: Sequence[Path] | None = None,
    ) -> Iterator[Result]:
        """The results of function(task, advance), in the order of the tasks; `advance(n)` adds to the progress.

        `function` and its tasks travel to other processes. claims: a file for each task, locked by who does it;
        `function` then gives at once the result of a task that was done before. Raises what a task raised, and PeerLost
        where a worker process was killed.
        """
        report = _Ticker(self._progress, phase, total, unit)
        report.tick(0, force=True)
        if self._shared_done is not None:
            self._shared_done.value = 0
        try:
            yield from self._run(function, tasks, claims, report)
        except BrokenProcessPool as error:
            raise PeerLost(_UNGUARDED if self._spawned and not self._has_results else _KILLED) from error
        report.tick(total, force=True)

    def _run(
        self,
        function: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        claims: Sequence[Path] | None,
        report: _Ticker,
    ) -> Iterator[Result]:
        left = deque(range(len(tasks)))
        claimed_by_others: list[int] = []
        running: dict[Future[_Outcome[Result]], int] = {}
        results: dict[int, Result] = {}
        turn = 0
        # A queue of a few for each local process; Ray would start all that it is given.
        most_running = 1 if self._executor is None else 4 * self._count if self._kind == "local" else self._count
        while turn < len(tasks):
            while left and len(running) < most_running:
                index = left.popleft()
                path = claims[index] if claims is not None else None
                running[self._submit(function, tasks[index], path, report)] = index
            done, _ = wait(running, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                index, outcome = running.pop(future), future.result()
                self._has_results = True
                if outcome.result is None:
                    claimed_by_others.append(index)
                else:
                    results[index] = outcome.result
                report.advance(outcome.amount)
            if self._shared_done is not None:
                report.tick(self._shared_done.value)
            while turn in results:
                yield results.pop(turn)
                turn += 1
            if claimed_by_others and not left and not running:
                time.sleep(CLAIM_SECONDS)
                left.extend(sorted(claimed_by_others))
                claimed_by_others.clear()

    def _submit(
        self, function: Callable[[Task, Advance], Result], task: Task, path: Path | None, report: _Ticker
    ) -> Future[_Outcome[Result]]:
        if self._executor is not None:
            return self._executor.submit(_call, function, task, path)
        future: Future[_Outcome[Result]] = Future()
        future.set_result(_call(function, task, path, report.advance))
        return future


class _Ticker:
    """Calls the progress function at most every half second."""

    def __init__(self, progress: Progress | None, phase: str, total: int, unit: str) -> None:
        self._progress, self._phase, self._total, self._unit = progress, phase, total, unit
        self._done = 0
        self._last = 0.0

    def advance(self, amount: int) -> None:
        self._done += amount
        if amount:
            self.tick(self._done)

    def tick(self, done: int, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (force or now - self._last >= PROGRESS_SECONDS):
            self._progress(self._phase, done, self._total, self._unit)
            self._last = now


_shared_done: Any = None  # this worker process's handle on the counter that all workers add to, if it has one


def _has_one_thread() -> bool:
    """Whether this process is known to have a single thread, libraries' own included (on Linux)."""
    threads = Path("/proc/self/task")
    return threads.is_dir() and len(list(threads.iterdir())) == 1


def _start_worker(shared_done: Any) -> None:
    global _shared_done
    _shared_done = shared_done
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent decides; what is begun is finished and kept
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it the parent ends its workers; not what the parent does itself
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when its parent is gone, so that it holds no claim for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by the build"
    parent.join()
    os._exit(EXIT_PEER_LOST)


def _call(
    function: Callable[[Task, Advance], Result], task: Task, path: Path | None, advance: Advance | None = None
) -> _Outcome[Result]:
    """Runs in a worker process, or with `advance` in the build's own."""
    amounts: list[int] = []
    if advance is None:
        advance = amounts.append if _shared_done is None else _advance_shared
    if path is None:
        return _Outcome(function(task, advance), sum(amounts))
    with claim(path) as is_ours:
        return _Outcome(function(task, advance) if is_ours else None, sum(amounts))


def _advance_shared(amount: int) -> None:
    with _shared_done.get_lock():
        _shared_done.value += amount
