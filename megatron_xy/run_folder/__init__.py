"""The folder of one run and its small files: who runs in it, how far every rank is, how the run ended, on what it ran.

Ranks write heartbeats, rank 0 writes env.json, every process may write exit.json; the supervisor and `report` read
them. Each file is JSON and is replaced as a whole, so that a reader never meets half of one. Nobody writes while
another start of a run holds the folder.
"""

from megatron_xy.run_folder.environment import write_env
from megatron_xy.run_folder.exits import EXIT_NAMES, ExitRecord, clear_exit, read_exit, read_failure, record_exit
from megatron_xy.run_folder.files import check_place, prepare
from megatron_xy.run_folder.heartbeats import (
    Beat,
    clear_heartbeats,
    new_beat,
    read_heartbeats,
    sweep_heartbeat,
    write_beat,
)
from megatron_xy.run_folder.locks import SUPERVISOR_LOCK, RunDirBusy, exit_lock, lock, refuse_if_busy, told_by_holder
from megatron_xy.run_folder.starts import ATTEMPT_VARIABLE, current_attempt, read_start, this_start, write_start

__all__ = [
    "ATTEMPT_VARIABLE",
    "EXIT_NAMES",
    "SUPERVISOR_LOCK",
    "Beat",
    "ExitRecord",
    "RunDirBusy",
    "check_place",
    "clear_exit",
    "clear_heartbeats",
    "current_attempt",
    "exit_lock",
    "lock",
    "new_beat",
    "prepare",
    "read_exit",
    "read_failure",
    "read_heartbeats",
    "read_start",
    "record_exit",
    "refuse_if_busy",
    "sweep_heartbeat",
    "this_start",
    "told_by_holder",
    "write_beat",
    "write_env",
    "write_start",
]
