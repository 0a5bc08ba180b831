"""Where the roles of a PPO run could stand: which of them share ranks, how many each group has, and how every role is
laid out on its ranks. From a config to the configs with the shortest step, one for each way to share.

Roles that share ranks take turns there and hold their weights beside each other; those apart work at the same time. A
layout survives where no other one is better in memory and in every phase.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xy.config import (
    ModelConfig,
    ParallelConfig,
    RoleName,
    RunConfig,
    layout_rules,
    role_names,
    role_sections,
    shape_rules,
)
from megatron_xy.plan.assumptions import Cluster, section
from megatron_xy.plan.job import Job, jobs
from megatron_xy.plan.memory import RECOMPUTATIONS, Held, held_between_steps, stage_memory
from megatron_xy.plan.parameters import telling_stages
from megatron_xy.plan.ppo import PHASES, role_work
from megatron_xy.ppo.placement import spelt_ranks

MOST_UNITS = 16  # into which the world is cut at first; the best splits are then moved by less
SLACK = 0.01
FEWEST_UNITS = 8  # of less than a node each, where there are fewer nodes

Group = tuple[RoleName, ...]
Layouts = tuple[tuple[RoleName, ModelConfig, ParallelConfig], ...]


class _Options(NamedTuple):
    """What roles together can do with a number of ranks."""

    costs: NDArray[np.float64]  # [options, 2 + phases]: bytes held between steps, bytes besides, seconds by phase
    layouts: list[Layouts]

    def of(self, chosen: Sequence[int] | NDArray[np.int64]) -> _Options:
        """Some of them."""
        return _Options(self.costs[chosen], [self.layouts[index] for index in chosen])


class _Placement(NamedTuple):
    """Groups of roles, one after the other in the world."""

    seconds: float  # of a step: every phase lasts until the last group is done
    sizes: tuple[int, ...]  # ranks of each group
    layouts: tuple[Layouts, ...]


def placements(config: RunConfig, cluster: Cluster) -> list[RunConfig]:
    """For each way in which roles could share ranks the config with the shortest step that fits; that first."""
    world_size, gpus_per_node = cluster.world_size, cluster.gpus_per_node
    all_jobs = dict(zip(role_names(config), jobs(_replica_each(config), world_size=world_size), strict=True))
    search = _Search(all_jobs, cluster)
    parts = [size for size in range(1, gpus_per_node + 1) if gpus_per_node % size == 0]
    unit = max((size for size in parts if world_size // size >= FEWEST_UNITS), default=1)
    found = [search.best_of(groups, world_size=world_size, unit=unit) for groups in _partitions(list(all_jobs))]
    fitting = sorted((placement for placement in found if placement), key=lambda placement: placement.seconds)
    return [_placed(config, placement) for placement in fitting]


class _Search:
    """Splits of the world, and what each group of roles can do with its part; each question is answered once."""

    def __init__(self, all_jobs: Mapping[RoleName, Job], cluster: Cluster) -> None:
        self._jobs, self._cluster = all_jobs, cluster
        self._memory = section("memory")
        self._of_role = cache(self._found_of_role)
        self._of_group = cache(self._found_of_group)
        self._fastest = cache(self._found_fastest)
        self._whole = cache(self._found_whole)

    def best_of(self, groups: Sequence[Group], *, world_size: int, unit: int) -> _Placement | None:
        """The fastest split over the groups, in units of ranks: coarse at first, then by moving less and less."""
        units = world_size // unit
        step = -(-units // MOST_UNITS)
        best: _Placement | None = None
        for others in itertools.product(range(step, units, step), repeat=len(groups) - 1):
            if sum(others) < units:
                sizes = [(units - sum(others)) * unit, *(part * unit for part in others)]
                best = self._better(best, groups, sizes)
        while best is not None and step:
            moved = best
            for giver, taker in itertools.permutations(range(len(groups)), 2):
                sizes = list(moved.sizes)
                sizes[giver] -= step * unit
                sizes[taker] += step * unit
                if sizes[giver] > 0:
                    moved = self._better(moved, groups, sizes) or moved
            best, step = moved, step if moved is not best else step // 2
        return best

    def _better(self, best: _Placement | None, groups: Sequence[Group], sizes: Sequence[int]) -> _Placement | None:
        """The better one of `best` and what groups of these sizes can do."""
        start, parts = 0, []
        for group, size in zip(groups, sizes, strict=True):
            parts.append(self._fastest(group, size, start % self._cluster.gpus_per_node))
            start += size
        # Every choice of an option a group along a dimension each, phases along the last one.
        shapes = [[-1 if axis == place else 1 for axis in range(len(parts))] for place in range(len(parts))]
        phases = [part.costs[:, 2:].reshape(*shape, len(PHASES)) for part, shape in zip(parts, shapes, strict=True)]
        seconds = reduce(np.maximum, phases).sum(axis=-1)
        if not seconds.size or (best is not None and seconds.min() >= best.seconds):
            return best
        chosen = np.unravel_index(seconds.argmin(), seconds.shape)
        layouts = tuple(part.layouts[index] for part, index in zip(parts, chosen, strict=True))
        return _Placement(float(seconds.min()), tuple(sizes), layouts)

    def _found_fastest(self, group: Group, num_ranks: int, start: int) -> _Options:
        """Of the group's options those that nothing beats in every phase; tensor parallel ranks stay in a node."""
        options = self._of_group(group, num_ranks)
        aligned = [
            index
            for index, layouts in enumerate(options.layouts)
            if all(start % parallel.tensor_model_parallel_size == 0 for _, _, parallel in layouts)
        ]
        options = options.of(aligned)
        seconds = options.costs[:, 2:]
        return options.of(_unbeaten(seconds, seconds * (1 + SLACK)))

    def _found_of_group(self, group: Group, num_ranks: int) -> _Options:
        one = self._of_role(group[0], num_ranks)
        if len(group) == 1:
            return one
        other = self._of_group(group[1:], num_ranks)
        mine, others = one.costs[:, None], other.costs[None]
        together = mine + others
        together[:, :, 1] = np.maximum(mine, others)[:, :, 1]
        return self._kept(
            together.reshape(-1, together.shape[-1]),
            lambda index: one.layouts[index // len(other.layouts)] + other.layouts[index % len(other.layouts)],
        )

    def _found_of_role(self, role: RoleName, num_ranks: int) -> _Options:
        costs: list[list[float]] = []
        layouts: list[Layouts] = []
        for job in _laid_out(self._jobs[role], num_ranks=num_ranks, gpus_per_node=self._cluster.gpus_per_node):
            held = {stage: self._held(role, job, stage) for stage in telling_stages(job.model, job.parallel)}
            memories = [stage_memory(job, stage=stage, held=counted) for stage, counted in held.items()]
            bytes_ = (max(m.static for m in memories), max(m.activations for m in memories))
            if not self._fit(np.array(bytes_)):
                continue
            work = role_work(job, self._cluster, held=held[0])
            costs.append([*bytes_, *(work[phase] for phase in PHASES)])
            layouts.append(((role, job.model, job.parallel),))
        return self._kept(np.array(costs).reshape(-1, 2 + len(PHASES)), lambda index: layouts[index])

    def _kept(self, costs: NDArray[np.float64], layouts_of: Callable[[int], Layouts]) -> _Options:
        """Those that fit and that nothing beats."""
        fitting = np.flatnonzero(self._fit(costs.T))
        bounds = costs[fitting] * (1 + SLACK)
        bounds[:, :2] = costs[fitting, :2] + SLACK * self._cluster.gpu.memory_bytes  # of little memory, more is no loss
        chosen = fitting[_unbeaten(costs[fitting], bounds)]
        return _Options(costs[chosen], [layouts_of(int(index)) for index in chosen])

    def _fit(self, costs: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[2 or more, options] or [2]: bytes held and besides."""
        held, besides = costs[0], costs[1]
        margin = self._memory["context_bytes"] + self._memory["fragmentation"] * besides
        fits: NDArray[np.bool_] = held + besides + margin <= self._cluster.gpu.memory_bytes
        return fits

    def _held(self, role: RoleName, job: Job, stage: int) -> Held:
        """Counted for one replica, of which others share the optimizer: but for paddings."""
        whole = self._whole(role, job.parallel, stage)
        shares = job.dp_size if job.parallel.use_distributed_optimizer else 1
        return whole._replace(optimizer=whole.optimizer // shares)

    def _found_whole(self, role: RoleName, parallel: ParallelConfig, stage: int) -> Held:
        return held_between_steps(replace(self._jobs[role], parallel=parallel, dp_size=1), stage=stage)


def sizes(*, num_ranks: int, num_layers: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) parallel sizes that divide so many ranks; tensor parallel ranks stay in a node."""
    for tp in range(1, gpus_per_node + 1):
        if gpus_per_node % tp == 0 and num_ranks % tp == 0:
            most = min(num_layers, num_ranks // tp)
            yield from ((tp, pp) for pp in range(1, most + 1) if num_ranks // tp % pp == 0)


def resized(own: ParallelConfig, *, tp: int, pp: int, vp: int | None) -> ParallelConfig:
    """A layout with other sizes; where tensors are split, sequences are, too."""
    return own.model_copy(
        update={
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vp,
            "sequence_parallel": tp > 1 or own.sequence_parallel,
        }
    )


def _laid_out(job: Job, *, num_ranks: int, gpus_per_node: int) -> Iterator[Job]:
    """The role on so many ranks in every layout that the rules allow."""
    model, own = job.model, job.parallel
    for tp, pp in sizes(num_ranks=num_ranks, num_layers=model.num_layers or 0, gpus_per_node=gpus_per_node):
        is_same = pp == own.pipeline_model_parallel_size
        parallel = resized(own, tp=tp, pp=pp, vp=own.virtual_pipeline_model_parallel_size if is_same else None)
        if any(shape_rules(model, parallel)) or any(layout_rules(parallel)):
            continue
        for recompute in RECOMPUTATIONS if job.is_trained else (model.recompute_granularity,):
            changed = model.model_copy(update={"recompute_granularity": recompute})
            yield replace(job, model=changed, parallel=parallel).over(num_ranks // (tp * pp))


def _unbeaten(costs: NDArray[np.float64], bounds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows of [options, costs] of which no other is within the bounds in every column."""
    left = np.argsort(costs[:, -len(PHASES) :].sum(axis=1), kind="stable")
    kept = []
    while len(left):
        kept.append(left[0])
        is_beaten = (costs[left[0]] <= bounds[left]).all(axis=1)
        left = left[~is_beaten]
    return np.array(kept, dtype=np.int64)


def _partitions(roles: Sequence[RoleName]) -> Iterator[list[Group]]:
    """All ways to share; the first role's group comes first."""
    if not roles:
        yield []
        return
    first, rest = roles[0], roles[1:]
    for number in range(len(rest) + 1):
        for others in itertools.combinations(rest, number):
            for groups in _partitions([role for role in rest if role not in others]):
                yield [(first, *others), *groups]


def _replica_each(config: RunConfig) -> RunConfig:
    """Every role on the ranks of one replica, so that its jobs can be made whatever the world."""
    assert config.roles is not None, "task ppo has them"
    roles = {}
    for name in role_names(config):
        ranks = spelt_ranks(range(role_sections(config, name)[1].model_parallel_size))
        roles[name] = config.roles[name].model_copy(update={"ranks": ranks, "share": None})
    return config.model_copy(update={"roles": roles})


def _placed(config: RunConfig, placement: _Placement) -> RunConfig:
    """The config with the placement's ranks and layouts."""
    assert config.roles is not None, "task ppo has them"
    roles = dict(config.roles)
    start = 0
    for size, layouts in zip(placement.sizes, placement.layouts, strict=True):
        ranks = spelt_ranks(range(start, start + size))
        for name, model, parallel in layouts:
            role, was_model, was_parallel = roles[name], *role_sections(config, name)
            roles[name] = role.model_copy(
                update={
                    "ranks": ranks,
                    "share": None,
                    "model": role.model.model_copy(update=differences(was_model, model)),
                    "parallel": role.parallel.model_copy(update=differences(was_parallel, parallel)),
                }
            )
        start += size
    return config.model_copy(update={"roles": roles})


def differences(before: ModelConfig | ParallelConfig, after: ModelConfig | ParallelConfig) -> dict[str, Any]:
    """{key: its value afterwards} of those that differ."""
    values = ((key, getattr(before, key), getattr(after, key)) for key in type(before).model_fields)
    return {key: new for key, old, new in values if old != new}
