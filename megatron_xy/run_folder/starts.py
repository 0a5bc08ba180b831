"""Which start of a run a process belongs to, which try of it, and which start wrote the course of checkpoints last."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from megatron_xy.run_folder.files import now, read_json
from megatron_xy.runtime.orphans import SUPERVISOR_VARIABLE
from megatron_xy.storage import write_json

COURSE = "course.json"
START_VARIABLE = "MEGATRON_XY_START"  # set by launch's batch script, whose job keeps its number when it is requeued
ATTEMPT_VARIABLE = "MEGATRON_XY_ATTEMPT"  # set by the supervisor, or that script: 0, then 1 for the first restart


def this_start() -> str:
    """One word for all processes of one start: a scheduler's job, a supervisor with its ranks, a bare torchrun's ranks,
    or this alone."""
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None and START_VARIABLE in os.environ:
        return os.environ[START_VARIABLE]
    if supervisor is None and "RANK" in os.environ:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"  # of which there is one at a time
    return f"{socket.gethostname()}:pid {supervisor or os.getpid()}"


def current_attempt() -> int:
    """Which try of its start this process belongs to: 0, then 1 for the first restart, whoever restarts it."""
    of_torchrun = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # under its --max-restarts
    return int(os.environ.get(ATTEMPT_VARIABLE, of_torchrun))


def read_start(run_dir: Path) -> str | None:
    """Which start last began, or went on with, the course of checkpoints in `run_dir`."""
    try:
        return str(read_json(run_dir / COURSE)["start"])
    except FileNotFoundError:
        return None


def write_start(run_dir: Path) -> None:
    """Says that it is this start. One rank calls it."""
    write_json(run_dir / COURSE, {"start": this_start(), "time": now()})
