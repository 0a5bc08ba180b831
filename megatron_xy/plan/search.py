"""Layouts of a run's ranks that fit, the fastest first; and the nearest changes that would make one fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from megatron_xy.config import InvalidConfig, ModelConfig, ParallelConfig, RunConfig, check_world
from megatron_xy.plan.assumptions import Device, Efficiencies
from megatron_xy.plan.overview import Plan, make_plan

TENSOR_SIZES, PIPELINE_SIZES = (1, 2, 4, 8), (1, 2, 4, 8, 16)
RECOMPUTATIONS = ("none", "selective", "full")


def search(config: RunConfig, *, num_nodes: int, gpus_per_node: int, gpu: Device, rates: Efficiencies) -> list[Plan]:
    """Plans of every layout that the rules allow and that fits, by tokens/s. Tasks of one model."""
    plans = []
    for candidate in _candidates(config, world_size=num_nodes * gpus_per_node, gpus_per_node=gpus_per_node):
        plan = make_plan(candidate, num_nodes=num_nodes, gpus_per_node=gpus_per_node, gpu=gpu, rates=rates)
        if plan.fits:
            plans.append(plan)
    return sorted(plans, key=lambda plan: -plan.tokens_per_second)


def nearest_fits(plan: Plan, found: list[Plan]) -> list[Plan]:
    """Of those that fit, the fastest with one change, two and three: what is nearest to the plan's own layout."""
    by_changes: dict[int, Plan] = {}
    for other in found:
        by_changes.setdefault(len(changes(plan.config, other.config)), other)
    return [by_changes[number] for number in sorted(by_changes) if number][:3]


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What differs in layout and recomputation, as overrides."""
    pairs: list[tuple[str, ModelConfig | ParallelConfig, ModelConfig | ParallelConfig]] = [
        ("parallel", before.parallel, after.parallel),
        ("model", before.model, after.model),
    ]
    told = []
    for name, old, new in pairs:
        for key in type(old).model_fields:
            if getattr(old, key) != getattr(new, key):
                value = getattr(new, key)
                told.append(f"{name}.{key}={'null' if value is None else str(value).lower()}")
    return told


def _candidates(config: RunConfig, *, world_size: int, gpus_per_node: int) -> Iterator[RunConfig]:
    assert config.model.num_layers, "the shape is complete once a run is planned"
    for tp, pp, recompute in itertools.product(TENSOR_SIZES, PIPELINE_SIZES, RECOMPUTATIONS):
        if tp > gpus_per_node or pp > config.model.num_layers:
            continue
        layers = config.model.num_layers // pp
        for vp in (
            None,
            *(size for size in range(2, layers + 1) if pp > 1 and config.model.num_layers % (pp * size) == 0),
        ):
            parallel = config.parallel.model_copy(
                update={
                    "tensor_model_parallel_size": tp,
                    "pipeline_model_parallel_size": pp,
                    "virtual_pipeline_model_parallel_size": vp,
                    "sequence_parallel": tp > 1,
                }
            )
            model = config.model.model_copy(update={"recompute_granularity": recompute})
            candidate = config.model_copy(update={"parallel": parallel, "model": model})
            try:
                check_world(candidate, world_size=world_size)
            except InvalidConfig:
                continue
            yield candidate
