"""The time line of a PPO step: how long each role works in each phase, what it idles, and the best split of the nodes.

Answers are as long as they may be, their prompts as long again. A phase lasts until the last rank is done; what roles
on one rank do, they do in turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

from megatron_xy.config import PPOConfig
from megatron_xy.flops import num_parameters
from megatron_xy.plan.assumptions import Device, Efficiencies, section
from megatron_xy.plan.memory import Job
from megatron_xy.plan.parameters import DTYPE_BYTES
from megatron_xy.plan.speed import FORWARD_SHARE, step_time

PHASES = ("generate", "score", "update")


@dataclass(frozen=True)
class TimeLine:
    """One PPO step; seconds."""

    phases: dict[str, float]
    work: dict[str, dict[str, float]]  # by role and phase
    seconds: float

    @property
    def idle_shares(self) -> dict[str, float]:
        """Of the step, by role."""
        return {role: 1 - sum(phases.values()) / self.seconds for role, phases in self.work.items()}


@dataclass(frozen=True)
class Split:
    """Nodes by role, and the step that they give."""

    nodes: dict[str, int]
    seconds: float


def time_line(jobs: Iterable[Job], *, ppo: PPOConfig, gpu: Device, rates: Efficiencies) -> TimeLine:
    """Of the roles where they stand."""
    placed = list(jobs)
    work = {job.role: role_work(job, ppo=ppo, gpu=gpu, rates=rates) for job in placed}
    phases = {}
    for phase in PHASES:
        by_rank: dict[int, float] = {}
        for job in placed:
            for rank in job.ranks:
                by_rank[rank] = by_rank.get(rank, 0.0) + work[job.role][phase]
        phases[phase] = max(by_rank.values())
    return TimeLine(phases, work, sum(phases.values()))


def role_work(job: Job, *, ppo: PPOConfig, gpu: Device, rates: Efficiencies) -> dict[str, float]:
    """{phase: seconds} of one role in a step."""
    length = 2 * ppo.max_response_length

    def seconds(answers: int) -> float:
        tokens = -(-answers // job.dp_size) * length
        part = replace(job, num_micro_batches=max(1, -(-tokens // job.micro_batch_tokens)))
        return step_time(part, bucket=length, gpu=gpu, rates=rates).seconds

    updates = ppo.ppo_epochs * ppo.rollout_batch_size // ppo.mini_batch_size
    return {
        "generate": _generation(job, ppo=ppo, gpu=gpu, rates=rates) if job.role == "actor" else 0.0,
        "score": FORWARD_SHARE * seconds(ppo.rollout_batch_size),
        "update": updates * seconds(ppo.mini_batch_size) if job.is_trained else 0.0,
    }


def best_split(
    jobs: Iterable[Job], *, num_nodes: int, gpus_per_node: int, ppo: PPOConfig, gpu: Device, rates: Efficiencies
) -> Split | None:
    """The nodes of each role, all on ranks of their own, with the shortest step; None where they don't go round."""
    placed = list(jobs)
    units = [math.ceil(job.parallel.model_parallel_size / gpus_per_node) for job in placed]

    def work_on(place: int) -> Callable[[int], dict[str, float]]:
        @cache
        def work(nodes: int) -> dict[str, float]:
            dp_size = nodes * gpus_per_node // placed[place].parallel.model_parallel_size
            return role_work(replace(placed[place], dp_size=dp_size), ppo=ppo, gpu=gpu, rates=rates)

        return work

    works = [work_on(place) for place in range(len(placed))]
    best: Split | None = None
    free = [range(unit, num_nodes + 1, unit) for unit in units[:-1]]
    for sizes in itertools.product(*free):
        last = num_nodes - sum(sizes)
        if last < units[-1] or last % units[-1]:
            continue
        parts = [work(nodes) for work, nodes in zip(works, (*sizes, last), strict=True)]
        seconds = sum(max(part[phase] for part in parts) for phase in PHASES)
        if best is None or seconds < best.seconds:
            names = [job.role for job in placed]
            best = Split(dict(zip(names, (*sizes, last), strict=True)), seconds)
    return best


def _generation(job: Job, *, ppo: PPOConfig, gpu: Device, rates: Efficiencies) -> float:
    """All answers of a replica at once, token by token, through the stages in turn; each token reads all weights."""
    tp, weights = job.parallel.tensor_model_parallel_size, num_parameters(job.model)
    answers = -(-ppo.rollout_batch_size // job.dp_size)
    read = weights * DTYPE_BYTES[job.model.params_dtype] / tp / (gpu.memory_bandwidth * rates.memory)
    computed = 2 * weights * answers / tp / (gpu.peak_flops * rates.matmul)
    overhead = section("generation")["step_overhead_seconds"] * (job.model.num_layers or 0)
    return ppo.max_response_length * (max(read, computed) + overhead)
