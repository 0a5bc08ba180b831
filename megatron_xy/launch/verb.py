"""`megatron-xy launch`: RUN.yaml checked for the exact number of ranks, and the `Job` that its options describe."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from megatron_xy.config import RunConfig, load_config
from megatron_xy.launch.job import RESTARTS, Job, check_job


def prepare_job(asked: dict[str, Any]) -> Job:
    """The job, checked. Raises InvalidConfig where the config does not run on so many ranks, or a text is not allowed.

    asked: run_yaml, and the options of `launch` by the names of the fields of `Job`, None where they are not given.
    """
    overrides = tuple(asked["overrides"] or ())
    config = load_config(asked["run_yaml"], overrides=overrides, world_size=asked["nodes"] * asked["gpus_per_node"])
    defaults = {"name": _name_of(config), "workdir": str(Path.cwd()), "restarts": RESTARTS.get(asked["target"])}
    job = Job(
        **asked
        | {name: value for name, value in defaults.items() if asked[name] is None}
        | {
            "run_yaml": str(asked["run_yaml"]),
            "overrides": overrides,
            "mount": tuple(asked["mount"] or ()),
            "task": config.task,
            "run_dir": config.run_dir,
            "num_threads": config.runtime.num_threads,
            "timeout_seconds": math.ceil(config.runtime.timeout_seconds),
            "resume": str(config.checkpoint.resume),
        }
    )
    check_job(job)
    return job


def _name_of(config: RunConfig) -> str:
    """The run folder's name, as every scheduler takes it."""
    name = re.sub(r"[^a-z0-9-]+", "-", config.run_dir.name.lower()).strip("-")
    if not name[:1].isalpha():  # kubernetes wants a letter first
        name = f"{config.task}-{name}"
    return name[:32].strip("-")
