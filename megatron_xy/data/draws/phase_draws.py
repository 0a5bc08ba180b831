"""What the steps of one phase draw: the bucket of each, and how many samples of each source, in closed form.

step -> block of 8 steps -> bucket -> samples of each source, by weights and what earlier phases left short
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.draws.apportionment import Apportionment
from megatron_xy.data.draws.permutation import digest
from megatron_xy.errors import ConfigError

BLOCK_STEPS = 8  # buckets are shuffled within blocks of this many steps; whole blocks follow the weights
MAX_DRIFT_STEPS = 2.0  # a shuffle that takes any set of buckets further from its due is drawn again
MAX_SOURCE_STEPS = 1.5  # and one that takes any source so far from its own
MAX_SHUFFLES = 16


@dataclass(frozen=True)
class SamplerPhase:
    """From data step `from_step` on: the sources' weights and the tokens of a step.

    weights: {source: part of the drawn tokens, padding included}, of any sum; None: as many as each source holds.
    key: where the config speaks of it, for errors; None for the run's own `data.weights` and `training` section.
    """

    from_step: int
    weights: Mapping[str, float] | None
    global_batch_tokens: int
    key: str | None = None


class PhaseDraws:
    """One phase's arithmetic: what its first n steps draw, and what all phases before it drew.

    How far a source gets from its due is decided twice. At the ends of blocks, by the apportionment: it rounds every
    pair of its trees by half a seat at most. Inside a block, by the order of its steps: any order of eight steps stays
    within k * (1 - k / 8) <= 2 batches of the straight line between the block's ends, for a source that has k of
    them; a block that a phase cuts short hands this on as a debt. So orders are judged by the samples that they really
    draw of each source, all earlier phases included: the first shuffle that keeps every source within
    MAX_SOURCE_STEPS of its due is taken, and where none does, the order that goes the closest way.

    No rule that keeps earlier steps as they are can bound this for every table of phases. With n sources, each alone in
    its bucket, and phases of one step that weigh equally what was not drawn yet, the source that is left over has come
    to 1/n + 1/(n-1) + ... + 1/2 batches: over three from 31 sources on, whatever is drawn.
    """

    def __init__(
        self,
        phase: SamplerPhase,
        number: int,
        *,
        sizes: Mapping[tuple[str, int], int],
        seed: int,
        earlier: Sequence[PhaseDraws],
    ) -> None:
        self.from_step = phase.from_step
        self.global_batch_tokens = phase.global_batch_tokens
        before = earlier[-1] if earlier else None
        self.drawn_before = before.drawn(phase.from_step - before.from_step) if before else {}
        self._ahead_before = before.ahead(phase.from_step - before.from_step) if before else {}
        self.shares = stream_shares(phase.weights, sizes, key=f"{phase.key or 'data'}.weights")
        self._key = (seed, "block", number)
        self.buckets = sorted({bucket for _, bucket in self.shares})
        _check_batch_tokens(
            phase.global_batch_tokens, self.buckets, key=f"{phase.key or 'training'}.global_batch_tokens"
        )
        self.sources = {b: sorted(source for source, bucket in self.shares if bucket == b) for b in self.buckets}
        self.batch_samples = {b: phase.global_batch_tokens // b for b in self.buckets}
        owed = self._owed()
        parts = {b: [self.shares[source, b] for source in self.sources[b]] for b in self.buckets}
        owed_in = {b: [owed[source, b] for source in self.sources[b]] for b in self.buckets}
        self._bucket_parts = [math.fsum(parts[b]) for b in self.buckets]
        self._bucket_owed = [math.fsum(owed_in[b]) / phase.global_batch_tokens for b in self.buckets]
        self._bucket_seats = Apportionment(self._bucket_parts, owed=self._bucket_owed)
        self._source_seats = {
            b: Apportionment(parts[b], owed=[tokens / b for tokens in owed_in[b]]) for b in self.buckets
        }
        places = {source: place for place, source in enumerate(sorted({source for source, _ in sizes}))}
        self._columns = {b: [places[source] for source in self.sources[b]] for b in self.buckets}
        self._source_weights = np.zeros(len(places))
        for (source, _), share in self.shares.items():
            self._source_weights[places[source]] += share
        self._off_before = np.zeros(len(places))
        for (source, _), tokens in self._ahead_before.items():
            self._off_before[places[source]] += tokens / phase.global_batch_tokens
        self._block = functools.lru_cache(maxsize=4)(self._find_block)  # the steps of a block come one after another

    def draw(self, step: int) -> tuple[int, int]:
        """The bucket of the phase's step number `step` (from 0), and how many steps of the phase drew it before."""
        block, place = divmod(step, BLOCK_STEPS)
        counts, order = self._block(block)
        bucket = order[place]
        return self.buckets[bucket], counts[bucket] + order[:place].count(bucket)

    def drawn(self, num_steps: int) -> dict[tuple[str, int], int]:
        """{(source, bucket): samples drawn by all earlier phases and the first `num_steps` steps of this one}."""
        block, place = divmod(num_steps, BLOCK_STEPS)
        counts, order = self._block(block)
        drawn = dict(self.drawn_before)
        for position, bucket in enumerate(self.buckets):
            draws = counts[position] + order[:place].count(position)
            for source, count in zip(self.sources[bucket], self.drawn_in_bucket(bucket, draws), strict=True):
                drawn[source, bucket] = drawn.get((source, bucket), 0) + count
        return drawn

    def ahead(self, num_steps: int) -> dict[tuple[str, int], float]:
        """{(source, bucket): tokens drawn beyond its due by all earlier phases and this one's first `num_steps`}."""
        drawn, ahead = self.drawn(num_steps), dict(self._ahead_before)
        for (source, bucket), share in self.shares.items():
            tokens = bucket * (drawn[source, bucket] - self.drawn_before.get((source, bucket), 0))
            due = num_steps * self.global_batch_tokens * share
            ahead[source, bucket] = ahead.get((source, bucket), 0.0) + tokens - due
        return ahead

    def drawn_in_bucket(self, bucket: int, draws: int) -> list[int]:
        """Samples that the first `draws` draws of `bucket` in this phase take of each of `sources[bucket]`."""
        return self._source_seats[bucket].counts(draws * self.batch_samples[bucket])

    def _owed(self) -> dict[tuple[str, int], float]:
        """{(source, bucket): tokens that earlier phases left it short of its due}; the sum is 0.

        What streams without a weight in this phase hold too much or too little, all others bear by their shares.
        """
        short = {stream: -self._ahead_before.get(stream, 0.0) for stream in self.shares}
        rest = math.fsum(short.values())
        return {stream: tokens - rest * self.shares[stream] for stream, tokens in short.items()}

    def _find_block(self, block: int) -> tuple[list[int], list[int]]:
        """Draws of each bucket before the block, and the block's own buckets in order (positions in `buckets`)."""
        before = self._bucket_seats.counts(block * BLOCK_STEPS)
        after = self._bucket_seats.counts((block + 1) * BLOCK_STEPS)
        chosen = np.repeat(np.arange(len(before)), np.subtract(after, before))
        off, changes = self._source_changes(block * BLOCK_STEPS, before, after)
        can_be_close = np.abs(off + changes.sum(axis=0)).max() <= MAX_SOURCE_STEPS  # where every order ends
        for attempt in range(MAX_SHUFFLES if can_be_close else 0):
            hashes = np.frombuffer(digest(*self._key, block, attempt), dtype="<u8")
            order = chosen[np.argsort(hashes, kind="stable")]
            rows = np.empty(BLOCK_STEPS, dtype=np.int64)
            rows[np.argsort(order, kind="stable")] = np.arange(BLOCK_STEPS)  # a bucket's draws come in their order
            if (
                np.abs(off + np.cumsum(changes[rows], axis=0)).max() <= MAX_SOURCE_STEPS
                and self._drift(block * BLOCK_STEPS, before, order.tolist()) <= MAX_DRIFT_STEPS
            ):
                return before, order.tolist()
        return before, self._closest_order(off, changes, chosen.tolist())

    def _source_changes(
        self, step: int, before: Sequence[int], after: Sequence[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How far each source is ahead of its due at `step`: [sources], in steps; and what each draw of the block
        changes of it, bucket by bucket: [BLOCK_STEPS, sources]."""
        off = self._off_before - step * self._source_weights
        changes = np.tile(-self._source_weights, (BLOCK_STEPS, 1))
        row = 0
        for position, bucket in enumerate(self.buckets):
            columns, part = self._columns[bucket], bucket / self.global_batch_tokens
            draws = range(before[position], after[position] + 1)
            counts = np.array([self.drawn_in_bucket(bucket, number) for number in draws], dtype=np.float64)
            off[columns] += part * counts[0]
            changes[row : row + len(draws) - 1, columns] += part * np.diff(counts, axis=0)
            row += len(draws) - 1
        return off, changes

    def _closest_order(self, off: NDArray[np.float64], changes: NDArray[np.float64], chosen: list[int]) -> list[int]:
        """The order in which each step takes the bucket that leaves the furthest source closest to its due."""
        left, order = list(range(BLOCK_STEPS)), []
        while left:
            firsts = {chosen[row]: row for row in reversed(left)}.values()  # a bucket's draws come in their order
            best = min(firsts, key=lambda row: float(np.abs(off + changes[row]).max()))
            off = off + changes[best]
            left.remove(best)
            order.append(chosen[best])
        return order

    def _drift(self, step: int, before: Sequence[int], order: Sequence[int]) -> float:
        """By how many steps any set of buckets gets ahead of its due, at most, after any step of `order` from `step`.

        What one set is ahead, the others are behind: this bounds both.
        """
        due = (step * part + owed for part, owed in zip(self._bucket_parts, self._bucket_owed, strict=True))
        ahead = [count - steps for count, steps in zip(before, due, strict=True)]
        worst = 0.0
        for bucket in order:
            ahead = [value - part for value, part in zip(ahead, self._bucket_parts, strict=True)]
            ahead[bucket] += 1
            worst = max(worst, sum(value for value in ahead if value > 0))
        return worst


def total_tokens(phases: Sequence[SamplerPhase | PhaseDraws], *, num_steps: int) -> int:
    """Tokens, padding included, of the first `num_steps` steps."""
    ends = [*(phase.from_step for phase in phases[1:]), num_steps]
    return sum(
        phase.global_batch_tokens * max(0, min(end, num_steps) - phase.from_step)
        for phase, end in zip(phases, ends, strict=True)
    )


def stream_shares(
    weights: Mapping[str, float] | None, sizes: Mapping[tuple[str, int], int], *, key: str
) -> dict[tuple[str, int], float]:
    """{(source, bucket): weight[source] * share[source, bucket]}, the sum 1, parts of 0 left out.

    sizes: samples of each (source, bucket); key: what the weights are called in errors. Raises ConfigError.
    """
    lengths: dict[str, int] = {}
    for (source, bucket), size in sizes.items():
        lengths[source] = lengths.get(source, 0) + bucket * size
    weights = lengths if weights is None else weights
    _check_weights(weights, lengths, key=key)
    total = math.fsum(weights.values())
    shares = {
        (source, bucket): weights[source] / total * (bucket * size / lengths[source])
        for (source, bucket), size in sorted(sizes.items())
        if size
    }
    return {stream: share for stream, share in shares.items() if share}


def _check_weights(weights: Mapping[str, float], lengths: Mapping[str, int], *, key: str) -> None:
    known = ", ".join(sorted(lengths))
    for source, weight in weights.items():
        if source not in lengths:
            near = difflib.get_close_matches(source, lengths, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{key} names {source}, which the data does not have; {hint}known: {known}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{key}: {source} ({weight}) must be a finite number, 0 or more")
        if weight and not lengths[source]:
            raise ConfigError(
                f"{key}: {source} ({weight}) has no samples in the data; give it 0, or build it again with them"
            )
    if missing := sorted(set(lengths) - set(weights)):
        raise ConfigError(
            f"{key} lacks {', '.join(missing)}; every source of the data needs a weight: give it 0 to leave it out"
        )
    if not any(weights.values()):
        raise ConfigError(f"{key}: all are 0; give at least one of {known} a weight above 0")


def _check_batch_tokens(global_batch_tokens: int, buckets: Sequence[int], *, key: str) -> None:
    unit = math.lcm(*buckets)
    if global_batch_tokens % unit:
        below = global_batch_tokens // unit * unit
        nearest = f"{below}, {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"{key} ({global_batch_tokens}) must be a multiple of every bucket "
            f"({', '.join(map(str, buckets))}: of {unit}); nearest: {nearest}"
        )
