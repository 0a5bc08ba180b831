"""No process outlives its run: a child ends with its parent, and a mark finds all processes of a start.

The kernel ends torchrun with the supervisor and the workers with torchrun, even where these die of SIGKILL; the mark, a
variable in the environment that children inherit, finds the rest, in whatever session or group. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK_VARIABLE = "MEGATRON_XY_MARK"  # a word of its own for every start
SUPERVISOR_VARIABLE = "MEGATRON_XY_SUPERVISOR_PID"
KILL_SECONDS = 10.0
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
    state = process_state(pid)
    return state is not None and state not in "ZX"


def process_state(pid: int) -> str | None:
    """The kernel's letter for what a process is at: R, S, D, T, Z, X (proc(5)); None where there is none."""
    status = _status(pid)
    return status.state if status is not None else None


def siblings() -> dict[int, int]:
    """{global rank: process id} of the running ranks that this rank's launcher started on this machine, but itself."""
    wanted = [f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")]
    found = {}
    for pid, parent, variables in _running_with(*wanted):
        if parent == os.getppid() and pid != os.getpid():
            ranks = [entry.removeprefix(b"RANK=") for entry in variables if entry.startswith(b"RANK=")]
            found.update({int(rank): pid for rank in ranks})
    return found


def marked_processes(mark: str, *, parent: int | None = None) -> list[int]:
    """Running processes of the start that `mark` names; only the children of `parent`, if given."""
    return sorted(pid for pid, its, _ in _running_with(f"{MARK_VARIABLE}={mark}") if parent in (None, its))


def _running_with(*variables: str) -> Iterator[tuple[int, int, list[bytes]]]:
    """(process id, parent, environment as it began) of every running process of ours that has these variables."""
    wanted = {entry.encode() for entry in variables}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
        status = _status(int(entry.name)) if wanted.issubset(environment) else None
        if status is not None and status.state not in "ZX":
            yield int(entry.name), status.parent, environment


def kill_marked(mark: str) -> list[int]:
    """Kills the processes of a start until none is left; returns those that KILL_SECONDS did not suffice for.

    Only a process that waits in the kernel, for a disk or a driver, outlasts that.
    """
    deadline = time.monotonic() + KILL_SECONDS
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
