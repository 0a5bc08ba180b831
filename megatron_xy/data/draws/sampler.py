"""Which bucket and which samples a data step takes: from sample counts, weights and a seed, in closed form.

    data_step -> phase -> block of 8 steps -> bucket -> how many samples of each source -> their indices -> their order

Everything is a pure function of (seed, phases, data_step). Nothing is replayed at a resume, no index lies in memory or
on disk, and nothing depends on train_iters, on the data parallel size or on the micro-batches.

A *stream* is what one source holds in one bucket. Its samples are drawn in an order that is shuffled anew in every
epoch; each sample comes once per epoch, through every change of weights and batch size.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.draws.permutation import PERMUTATION_ROUNDS, digest, mixed, permute
from megatron_xy.data.draws.phase_draws import PhaseDraws, SamplerPhase, total_tokens
from megatron_xy.errors import ConfigError, DataError


@dataclass(frozen=True)
class Stream:
    """What one source holds in one bucket."""

    source: str
    bucket: int  # tokens a sample, padding included
    num_samples: int


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
    """

    def __init__(self, streams: Sequence[Stream], *, seed: int, phases: Sequence[SamplerPhase]) -> None:
        """Raises ConfigError for weights, steps or batch sizes that do not fit the streams."""
        self.seed = seed
        self._sizes = {(stream.source, stream.bucket): stream.num_samples for stream in streams}
        assert len(self._sizes) == len(streams), "a (source, bucket) is one stream"
        if not any(self._sizes.values()):
            raise DataError("the data holds no samples in any bucket; build it again from input that is not empty")
        _check_starts(phases)
        self._phases: list[PhaseDraws] = []
        for number, phase in enumerate(phases):
            self._phases.append(PhaseDraws(phase, number, sizes=self._sizes, seed=seed, earlier=self._phases))
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
        key = np.frombuffer(digest(self.seed, "order", data_step), dtype="<u8")[0]
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

    def shares(self) -> dict[tuple[str, int], float]:
        """{(source, bucket): its part of the tokens drawn in the first phase}; the sum is 1."""
        return dict(self._phases[0].shares)

    def epochs(self, data_step: int) -> dict[tuple[str, int], float]:
        """{(source, bucket): how often its samples were drawn in all steps before `data_step`}, without empty ones."""
        drawn = self._drawn(data_step)
        return {stream: drawn.get(stream, 0) / size for stream, size in self._sizes.items() if size}

    def consumed_samples(self, data_step: int) -> int:
        """Samples of all steps before `data_step`."""
        return sum(self._drawn(data_step).values())

    def consumed_tokens(self, data_step: int) -> int:
        """Tokens, padding included, of all steps before `data_step`."""
        return total_tokens(self._phases, num_steps=data_step)

    def _phase_of(self, data_step: int) -> PhaseDraws:
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
        digests = [digest(self.seed, "epoch", *streams[owner], epoch) for owner, epoch in firsts]
        keys = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, PERMUTATION_ROUNDS)[np.cumsum(is_first) - 1]
        return permute(positions, sizes, keys)


def _check_starts(phases: Sequence[SamplerPhase]) -> None:
    starts = [phase.from_step for phase in phases]
    assert starts and starts[0] == 0, "the first phase begins with the run"
    for earlier, later in itertools.pairwise(starts):
        if later <= earlier:
            raise ConfigError(
                f"training.phases: from_iter ({later}) must be above the one before it ({earlier}); sort the phases"
            )
