"""`megatron-xy launch`: RUN.yaml checked for the exact number of ranks, and the `Job` that its options describe."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_xy.config import RunConfig, load_config
from megatron_xy.launch.job import RESTARTS, Job, check_job


def prepare_job(
    run_yaml: Path, *, overrides: Sequence[str], nodes: int, gpus_per_node: int, options: dict[str, Any]
) -> Job:
    """The job, checked. Raises InvalidConfig where the config does not run on so many ranks, or a text is not allowed.

    options: the other fields of `Job` by name; `name`, `workdir` and `restarts` may be None.
    """
    config = load_config(run_yaml, overrides=overrides, world_size=nodes * gpus_per_node)
    job = Job(
        **options
        | {
            "run_yaml": str(run_yaml),
            "overrides": tuple(overrides),
            "task": config.task,
            "run_dir": config.run_dir,
            "num_threads": config.runtime.num_threads,
            "timeout_seconds": math.ceil(config.runtime.timeout_seconds),
            "resume": str(config.checkpoint.resume),
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "name": _name_of(config) if options["name"] is None else options["name"],
            "workdir": str(Path.cwd()) if options["workdir"] is None else options["workdir"],
            "restarts": RESTARTS.get(options["target"]) if options["restarts"] is None else options["restarts"],
        }
    )
    check_job(job)
    return job


def _name_of(config: RunConfig) -> str:
    """The run folder's name, as every scheduler takes it."""
    name = re.sub(r"[^a-z0-9-]+", "-", config.run_dir.name.lower())[:32].strip("-")
    return name or config.task
