"""`launch --submit`: hands a script to sbatch or kubectl, or runs this machine's torchrun. No shell in between."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from megatron_xy import run_folder
from megatron_xy.errors import ConfigError
from megatron_xy.launch.job import Job
from megatron_xy.launch.scripts import script, torchrun, variables
from megatron_xy.runtime.supervise import Torchrun, run_to_end

_COMMANDS = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "create", "--filename", "-"]}


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
        run_folder.prepare(Path(job.workdir) / job.run_dir)
    answer = subprocess.run(command, input=script(job), capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ConfigError(f"{' '.join(command)} refused the job ({answer.returncode}): {answer.stderr.strip()}")
    return answer.stdout.strip()


def run_here(job: Job) -> int:
    """Runs this machine's torchrun to its end and returns the documented exit code, as `supervise.run_to_end` does.

    Raises ConfigError besides where there is no such torchrun.
    """
    command = torchrun(job)
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not there or no program; name another --venv, with megatron-xy in it")
    return run_to_end(
        Torchrun(
            command=command,
            environment={each.name: each.value for each in variables(job)} | os.environ,
            verb="launch",
            run_dir=job.run_dir,
            ranks=job.gpus_per_node,
            timeout_seconds=job.timeout_seconds,
            has_all_ranks=job.nodes == 1,
        )
    )
