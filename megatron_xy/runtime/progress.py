"""When something last went forward in this process: what it says itself, and work that the kernel counts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from megatron_xy.runtime.liveness import SIGNS

PATIENCE = 10  # for how many times `timeout_seconds` work that nobody counts is progress
WORK_BYTES = 4 * 2**20  # read or written within `timeout_seconds`: a rank that works
WORK_SHARE = 0.1  # of one core within `timeout_seconds`: likewise


class Progress:
    """When something last went forward in this process: marks, phases, and, where it counts, unannounced work."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._marks = (-1, -1)
        self._marked = self._seconds = time.monotonic()
        self._work = Work.now()

    def look(self, now: float, *, place: int, counts_work: bool, counts_disks: bool) -> None:
        """Takes in what has happened since the last look. counts_disks: whose writes count, if work does."""
        marks = (SIGNS.marks, place)
        if marks != self._marks:
            self._marks, self._marked, self._seconds = marks, now, now
            self._work = Work.now()
        elif counts_work and now - self._marked < PATIENCE * self._timeout:
            work = Work.now()
            if work.is_work_since(self._work, timeout_seconds=self._timeout, counts_disks=counts_disks):
                self._work, self._seconds = work, now

    def stalled_seconds(self, now: float) -> float:
        """Since something last went forward."""
        return now - self._seconds

    def forgive(self, seconds: float) -> None:
        """Time in which the process did not run, stopped and continued by somebody, or on a machine that slept."""
        self._seconds += seconds
        self._marked += seconds


class Work(NamedTuple):
    """What the kernel counts of this process's work; of the disks' work the whole machine's, for waits in fsync."""

    cpu_seconds: float
    io_bytes: int
    disk_bytes: int

    @classmethod
    def now(cls) -> Work:
        """As it stands."""
        return cls(
            time.process_time(),
            sum(_counters(Path("/proc/self/io"), ("rchar:", "wchar:", "read_bytes:", "write_bytes:"))),
            sum(_counters(Path("/proc/vmstat"), ("nr_written",))) * os.sysconf("SC_PAGE_SIZE"),
        )

    def is_work_since(self, before: Work, *, timeout_seconds: float, counts_disks: bool) -> bool:
        """Whether it is enough, within `timeout_seconds`, for a process that works rather than hangs.

        counts_disks: whether this process may be waiting for what it has written.
        """
        return (
            self.cpu_seconds - before.cpu_seconds > WORK_SHARE * timeout_seconds
            or self.io_bytes - before.io_bytes > WORK_BYTES
            or (counts_disks and self.disk_bytes - before.disk_bytes > WORK_BYTES)
        )


def _counters(path: Path, names: tuple[str, ...]) -> list[int]:
    """Numbers of a file of `NAME NUMBER` lines; none where the kernel does not show it."""
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except OSError:
        return []
    return [int(pair[1]) for pair in pairs if pair[0] in names]
