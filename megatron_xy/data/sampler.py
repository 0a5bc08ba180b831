"""Which bucket and which samples a data step takes: from sample counts, weights and a seed, in closed form.

    data_step -> phase -> block of 8 steps -> bucket -> how many samples of each source -> their indices -> their order

Everything is a pure function of (seed, phases, data_step). Nothing is replayed at a resume, no index lies in memory or
on disk, and nothing depends on train_iters, on the data parallel size or on the micro-batches.

A *stream* is what one source holds in one bucket. Its samples are drawn in an order that is shuffled anew in every
epoch; each sample comes once per epoch, through every change of weights and batch size.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.apportionment import Apportionment
from megatron_xy.data.permutation import PERMUTATION_ROUNDS, mixed, permute
from megatron_xy.errors import ConfigError, DataError

BLOCK_STEPS = 8  # buckets are shuffled within blocks of this many steps; whole blocks follow the weights
MAX_DRIFT_STEPS = 2.0  # a shuffle that takes any set of buckets further from its due is drawn again
MAX_SOURCE_STEPS = 1.5  # and one that takes any source so far from its own
MAX_SHUFFLES = 16


@dataclass(frozen=True)
class Stream:
    """What one source holds in one bucket."""

    source: str
    bucket: int  # tokens a sample, padding included
    num_samples: int


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


class SampleId(NamedTuple):
    """One sample by its place: the `index`-th of what `source` holds in `bucket`."""

    source: str
    bucket: int
    index: int  # type: ignore[assignment]  # a tuple's own method of this name is not needed


@dataclass(frozen=True)
class Batch:
    """The samples of one data step, of one bucket, sources mixed: the `indices[i]`-th of what `sources[i]` holds."""

    data_step: int
    bucket: int
    sources: tuple[str, ...]
    indices: tuple[int, ...]

    @functools.cached_property
    def samples(self) -> tuple[SampleId, ...]:
        """As `sources` and `indices`, a name each: made on demand, as thousands of objects cost more than the rest."""
        return tuple(map(SampleId, self.sources, itertools.repeat(self.bucket), self.indices))


class BucketSampler:
    """Draws one bucket a step and its samples, so that every source gets its weight over all buckets.

    Source s holds share[s, b] of its packed length in bucket b; bucket b is drawn with probability
    sum over s of weight[s] * share[s, b], and its batch mixes the sources in proportion to weight[s] * share[s, b].
    Rounding is carried along instead of drawn at random, so that a run does not drift from its weights: within a phase
    and, as a debt that the next phase pays first, from phase to phase. What later phases say changes no earlier step.

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

    def __init__(self, streams: Sequence[Stream], *, seed: int, phases: Sequence[SamplerPhase]) -> None:
        """Raises ConfigError for weights, steps or batch sizes that do not fit the streams."""
        self.seed = seed
        self._sizes = {(stream.source, stream.bucket): stream.num_samples for stream in streams}
        assert len(self._sizes) == len(streams), "a (source, bucket) is one stream"
        if not any(self._sizes.values()):
            raise DataError("the data holds no samples in any bucket; build it again from input that is not empty")
        _check_starts(phases)
        self._phases: list[_Phase] = []
        for number, phase in enumerate(phases):
            self._phases.append(_Phase(phase, number, sizes=self._sizes, seed=seed, earlier=self._phases))
        self._starts = [phase.from_step for phase in phases]

    def batch(self, data_step: int) -> Batch:
        """The batch of `data_step` (from 0): global_batch_tokens // bucket samples."""
        phase = self._phase_of(data_step)
        bucket, draws_before = phase.draw(data_step - phase.from_step)
        batch_samples = phase.batch_samples[bucket]
        sources = phase.sources[bucket]
        first = phase.drawn_in_bucket(bucket, draws_before)
        last = phase.drawn_in_bucket(bucket, draws_before + 1)
        offsets = [phase.drawn_before.get((source, bucket), 0) for source in sources]
        numbers = np.concatenate(
            [np.arange(a + c, b + c, dtype=np.uint64) for a, b, c in zip(first, last, offsets, strict=True)]
        )
        owners = np.repeat(np.arange(len(sources)), [b - a for a, b in zip(first, last, strict=True)])
        indices = self._indices(numbers, owners, [(source, bucket) for source in sources])
        key = np.frombuffer(_digest(self.seed, "order", data_step), dtype="<u8")[0]
        order = np.argsort(mixed(np.arange(batch_samples, dtype=np.uint64) + key), kind="stable")
        names = np.array(sources, dtype=object)[owners[order]]
        return Batch(data_step, bucket, tuple(names.tolist()), tuple(indices[order].tolist()))

    def samples_of_rank(
        self, batch: Batch, *, data_parallel_size: int, data_parallel_rank: int, costs: Sequence[int] | None = None
    ) -> tuple[SampleId, ...]:
        """The part of one data parallel rank; all ranks' parts are as long, and together they are the batch.

        costs: the attention work of each of the batch's samples. Given them, the samples are dealt back and forth from
        the most expensive to the cheapest, so that ranks that wait for one another have about the same to do.
        """
        count = len(batch.indices)
        if count % data_parallel_size:
            raise ConfigError(
                f"a batch of bucket {batch.bucket} ({count} samples) must be a multiple of data_parallel_size "
                f"({data_parallel_size}); raise training.global_batch_tokens to a multiple of "
                f"{batch.bucket * data_parallel_size}"
            )
        assert 0 <= data_parallel_rank < data_parallel_size, "ranks count from 0"
        if costs is None or data_parallel_size == 1:
            return batch.samples[data_parallel_rank::data_parallel_size]
        order = sorted(range(count), key=lambda place: -costs[place])  # stable: the batch's order among equals
        rounds = [order[first : first + data_parallel_size] for first in range(0, count, data_parallel_size)]
        return tuple(
            batch.samples[one[data_parallel_rank if number % 2 == 0 else data_parallel_size - 1 - data_parallel_rank]]
            for number, one in enumerate(rounds)
        )

    def shares(self, data_step: int = 0) -> dict[tuple[str, int], float]:
        """{(source, bucket): its part of the tokens drawn in the phase of `data_step`}; the sum is 1."""
        return dict(self._phase_of(data_step).shares)

    def epochs(self, data_step: int) -> dict[tuple[str, int], float]:
        """{(source, bucket): how often its samples were drawn in all steps before `data_step`}, without empty ones."""
        drawn = self._drawn(data_step)
        return {stream: drawn.get(stream, 0) / size for stream, size in self._sizes.items() if size}

    def consumed_samples(self, data_step: int) -> int:
        """Samples of all steps before `data_step`."""
        return sum(self._drawn(data_step).values())

    def consumed_tokens(self, data_step: int) -> int:
        """Tokens, padding included, of all steps before `data_step`."""
        ends = [*self._starts[1:], data_step]
        return sum(
            max(0, min(data_step, end) - phase.from_step) * phase.global_batch_tokens
            for phase, end in zip(self._phases, ends, strict=True)
        )

    def _phase_of(self, data_step: int) -> _Phase:
        assert data_step >= 0, "data steps count from 0"
        return self._phases[bisect.bisect_right(self._starts, data_step) - 1]

    def _drawn(self, data_step: int) -> dict[tuple[str, int], int]:
        """{(source, bucket): samples drawn in all steps before `data_step`}."""
        phase = self._phase_of(data_step)
        return phase.drawn(data_step - phase.from_step)

    def _indices(
        self, numbers: NDArray[np.uint64], owners: NDArray[np.int64], streams: Sequence[tuple[str, int]]
    ) -> NDArray[np.uint64]:
        """The sample index [n] of draw `numbers` [n] of the streams `owners` [n] (indices into `streams`)."""
        sizes = np.array([self._sizes[stream] for stream in streams], dtype=np.uint64)[owners]
        epochs, positions = np.divmod(numbers, sizes)
        # Streams come one after another, their draws in ascending order: a key serves a run of equal epochs.
        is_first = np.ones(len(numbers), dtype=bool)
        is_first[1:] = (owners[1:] != owners[:-1]) | (epochs[1:] != epochs[:-1])
        firsts = zip(owners[is_first].tolist(), epochs[is_first].tolist(), strict=True)
        digests = [_digest(self.seed, "epoch", *streams[owner], epoch) for owner, epoch in firsts]
        keys = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, PERMUTATION_ROUNDS)[np.cumsum(is_first) - 1]
        return permute(positions, sizes, keys)


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


class _Phase:
    """One phase's arithmetic: what its first n steps draw, and what all phases before it drew."""

    def __init__(
        self,
        phase: SamplerPhase,
        number: int,
        *,
        sizes: Mapping[tuple[str, int], int],
        seed: int,
        earlier: Sequence[_Phase],
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
            hashes = np.frombuffer(_digest(*self._key, block, attempt), dtype="<u8")
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


def _digest(*parts: int | str) -> bytes:
    """64 bytes that depend on every part; JSON keeps the borders between parts."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8 * PERMUTATION_ROUNDS).digest()


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


def _check_starts(phases: Sequence[SamplerPhase]) -> None:
    starts = [phase.from_step for phase in phases]
    assert starts and starts[0] == 0, "the first phase begins with the run"
    for earlier, later in itertools.pairwise(starts):
        if later <= earlier:
            raise ConfigError(
                f"training.phases: from_iter ({later}) must be above the one before it ({earlier}); sort the phases"
            )


def _check_batch_tokens(global_batch_tokens: int, buckets: Sequence[int], *, key: str) -> None:
    unit = math.lcm(*buckets)
    if global_batch_tokens % unit:
        below = global_batch_tokens // unit * unit
        nearest = f"{below}, {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"{key} ({global_batch_tokens}) must be a multiple of every bucket "
            f"({', '.join(map(str, buckets))}: of {unit}); nearest: {nearest}"
        )
