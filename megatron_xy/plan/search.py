"""Layouts of a run, or of PPO's roles, that fit, the fastest first; and the nearest changes that would make one fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from megatron_xy.config import InvalidConfig, RoleConfig, RunConfig, check_world, role_names, role_sections
from megatron_xy.flops import shape_of
from megatron_xy.plan.assumptions import Cluster
from megatron_xy.plan.memory import RECOMPUTATIONS
from megatron_xy.plan.overview import Plan, make_plan
from megatron_xy.plan.placements import differences, placements, resized, sizes


def search(config: RunConfig, cluster: Cluster) -> list[Plan]:
    """Plans of every layout that the rules allow and that fits, by tokens/s; of PPO the best for each way to share.

    The config's own is always looked at; of others those whose virtual stages divide the layers: the rest, hardly
    slower each than the next, would fill the list.
    """
    candidates = _candidates(config, cluster)
    if config.task == "ppo":
        placed = placements(config, cluster)
        candidates = iter([config, *placed] if _problem(config, cluster) is None else placed)
    plans = [make_plan(candidate, cluster, with_split=False) for candidate in candidates]
    found = sorted((plan for plan in plans if plan.fits), key=lambda plan: -plan.tokens_per_second)
    if config.task != "ppo":
        return found
    by_way: dict[tuple[bool, ...], Plan] = {}
    for plan in found:
        by_way.setdefault(_sharing(plan), plan)
    return list(by_way.values())


def _sharing(plan: Plan) -> tuple[bool, ...]:
    """Of each two of PPO's roles, whether they share ranks."""
    pairs = itertools.combinations(plan.roles, 2)
    return tuple(not set(one.job.ranks).isdisjoint(other.job.ranks) for one, other in pairs)


def nearest_fits(plan: Plan, found: list[Plan]) -> list[Plan]:
    """Of those that fit, the fastest with one change, two and three: what is nearest to the plan's own layout."""
    by_changes: dict[int, Plan] = {}
    for other in found:
        by_changes.setdefault(len(changes(plan.config, other.config)), other)
    return [by_changes[number] for number in sorted(by_changes) if number][:3]


def refusal(config: RunConfig, cluster: Cluster) -> str | None:
    """Why the rules allow no layout of so many ranks, by the last one looked at; None of PPO's roles."""
    told = None
    for candidate in _layouts(config, cluster):
        problem = _problem(candidate, cluster)
        if config.task == "ppo" or problem is None:
            return None
        changed = " ".join(changes(config, candidate)) or "its own"
        told = f"no layout of these ranks is allowed; with {changed}: {problem}"
    return told


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What differs in ranks, layout and recomputation, as overrides."""
    if before.task != "ppo":
        found = {
            "parallel": differences(before.parallel, after.parallel),
            "model": differences(before.model, after.model),
        }
    else:
        found = {}
        for name in role_names(before):
            (was_model, was_parallel), (model, parallel) = role_sections(before, name), role_sections(after, name)
            was, now = ((config.roles or {}).get(name, RoleConfig()) for config in (before, after))
            found[f"roles.{name}"] = {"ranks": now.ranks} if now.ranks != was.ranks else {}
            found[f"roles.{name}.parallel"] = differences(was_parallel, parallel)
            found[f"roles.{name}.model"] = differences(was_model, model)
    return [
        f"{section}.{key}={'null' if value is None else str(value).lower()}"
        for section, changed in found.items()
        for key, value in changed.items()
    ]


def _candidates(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    for candidate in _layouts(config, cluster):
        if _problem(candidate, cluster) is None:
            for recompute in RECOMPUTATIONS:
                model = candidate.model.model_copy(update={"recompute_granularity": recompute})
                yield candidate.model_copy(update={"model": model})


def _problem(config: RunConfig, cluster: Cluster) -> InvalidConfig | None:
    """What the rules have against it over so many ranks."""
    try:
        check_world(config, world_size=cluster.world_size)
    except InvalidConfig as error:
        return error
    return None


def _layouts(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """The config's own layout, then all others; the rules have yet to be asked."""
    own = config.parallel
    yield config
    num_layers = shape_of(config.model).num_layers
    for tp, pp in sizes(num_ranks=cluster.world_size, num_layers=num_layers, gpus_per_node=cluster.gpus_per_node):
        most = num_layers // pp if pp > 1 else 0
        for vp in (None, *(size for size in range(2, most + 1) if num_layers % (pp * size) == 0)):
            parallel = resized(own, tp=tp, pp=pp, vp=vp)
            if parallel != own:
                yield config.model_copy(update={"parallel": parallel})
