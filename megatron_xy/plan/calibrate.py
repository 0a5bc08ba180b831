"""Efficiencies fitted to a real run: from its config and metrics to the factor that makes predictions meet, per bucket.

One number is fitted, by which the efficiencies of arithmetic and memory and the links' are scaled alike: a run shows no
more. What is left between prediction and measurement at a bucket is then told.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_xy.config import load_config
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.plan.assumptions import Cluster, Efficiencies
from megatron_xy.plan.job import jobs
from megatron_xy.plan.speed import step_time
from megatron_xy.report.records import read_metrics

FIRST_STEPS = 2  # left out: they compile, and warm caches


@dataclass(frozen=True)
class BucketSpeed:
    """Tokens/s a GPU on one bucket."""

    bucket: int
    num_steps: int
    measured: float
    before: float  # by the planner's own efficiencies
    predicted: float  # by the fitted ones


@dataclass(frozen=True)
class Calibration:
    """What came of a run."""

    factor: float
    rates: Efficiencies
    speeds: tuple[BucketSpeed, ...]


def calibrate(run_dir: Path, cluster: Cluster) -> Calibration:
    """Fits to what RUN/run.yaml, env.json and metrics.jsonl tell. Raises ConfigError, DataError."""
    world_size = _world_size(run_dir)
    config = load_config(run_dir / "run.yaml", world_size=world_size)
    if config.task == "ppo":
        raise ConfigError(f"--calibrate ({run_dir}): task ppo has no steps of one model; name a run of another task")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    (job,) = jobs(config, world_size=world_size)
    late = metrics.column("iteration") > FIRST_STEPS
    speed = metrics.column("tokens_per_second")
    measured = {
        bucket: (int(numpy.sum(drawn & late)), float(numpy.nanmedian(speed[drawn & late])) / world_size)
        for bucket, drawn in metrics.buckets().items()
        if numpy.isfinite(speed[drawn & late]).any()
    }
    if not measured:
        raise DataError(f"{run_dir / 'metrics.jsonl'} holds no step after the first {FIRST_STEPS}; let the run go on")

    def predicted(scaled: Efficiencies) -> dict[int, float]:
        reached = dataclasses.replace(cluster, rates=scaled)
        return {bucket: step_time(job, reached, bucket=bucket).tokens_per_second for bucket in measured}

    rates = cluster.rates
    before = predicted(rates)
    # Time goes with the inverse of a common factor: it is the geometric mean of the buckets' ratios.
    logs = [number * math.log(value / before[bucket]) for bucket, (number, value) in measured.items()]
    factor = math.exp(sum(logs) / sum(number for number, _ in measured.values()))
    names = ("matmul", "attention", "memory", "node_network", "network")
    fitted = dataclasses.replace(rates, **{name: getattr(rates, name) * factor for name in names})
    after = predicted(fitted)
    speeds = (
        BucketSpeed(bucket, number, value, before[bucket], after[bucket])
        for bucket, (number, value) in sorted(measured.items())
    )
    return Calibration(factor, fitted, tuple(speeds))


def _world_size(run_dir: Path) -> int:
    """Ranks of the run."""
    path = run_dir / "env.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["world_size"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--calibrate ({run_dir}): {path} does not tell world_size; name a run's folder") from error
