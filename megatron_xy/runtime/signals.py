"""Requests to stop. A rank takes them in a thread: Python's handlers do not run while its main one is in a collective.

SIGTERM (launchers), SIGUSR1 (schedulers, ahead of the time limit), SIGINT (ctrl-C) and SIGHUP (a terminal that closes,
unless nohup has it ignored) ask for a stop. While there is nothing to save the process leaves at once; once training
runs, all ranks save together at the next step's end. A second one leaves now.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_xy.errors import EXIT_STOPPED

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    *(() if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)),  # as this process began
)
SAME_REQUEST_SECONDS = 2.0  # ctrl-C reaches a worker twice, from the terminal and from torchrun: one request


class _Interrupt(BaseException):
    """Passes what handles errors; of a KeyboardInterrupt Python itself keeps that there was one, and ends otherwise."""


@contextmanager
def cleaned_up_on_signals(what_stays: str, *, second_leaves: bool = False) -> Iterator[None]:
    """A stop signal ends the block as an error would, cleaned up, and the process with 75, saying what stays.

    For work of the main thread in one process that leaves something to be removed. Further signals wait for that, but
    where second_leaves: there what is left does no harm.
    """
    names: list[str] = []
    first_seen = 0.0

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal first_seen
        now = time.monotonic()
        if not names:
            names.append(signal.Signals(number).name)
            first_seen = now
            raise _Interrupt
        if second_leaves and now - first_seen > SAME_REQUEST_SECONDS:
            os._exit(EXIT_STOPPED)

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup would have it
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    except _Interrupt:
        print(f"stopped by {names[0]}{what_stays}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def block_stop_signals() -> None:
    """Keeps the signals for the waiting thread. Called before any other thread exists: threads inherit the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class StopRequest:
    """Whether someone asked this process to stop. Needs `block_stop_signals` first.

    on_leave: called, in the waiting thread, just before the process leaves without saving.
    """

    def __init__(self, *, on_leave: Callable[[str], None]) -> None:
        self.can_save = False  # set by the trainer once there is a loop whose steps end
        self.nothing_to_save = " before the first step; there was nothing to save"  # said where a stop is at once
        self.is_deaf = False  # set by the watchdog while it reports and ends the run
        self._on_leave = on_leave
        self._first_seen: float | None = None
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    @property
    def requested(self) -> bool:
        """True from the first request on."""
        return self._first_seen is not None

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(STOP_SIGNALS)
            name = signal.Signals(number).name
            now = time.monotonic()
            if self.is_deaf:
                self._first_seen = self._first_seen or now  # heeded if the run goes on after all
                continue
            if not self.can_save:
                self._leave(f"stopped by {name}{self.nothing_to_save}")
            elif self._first_seen is None:
                self._first_seen = now
            elif now - self._first_seen > SAME_REQUEST_SECONDS and number != signal.SIGHUP:  # said more than once
                self._leave(f"stopped at once by a second signal ({name}); the newest checkpoint stands")

    def _leave(self, message: str) -> None:
        self._on_leave(message)
        os._exit(EXIT_STOPPED)
