"""A whole plan of a run: from a checked config and a cluster to sizes, memory, speed, days and reliability.

Everything that `megatron-xy plan` tells and draws stands in a `Plan`; `to_json` gives it to programs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_xy.config import RunConfig
from megatron_xy.data.draws.phase_draws import stream_shares
from megatron_xy.data.manifest import MANIFEST_NAME, read_manifest
from megatron_xy.errors import ConfigError
from megatron_xy.flops import checkpoint_bytes, num_parameters, shape_of
from megatron_xy.plan.assumptions import Cluster, section
from megatron_xy.plan.job import Job, jobs
from megatron_xy.plan.memory import RECOMPUTATIONS, RoleMemory, copied_bytes, stage_memory
from megatron_xy.plan.ppo import Split, TimeLine, answer_length, best_split, time_line, useful_flops
from megatron_xy.plan.quantising import Quantising, quantising
from megatron_xy.plan.speed import StepTime, Traffic, step_time, traffic
from megatron_xy.stages import padded_vocab_size

DAY = 86_400


@dataclass(frozen=True)
class Reliability:
    """What stops cost; seconds but for `ettr`, the share of wall time that is kept as progress."""

    checkpoint_bytes: int
    write_seconds: float
    stall_seconds: float
    between_stops_seconds: float
    best_interval_seconds: float
    best_save_interval: int  # iterations
    ettr: float  # at the best interval
    ettr_as_configured: float


@dataclass(frozen=True)
class RolePlan:
    """One role: its stages' memory, and how fast it trains."""

    job: Job
    parameters: int  # of the whole model
    padded_vocab_size: int
    stages: tuple[RoleMemory, ...]
    traffic: Traffic
    steps: tuple[StepTime, ...]  # by bucket

    def totals_of(self, stage: int) -> dict[str, int]:
        """{recompute_granularity: bytes that a rank of the stage would hold with it}; none of a frozen role."""
        if not self.job.is_trained:
            return {}
        return {
            mode: stage_memory(
                dataclasses.replace(self.job, model=self.job.model.model_copy(update={"recompute_granularity": mode})),
                stage=stage,
            ).total
            for mode in RECOMPUTATIONS
        }

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """The global ranks of a pipeline stage."""
        number = len(self.job.ranks) // len(self.stages)
        return self.job.ranks[stage * number : (stage + 1) * number]

    @property
    def worst(self) -> RoleMemory:
        """The stage that holds most."""
        return max(self.stages, key=lambda memory: memory.total)


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts."""

    config: RunConfig
    cluster: Cluster
    roles: tuple[RolePlan, ...]
    bucket_shares: dict[int, float]  # of the steps
    worst_rank: int
    worst_bytes: float  # with margin
    margin_bytes: float
    tokens_per_second: float  # a GPU, over the mix of buckets
    mfu: float
    step_seconds: float
    num_tokens: float | None  # of the whole run; None where epochs of data that are not here decide
    days: float | None
    reliability: Reliability
    time_line: TimeLine | None  # of a PPO step
    best_split: Split | None
    quantising: tuple[Quantising, ...]  # of the model that is released; none of a reward model

    @property
    def fits(self) -> bool:
        """Whether the worst rank has room."""
        return self.worst_bytes <= self.cluster.gpu.memory_bytes

    @property
    def host_copy_bytes(self) -> dict[str, int]:
        """What the copies of checkpoints take of a host's memory: of the rank with most, and of the node."""
        size = self.cluster.gpus_per_node
        copied = [0] * self.cluster.world_size
        for role in self.roles:
            tp = role.job.parallel.tensor_model_parallel_size
            for stage in range(len(role.stages)):
                by_replica = copied_bytes(role.job, stage=stage)
                for place, rank in enumerate(role.ranks_of(stage)):
                    copied[rank] += by_replica[place // tp]
        nodes = [sum(copied[first : first + size]) for first in range(0, len(copied), size)]
        return {"rank": max(copied), "node": max(nodes)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes, seconds, tokens."""
        return {
            "task": self.config.task,
            "gpu": dataclasses.asdict(self.cluster.gpu),
            "num_nodes": self.cluster.num_nodes,
            "world_size": self.cluster.world_size,
            "fits": self.fits,
            "worst_rank": self.worst_rank,
            "worst_bytes": self.worst_bytes,
            "margin_bytes": self.margin_bytes,
            "host_copy_bytes": self.host_copy_bytes,
            "bucket_shares": self.bucket_shares,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "mfu": self.mfu,
            "step_seconds": self.step_seconds,
            "num_tokens": self.num_tokens,
            "days": self.days,
            "gpu_hours": None if self.days is None else self.days * 24 * self.cluster.world_size,
            "reliability": dataclasses.asdict(self.reliability),
            "time_line": self.time_line
            and dataclasses.asdict(self.time_line) | {"idle_shares": self.time_line.idle_shares},
            "best_split": self.best_split and dataclasses.asdict(self.best_split),
            "quantising": [dataclasses.asdict(scheme) for scheme in self.quantising],
            "roles": [
                {
                    "role": role.job.role,
                    "tensor_model_parallel_size": role.job.parallel.tensor_model_parallel_size,
                    "pipeline_model_parallel_size": role.job.parallel.pipeline_model_parallel_size,
                    "data_parallel_size": role.job.dp_size,
                    "num_micro_batches": role.job.num_micro_batches,
                    "parameters": role.parameters,
                    "padded_vocab_size": role.padded_vocab_size,
                    "stages": [
                        dataclasses.asdict(memory)
                        | {"static": memory.static, "activations": memory.activations, "total": memory.total}
                        | {"total_by_recompute": role.totals_of(memory.stage)}
                        for memory in role.stages
                    ],
                    "traffic": dataclasses.asdict(role.traffic),
                    "steps": [dataclasses.asdict(step) for step in role.steps],
                }
                for role in self.roles
            ],
        }


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    *,
    num_tokens: float | None = None,
    with_split: bool = True,
) -> Plan:
    """The plan of a checked config. Raises ConfigError where a model's shape is not known.

    num_tokens: of the whole run; what the config's train_iters come to unless given. with_split: also the best split of
    the nodes over PPO's roles.
    """
    world_size = cluster.world_size
    all_jobs = jobs(config, world_size=world_size)
    for job in all_jobs:
        _check_shape_is_known(job)
    first = all_jobs[0].answers
    shares = {answer_length(first): 1.0} if first else buckets_of(config)
    roles = tuple(_role_plan(job, cluster, buckets=tuple(shares)) for job in all_jobs)
    worst_rank, worst, margin = _worst(roles, world_size=world_size)
    main = roles[0]
    mix = sum(shares.values())
    step_seconds = sum(shares[step.bucket] / mix * step.seconds for step in main.steps)
    tokens = main.job.micro_batch_tokens * main.job.num_micro_batches * main.job.dp_size
    mfu = sum(shares[step.bucket] / mix * step.seconds * step.mfu for step in main.steps) / step_seconds
    line = split = None
    if first is not None:
        line = time_line(all_jobs, cluster)
        if with_split:
            split = best_split(all_jobs, cluster)
        step_seconds, tokens = line.seconds, first.ppo.rollout_batch_size * answer_length(first)
        mfu = useful_flops(all_jobs) / (step_seconds * world_size * cluster.gpu.peak_flops)
    if num_tokens is None and config.training.epochs is None:
        num_tokens = float(config.training.train_iters * tokens)
    return Plan(
        config=config,
        cluster=cluster,
        roles=roles,
        bucket_shares={bucket: share / mix for bucket, share in shares.items()},
        worst_rank=worst_rank,
        worst_bytes=worst,
        margin_bytes=margin,
        tokens_per_second=tokens / step_seconds / world_size,
        mfu=mfu,
        step_seconds=step_seconds,
        num_tokens=num_tokens,
        days=None if num_tokens is None else num_tokens / tokens * step_seconds / DAY,
        reliability=_reliability(config, cluster, roles, step_seconds=step_seconds),
        time_line=line,
        best_split=split,
        quantising=quantising(main.job.model, cluster) if main.job.model.head == "language_model" else (),
    )


def buckets_of(config: RunConfig) -> dict[int, float]:
    """{bucket: share of the steps}, as the sampler draws the data folders' at first; the assumed ones where a path is
    none, or not yet: a file of rows, say."""
    micro, context = config.training.micro_batch_tokens, config.model.max_position_embeddings
    if config.data.paths and all((path / MANIFEST_NAME).is_file() for path in config.data.paths):
        samples: Counter[tuple[str, int]] = Counter()
        for path in config.data.paths:
            for source, entry in read_manifest(path).sources.items():
                samples.update({(source, int(bucket)): held.samples for bucket, held in entry.buckets.items()})
        drawn: dict[int, float] = {}
        for (_, bucket), share in stream_shares(config.data.weights, samples, key="data.weights").items():
            drawn[bucket] = drawn.get(bucket, 0.0) + share
        return dict(sorted(drawn.items()))
    assumed = {bucket: share for bucket, share in section("buckets").items() if micro % bucket == 0}
    assumed = {bucket: share for bucket, share in assumed.items() if bucket <= context}
    return assumed or {micro: 1.0}


def _check_shape_is_known(job: Job) -> None:
    if missing := job.model.missing_shape:
        place = "model" if job.role == "model" else f"roles.{job.role}.model"
        raise ConfigError(
            f"{place}: {', '.join(missing)} missing, and {job.model.load} is not here to tell; give the shape keys in "
            f"the config beside load"
        )


def _role_plan(job: Job, cluster: Cluster, *, buckets: tuple[int, ...]) -> RolePlan:
    tp = job.parallel.tensor_model_parallel_size
    return RolePlan(
        job,
        num_parameters(job.model),
        padded_vocab_size(shape_of(job.model).vocab_size, tensor_model_parallel_size=tp),
        tuple(stage_memory(job, stage=stage) for stage in range(job.parallel.pipeline_model_parallel_size)),
        traffic(job),
        tuple(step_time(job, cluster, bucket=bucket) for bucket in buckets),
    )


def _worst(roles: tuple[RolePlan, ...], *, world_size: int) -> tuple[int, float, float]:
    """The rank that holds most, what it holds with its margin, and the margin. Roles that share ranks take turns."""
    static, active = [0] * world_size, [0] * world_size
    for role in roles:
        for memory in role.stages:
            for rank in role.ranks_of(memory.stage):
                static[rank] += memory.static
                active[rank] = max(active[rank], memory.activations)
    given = section("memory")

    def margin(rank: int) -> float:
        return given["context_bytes"] + given["fragmentation"] * active[rank]

    worst = max(range(world_size), key=lambda rank: static[rank] + active[rank])
    return worst, static[worst] + active[worst] + margin(worst), margin(worst)


def _reliability(
    config: RunConfig, cluster: Cluster, roles: tuple[RolePlan, ...], *, step_seconds: float
) -> Reliability:
    """ETTR = 1 / (1 + c/D + (D/2 + R)/M); the best D is sqrt(2 c M), and no less than a write takes."""
    given = section("reliability")
    trained = [role for role in roles if role.job.is_trained]
    size = sum(checkpoint_bytes(role.job.model) for role in trained)
    write = size / (given["storage_bandwidth"] * cluster.num_nodes)
    copied = max(memory.weights + memory.optimizer for role in trained for memory in role.stages)
    stall = copied / given["host_copy_bandwidth"] + (0 if config.checkpoint.async_save else write)
    between = given["gpu_hours_between_stops"] * 3600 / cluster.world_size
    best = max(math.sqrt(2 * stall * between), write)

    def ettr(interval: float) -> float:
        return 1 / (1 + stall / interval + (interval / 2 + given["restart_seconds"]) / between)

    configured = max(config.checkpoint.save_interval * step_seconds, write)
    return Reliability(
        checkpoint_bytes=size,
        write_seconds=write,
        stall_seconds=stall,
        between_stops_seconds=between,
        best_interval_seconds=best,
        best_save_interval=max(1, round(best / step_seconds)),
        ettr=ettr(best),
        ettr_as_configured=ettr(configured),
    )
