"""The next steps' data, prepared in the background while the present step trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Step = TypeVar("Step")


class Prefetcher(Generic[Step]):
    """Prepares the next steps in a background thread; a context manager.

    `prepare` makes what a data step needs. It runs in one thread, one step at a time, and may run for steps
    that nobody will ask for. Nothing about it needs saving: a run that resumes asks for another step.
    """

    def __init__(self, prepare: Callable[[int], Step], *, depth: int = 2) -> None:
        self._prepare = prepare
        self._depth = depth
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._steps: dict[int, Future[Step]] = {}

    def get(self, data_step: int) -> tuple[Step, float]:
        """(what was prepared for `data_step`, seconds waited for it); then `depth` steps more are on their way.

        Steps may be skipped or asked for again. Raises what `prepare` raised for this step.
        """
        wanted = range(data_step, data_step + self._depth + 1)
        for step in [step for step in self._steps if step not in wanted]:
            self._steps.pop(step).cancel()
        for step in wanted:
            if step not in self._steps:
                self._steps[step] = self._thread.submit(self._prepare, step)
        start = time.perf_counter()
        prepared = self._steps.pop(data_step).result()
        return prepared, time.perf_counter() - start

    def close(self) -> None:
        """Ends the thread after the step it is at; what it has prepared is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()

    def __enter__(self) -> Prefetcher[Step]:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
