"""Dry runs for tests, in a process of their own: a process has one device, and theirs holds no data."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_xy import device
from megatron_xy.config import RunConfig

ROOT = Path(__file__).parents[2]


def dry_runs(jobs: list[tuple[RunConfig, int, list[int]]]) -> list[list[dict[str, Any]]]:
    """What these ranks of jobs (config, world size, ranks) hold and send: RankFindings as dicts, [job][rank]."""
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
    from megatron_xy.dryrun.training import dry_run

    findings = []
    for job in map(json.loads, sys.stdin):
        config = RunConfig.model_validate_json(job["config"])
        bucket, world_size = config.training.micro_batch_tokens, job["world_size"]
        runs = (dry_run(config, rank=rank, world_size=world_size, bucket=bucket) for rank in job["ranks"])
        findings.append([asdict(role) for roles in runs for role in roles])
    print(json.dumps(findings))


if __name__ == "__main__":
    _main()
