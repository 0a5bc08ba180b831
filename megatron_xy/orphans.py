"""No process outlives its run: a child ends with its parent, and a mark finds all processes of a start.

The kernel ends torchrun with the supervisor and the workers with torchrun, even where these die of SIGKILL; the mark, a
variable in the environment that children inherit, finds the rest, in whatever session or group. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

MARK_VARIABLE = "MEGATRON_XY_MARK"  # a word of its own for every start
SUPERVISOR_VARIABLE = "MEGATRON_XY_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)  # opened here: a forked child should not load libraries


@dataclass(frozen=True)
class _Status:
    """What /proc/PID/stat says of a process."""

    state: str
    parent: int


def die_with_parent() -> None:
    """Ends this worker with SIGKILL when its torchrun ends, or has ended; does nothing where no torchrun started it.

    To be called first of all: until then only the supervisor's sweep, or a failing rendezvous, ends an orphan.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # started by hand or by another launcher, which may go while the run stays
    tie_to(os.getppid())
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is not None and not is_running(int(supervisor)):  # it went, and torchrun with it, before we looked
        os.kill(os.getpid(), signal.SIGKILL)


def tie_to(parent_pid: int) -> None:
    """Ends this process with SIGKILL when the thread of `parent_pid` that started it ends, or if that is no more.

    Fit for a child between fork and exec: it only makes system calls.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether `pid` is a process that has not ended; a zombie has."""
    status = _status(pid)
    return status is not None and status.state not in "ZX"


def marked_processes(mark: str, *, parent: int | None = None) -> list[int]:
    """Running processes of the start that `mark` names; only the children of `parent`, if given."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
        status = _status(int(entry.name)) if wanted in variables else None
        if status is not None and status.state not in "ZX" and parent in (None, status.parent):
            pids.append(int(entry.name))
    return sorted(pids)


def kill_marked(mark: str, *, timeout_seconds: float = 10.0) -> list[int]:
    """Kills the processes of a start until none is left; returns those that `timeout_seconds` did not suffice for.

    Only a process that waits in the kernel, for a disk or a driver, outlasts that.
    """
    deadline = time.monotonic() + timeout_seconds
    while (pids := marked_processes(mark)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # ended meanwhile
        time.sleep(0.02)
    return pids


def _status(pid: int) -> _Status | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = text.rpartition(")")[2].split()[:2]  # the name before it may hold blanks and brackets
    return _Status(state, int(parent))
