"""A verb over the model in a folder, without a RUN.yaml: what it was asked, and the ranks that it starts for it.

With one rank the work is done in this process; with more, torchrun is started and supervised as for a training, in a
work folder of the verb's own, and every rank reads the job there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xy import run_folder
from megatron_xy.config import RunConfig, load_model_options
from megatron_xy.runtime import signals
from megatron_xy.runtime.supervise import supervise
from megatron_xy.storage import write_json

JOB_FILE = "job.json"
RANK_VERB = "model-rank"  # the command of a rank


@dataclass(frozen=True)
class ModelJob:
    """What a verb was asked: over which model, on how many ranks, in which layout, and its own arguments (JSON)."""

    verb: str
    origin: str  # ckpt:DIR | hf:DIR
    nproc_per_node: int
    overrides: list[str]
    run_dir: str  # the work folder
    arguments: dict[str, Any]

    def options(self) -> RunConfig:
        """`model.load`, `parallel` and `runtime` as a config has them. Raises UsageError, InvalidConfig."""
        return load_model_options(self.origin, overrides=self.overrides, world_size=self.nproc_per_node)


def read_job(path: Path) -> ModelJob:
    """The job that `run_job` wrote."""
    return ModelJob(**json.loads(path.read_bytes()))


def run_job(job: ModelJob, *, in_this_process: Callable[[], None]) -> int:
    """Does the job on its ranks; returns the exit code. `in_this_process` does it where there is one rank.

    To be called in the main thread. Raises RunDirBusy where another run is at work in the folder.
    """
    options, run_dir = job.options(), Path(job.run_dir)
    run_folder.prepare(run_dir, key="the work folder beside the output")
    if job.nproc_per_node == 1:
        with run_folder.lock(run_dir, name=run_folder.SUPERVISOR_LOCK):
            in_this_process()
        return 0
    write_json(run_dir / JOB_FILE, asdict(job))
    return supervise(
        str(run_dir / JOB_FILE),
        task=RANK_VERB,
        run_dir=run_dir,
        nproc_per_node=job.nproc_per_node,
        num_threads=options.runtime.num_threads,
        timeout_seconds=options.runtime.timeout_seconds,
    )


def leave_on_signals(what_stays: str) -> None:
    """From now on a stop signal ends this process at once with 75, saying what stays. For work in one process.

    To be called before other threads exist.
    """
    signals.block_stop_signals()
    stop = signals.StopRequest(on_leave=lambda message: print(message, file=sys.stderr, flush=True))
    stop.nothing_to_save = what_stays
