"""The time line of a PPO step: how long each role works in each phase, what it idles, and the best split of the nodes.

Answers are as long as they may be, their prompts as long again where there is room. A phase lasts until the last rank
is done; what roles on one rank do, they do in turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_xy.flops import DTYPE_BYTES, FORWARD_SHARE, flops_per_token, num_parameters, shape_of
from megatron_xy.plan.assumptions import Cluster, section
from megatron_xy.plan.job import Answers, Job
from megatron_xy.plan.memory import MAX_SEQUENCES, Held, held_between_steps
from megatron_xy.plan.speed import step_time

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


def time_line(jobs: Iterable[Job], cluster: Cluster) -> TimeLine:
    """Of the roles where they stand."""
    placed = list(jobs)
    work = {job.role: role_work(job, cluster) for job in placed}
    phases = {}
    for phase in PHASES:
        by_rank: dict[int, float] = {}
        for job in placed:
            for rank in job.ranks:
                by_rank[rank] = by_rank.get(rank, 0.0) + work[job.role][phase]
        phases[phase] = max(by_rank.values())
    return TimeLine(phases, work, sum(phases.values()))


def role_work(job: Job, cluster: Cluster, *, held: Held | None = None) -> dict[str, float]:
    """{phase: seconds} of one role in a step. held: of a rank of its first stage, where it is known already."""
    assert job.answers is not None, "a role of PPO has them"
    ppo, length = job.answers.ppo, answer_length(job.answers)
    shape = partial(job.answers.shape, length=length, parallel=job.parallel, dp_size=job.dp_size)

    def seconds(number: int, *, is_trained: bool) -> float:
        batches, tokens = shape(number)
        # A pass that only scores keeps nothing, and so makes nothing anew.
        model = job.model if is_trained else job.model.model_copy(update={"recompute_granularity": "none"})
        part = replace(job, model=model, num_micro_batches=batches, micro_batch_tokens=tokens, is_trained=is_trained)
        return step_time(part, cluster, bucket=length, held=held).seconds

    updates = ppo.ppo_epochs * ppo.rollout_batch_size // ppo.mini_batch_size
    return {
        "generate": _generation(job, job.answers, cluster) if job.role == "actor" else 0.0,
        "score": FORWARD_SHARE * seconds(ppo.rollout_batch_size, is_trained=False),
        "update": updates * seconds(ppo.mini_batch_size, is_trained=True) if job.is_trained else 0.0,
    }


def useful_flops(jobs: Iterable[Job]) -> float:
    """Of all roles in a step: a pass over every answer, the actor's generation, and the updates."""
    total = 0.0
    for job in jobs:
        assert job.answers is not None, "a role of PPO has them"
        ppo, length = job.answers.ppo, answer_length(job.answers)
        passes = FORWARD_SHARE * (2 if job.role == "actor" else 1) + (ppo.ppo_epochs if job.is_trained else 0)
        total += passes * ppo.rollout_batch_size * length * flops_per_token(job.model, attention_length=length)
    return total


def answer_length(answers: Answers) -> int:
    """Tokens of an answer with its prompt, as times are told for it."""
    return min(2 * answers.ppo.max_response_length, answers.room)


def best_split(jobs: Iterable[Job], cluster: Cluster) -> Split | None:
    """The nodes of each role, all on ranks of their own, with the shortest step; None where they don't go round."""
    placed = list(jobs)
    num_nodes, gpus_per_node = cluster.num_nodes, cluster.gpus_per_node
    units = [math.ceil(job.parallel.model_parallel_size / gpus_per_node) for job in placed]

    def table(job: Job) -> NDArray[np.float64]:
        """[nodes + 1, phases] seconds; without nodes for a replica it never ends."""
        held = held_between_steps(replace(job, dp_size=1), stage=0)
        rows = np.full((num_nodes + 1, len(PHASES)), np.inf)
        for nodes in range(num_nodes + 1):
            dp_size, rest = divmod(nodes * gpus_per_node, job.parallel.model_parallel_size)
            if dp_size and not rest:
                work = role_work(job.over(dp_size), cluster, held=held)
                rows[nodes] = [work[phase] for phase in PHASES]
        return rows

    tables = [table(job) for job in placed]
    best: Split | None = None
    for sizes in itertools.product(*(range(unit, num_nodes + 1, unit) for unit in units[:-2])):
        left = num_nodes - sum(sizes)
        if left < 2:
            continue
        one = np.arange(1, left)  # nodes of the last role but one; the last one has the rest
        phases = np.maximum(tables[-2][one], tables[-1][left - one])
        for of_role, nodes in zip(tables, sizes, strict=False):
            phases = np.maximum(phases, of_role[nodes])
        seconds = phases.sum(axis=1)
        place = int(seconds.argmin())
        if seconds[place] < (math.inf if best is None else best.seconds):
            nodes_of = (*sizes, int(one[place]), int(left - one[place]))
            best = Split({job.role: nodes for job, nodes in zip(placed, nodes_of, strict=True)}, float(seconds[place]))
    return best


def _generation(job: Job, answers: Answers, cluster: Cluster) -> float:
    """The answers of a replica token by token, so many at once; each token reads all weights, and the keys and values
    of what came before, half of the answers on average."""
    model, ppo, tp = job.model, answers.ppo, job.parallel.tensor_model_parallel_size
    gpu, rates = cluster.gpu, cluster.rates
    weights, width = num_parameters(model), DTYPE_BYTES[model.params_dtype]
    number = -(-ppo.rollout_batch_size // job.dp_size)
    rounds = -(-number // MAX_SEQUENCES)
    context = answer_length(answers) - ppo.max_response_length // 2
    shape = shape_of(model)
    known = 2 * width * shape.num_query_groups * shape.head_dim * shape.num_layers
    read = (rounds * weights * width + number * context * known) / tp / (gpu.memory_bandwidth * rates.memory)
    computed = 2 * weights * number / tp / (gpu.peak_flops * rates.matmul)
    overhead = rounds * section("generation")["step_overhead_seconds"] * shape.num_layers
    return ppo.max_response_length * (max(read, computed) + overhead)
