"""Stragglers: ranks that compute for much longer than the others, for the work that they have.

Busy time is a step's without waiting for data and for other ranks, so a rank that only waits for a slow one is not
blamed. Per FLOP of its pipeline stage, since stages differ. Ranks exchange it every few steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_xy import device
from megatron_xy.flops import stage_share
from megatron_xy.parallel import gathered_over
from megatron_xy.role import Role
from megatron_xy.stages import layers_per_chunk

WINDOW = 5  # steps between two exchanges
WINDOWS = 2  # in a row, before a rank is named: one may be chance
FACTOR = 2.0  # times the median of the other ranks, per FLOP
RAW_FACTOR = 1.2  # and in plain seconds: a small stage has little to do besides what counts no FLOPs


@dataclass(frozen=True)
class Straggler:
    """A rank to be named."""

    rank: int  # within the role
    factor: float  # busy time per FLOP, in medians of the other ranks
    busy_seconds: float  # a step


class StragglerWatch:
    """Adds up this rank's busy time and compares it with the others'."""

    def __init__(self, role: Role) -> None:
        self._group = role.groups.all_ranks
        self._share = role_share(role)
        self._busy = 0.0
        self._steps = -1  # the first step warms up, on every rank in its own way
        self._running: dict[int, int] = {}  # windows in a row in which a rank stood out

    def add(self, busy_seconds: float) -> list[Straggler]:
        """One step's busy time; names the ranks that have just become stragglers. Every WINDOW steps a collective."""
        self._steps += 1
        self._busy += max(0.0, busy_seconds) if self._steps else 0.0
        if self._steps < WINDOW or self._group.size() == 1:
            return []
        mine = torch.tensor([self._busy / self._steps, self._share], dtype=torch.float64, device=device.current())
        pairs = gathered_over(mine, self._group).tolist()
        self._busy, self._steps = 0.0, 0
        found = {one.rank: one for one in outliers(*zip(*pairs, strict=True))}
        self._running = {rank: self._running.get(rank, 0) + 1 for rank in found}
        return [found[rank] for rank, windows in self._running.items() if windows == WINDOWS]


def outliers(busy: Sequence[float], shares: Sequence[float]) -> list[Straggler]:
    """Ranks that stand out among seconds a step and shares of the model's FLOPs, both by rank."""
    rates = [seconds / share for seconds, share in zip(busy, shares, strict=True)]
    result = []
    medians = zip(medians_of_others(rates), medians_of_others(busy), strict=True)
    for rank, (rate, (others, other_seconds)) in enumerate(zip(rates, medians, strict=True)):
        if rate > FACTOR * others and busy[rank] > RAW_FACTOR * other_seconds:
            result.append(Straggler(rank, rate / others if others else float("inf"), busy[rank]))
    return result


def medians_of_others(values: Sequence[float]) -> list[float]:
    """For each of two values or more the median of all but it; sorted once, as there may be thousands."""
    ordered = sorted(values)
    lower, upper = len(values) // 2 - 1, (len(values) - 1) // 2  # the middle of the others
    places = [bisect_left(ordered, value) for value in values]
    return [(ordered[lower + (lower >= place)] + ordered[upper + (upper >= place)]) / 2 for place in places]


def role_share(role: Role) -> float:
    """The part of a token's FLOPs that this rank's stage has."""
    groups, model, num_chunks = role.groups, role.model, role.parallel.num_chunks
    assert model.num_layers, "the shape is complete once a run starts"
    layers = layers_per_chunk(model.num_layers, num_chunks=groups.pp_size * num_chunks)
    mine = sum(layers[groups.pp_rank :: groups.pp_size])
    return stage_share(model, num_layers=mine, has_head=groups.is_last_stage)
