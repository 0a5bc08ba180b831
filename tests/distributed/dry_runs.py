"""Dry runs for tests, in a process of their own: a process has one device, and theirs holds no data."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_xy import device
from megatron_xy.config import RunConfig

ROOT = Path(__file__).parents[2]


def dry_runs(jobs: list[tuple[RunConfig, int, list[int]]]) -> list[list[dict[str, Any]]]:
    """What ranks of jobs (config, world size, ranks) hold and send: dicts of RankFindings, [job][rank and role]."""
    lines = [
        json.dumps({"config": job.model_dump_json(), "world_size": size, "ranks": ranks}) for job, size, ranks in jobs
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tests.distributed.dry_runs"],
        input="\n".join(lines), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    findings: list[list[dict[str, Any]]] = json.loads(result.stdout)
    return findings


def _main() -> None:
    device.start_dry()
    from megatron_xy.dryrun import verb

    findings = []
    for job in map(json.loads, sys.stdin):
        config = RunConfig.model_validate_json(job["config"])
        size = job["world_size"]
        found = verb.run(config, ranks=job["ranks"], world_size=size, bucket=None, say=lambda line: None)
        findings.append(found["ranks"])
    print(json.dumps(findings))


if __name__ == "__main__":
    _main()
