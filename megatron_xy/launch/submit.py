"""`launch --submit`: hands a script to sbatch or kubectl, or runs this machine's torchrun. No shell in between."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType

from megatron_xy import run_folder
from megatron_xy.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from megatron_xy.launch.job import Job
from megatron_xy.launch.scripts import script, torchrun, variables
from megatron_xy.runtime.orphans import MARK_VARIABLE, kill_marked, marked_processes
from megatron_xy.runtime.signals import STOP_SIGNALS

_COMMANDS = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "apply", "--filename", "-"]}
# For torchrun, once a rank has recorded a failure: cut off from the rendezvous it would wait for ever.
_LINGER_SECONDS = 15.0
_POLL_SECONDS = 0.5


def submit(job: Job) -> str:
    """Hands the job to its scheduler and returns that one's answer.

    Raises ConfigError where the scheduler's program is not there or refuses the job.
    """
    command = _COMMANDS[job.target]
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"--on {job.target} --submit needs {command[0]}, which is not on PATH; run it where {command[0]} is, or "
            "leave --submit out and take the printed script there"
        )
    if job.target == "slurm":
        run_folder.prepare(job.run_dir)
        job.log_dir.mkdir(exist_ok=True)
    answer = subprocess.run(command, input=script(job), capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ConfigError(f"{' '.join(command)} refused the job ({answer.returncode}): {answer.stderr.strip()}")
    return answer.stdout.strip()


def run_here(job: Job) -> int:
    """Runs this machine's torchrun to its end and returns the documented exit code. To be called in the main thread.

    SIGINT, SIGTERM and SIGUSR1 ask the ranks to save and stop. Once a rank has told of a failure, nothing that was
    started here outlives it for long.
    """
    run_folder.prepare(job.run_dir)
    run_folder.refuse_if_busy(job.run_dir)
    run_folder.clear_exit(job.run_dir)
    mark = secrets.token_hex(16)
    environment = {each.name: each.value for each in variables(job)} | os.environ | {MARK_VARIABLE: mark}
    process = subprocess.Popen(torchrun(job), env=environment, start_new_session=True)

    def stop(_number: int, _frame: FrameType | None) -> None:
        for pid in marked_processes(mark, parent=process.pid) or [process.pid]:
            os.kill(pid, signal.SIGTERM)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    failed_at: float | None = None
    while True:
        try:
            returncode = process.wait(timeout=_POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            record = run_folder.read_exit(job.run_dir)
        if record is None or record.code in (EXIT_DONE, EXIT_STOPPED):
            continue
        failed_at = failed_at or time.monotonic()
        if time.monotonic() - failed_at > _LINGER_SECONDS:
            kill_marked(mark)
    record = run_folder.read_exit(job.run_dir)
    if record is not None and record.code != EXIT_DONE:
        print(f"megatron-xy launch: ended with {record.code} ({record.name}): {record.message}", file=sys.stderr)
    return returncode if record is None else record.code
