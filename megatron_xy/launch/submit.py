"""`launch --submit`: hands a script to sbatch or kubectl, or becomes torchrun on this machine. No shell in between."""

from __future__ import annotations

import os
import shutil
import subprocess

from megatron_xy import run_folder
from megatron_xy.errors import ConfigError
from megatron_xy.launch.job import Job
from megatron_xy.launch.scripts import script, torchrun, variables

_COMMANDS = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "apply", "--filename", "-"]}


def submit(job: Job) -> str:
    """Starts the job and returns the scheduler's answer; on local this process becomes torchrun and does not return.

    Raises ConfigError where the scheduler's program is not there or refuses the job.
    """
    if job.target == "local":
        run_folder.prepare(job.run_dir)
        run_folder.clear_exit(job.run_dir)
        job.log_dir.mkdir(exist_ok=True)
        argv = torchrun(job)
        os.execvpe(argv[0], argv, {each.name: each.value for each in variables(job)} | dict(os.environ))
    if job.target == "slurm":
        run_folder.prepare(job.run_dir)
        job.log_dir.mkdir(exist_ok=True)
    command = _COMMANDS[job.target]
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"--on {job.target} --submit needs {command[0]}, which is not on PATH; run it where {command[0]} is, or "
            "leave --submit out and take the printed script there"
        )
    answer = subprocess.run(command, input=script(job), capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise ConfigError(f"{' '.join(command)} refused the job ({answer.returncode}): {answer.stderr.strip()}")
    return answer.stdout.strip()
