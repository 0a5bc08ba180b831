"""Signs of this process's life, for its watchdog: how often something went forward, and what its threads wait for.

Whoever does long work, or waits for other ranks, says so here; the watchdog's thread reads it. One per process, as a
process is in one place at a time; a call costs less than a microsecond.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Signs:
    """`marks` counts what went forward; `waits` says, by thread, for what of other ranks' doing it waits."""

    def __init__(self) -> None:
        self.marks = 0
        self.waits: dict[int, str] = {}


SIGNS = Signs()


def went_forward() -> None:
    """Something was done that a process which stands still does not do: a micro-batch, a tensor, a block of a file."""
    SIGNS.marks += 1  # two threads at once may count as one: it is the change that is looked at


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Inside, this thread waits for what other ranks do."""
    thread = threading.get_ident()
    SIGNS.waits[thread] = what
    try:
        yield
    finally:
        SIGNS.waits.pop(thread, None)
        went_forward()
