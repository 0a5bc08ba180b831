"""The sampler against what it promises: balance, every sample once an epoch, and random access equal to any history."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.draws.apportionment import Apportionment
from megatron_xy.data.draws.permutation import PERMUTATION_ROUNDS, permute
from megatron_xy.data.draws.phase_draws import SamplerPhase
from megatron_xy.data.draws.sampler import BucketSampler, Stream
from megatron_xy.errors import ConfigError, DataError

STREAMS = [
    Stream("code", 256, 700),
    Stream("code", 512, 300),
    Stream("code", 1024, 90),
    Stream("code", 2048, 40),
    Stream("prose", 256, 150),
    Stream("prose", 512, 0),
    Stream("prose", 1024, 200),
    Stream("prose", 2048, 130),
    Stream("letters", 256, 33),
]
WEIGHTS = {"code": 3.0, "prose": 1.0, "letters": 0.2}
BATCH_TOKENS = 8192
SIZES = {(stream.source, stream.bucket): stream.num_samples for stream in STREAMS if stream.num_samples}


def make_sampler(streams=STREAMS, *, seed=7, weights=WEIGHTS, global_batch_tokens=BATCH_TOKENS):
    return BucketSampler(streams, seed=seed, phases=[SamplerPhase(0, weights, global_batch_tokens)])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40),
    start=st.one_of(st.just(0), st.integers(0, 10**12)),
)
def test_each_further_seat_goes_to_exactly_one_party_close_to_its_due(weights, start):
    parties = Apportionment(weights)
    total = sum(weights)
    before = parties.counts(start)
    assert sum(before) == start
    for seats in range(start + 1, start + 200):
        counts = parties.counts(seats)
        gains = [after - earlier for after, earlier in zip(counts, before, strict=True)]
        assert sorted(gains) == [0] * (len(weights) - 1) + [1]
        # 1e-3: what a float's share of 10**12 seats itself is uncertain by
        assert all(abs(count - seats * w / total) < 2 + 1e-3 for count, w in zip(counts, weights, strict=True))
        before = counts


def test_many_equal_small_parties_do_not_starve_a_large_one():
    parties = Apportionment([0.5, *[0.005] * 100])
    for seats in range(1000):
        assert abs(parties.counts(seats)[0] - seats / 2) <= 0.5


@pytest.mark.parametrize(
    ("weights", "batch_tokens"),
    [
        (WEIGHTS, 8192),
        (WEIGHTS, 2048),
        (None, 65536),
        ({"code": 1, "prose": 1, "letters": 1}, 2048),
        ({"code": 0.001, "prose": 0.5, "letters": 99}, 4096),
        ({"code": 1, "prose": 9, "letters": 0}, 4096),
    ],
)
def test_no_source_is_off_its_weight_by_more_than_three_global_batches_over_every_prefix(weights, batch_tokens):
    sampler = make_sampler(weights=weights, global_batch_tokens=batch_tokens)
    packed = {source: sum(s.bucket * s.num_samples for s in STREAMS if s.source == source) for source in WEIGHTS}
    due = {source: (weights or packed)[source] / sum((weights or packed).values()) for source in WEIGHTS}
    drawn = Counter()
    for data_step in range(1, 1001):
        batch = sampler.batch(data_step - 1)
        assert len(batch.samples) * batch.bucket == batch_tokens
        assert {sample.bucket for sample in batch.samples} == {batch.bucket}
        drawn.update(sample.source for sample in batch.samples for _ in range(batch.bucket // 256))
        for source, share in due.items():
            assert abs(drawn[source] * 256 / batch_tokens - data_step * share) <= 3


def test_drift_stays_within_three_global_batches_far_into_a_run():
    sampler = make_sampler(global_batch_tokens=2048)
    due = {source: sum(v for (s, _), v in sampler.shares().items() if s == source) for source in WEIGHTS}
    assert due == pytest.approx({source: weight / 4.2 for source, weight in WEIGHTS.items()})
    for data_step in [*range(3000, 3100), *range(10**9, 10**9 + 100)]:
        epochs = sampler.epochs(data_step)
        for source in WEIGHTS:
            drawn = sum(times * SIZES[s, bucket] * bucket for (s, bucket), times in epochs.items() if s == source)
            assert abs(drawn / 2048 - data_step * due[source]) <= 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_set_of_buckets_gets_further_than_two_steps_from_its_due(seed):
    due = {256: 0.5, 512: 0.2, 1024: 0.2, 2048: 0.1}
    streams = [Stream(f"only in {bucket}", bucket, 50) for bucket in due]
    weights = {f"only in {bucket}": weight for bucket, weight in due.items()}
    sampler = make_sampler(streams, seed=seed, weights=weights, global_batch_tokens=2048)
    steps_of = Counter()
    for data_step in range(1, 801):
        steps_of[sampler.batch(data_step - 1).bucket] += 1
        ahead = sum(max(0, steps_of[bucket] - data_step * weight) for bucket, weight in due.items())
        assert ahead <= 2 + 1e-9


def test_every_sample_comes_once_in_each_epoch_of_its_stream():
    sampler = make_sampler()
    draws = {}
    for data_step in range(500):
        for sample in sampler.batch(data_step).samples:
            draws.setdefault((sample.source, sample.bucket), Counter())[sample.index] += 1
    epochs = sampler.epochs(500)
    assert set(draws) == set(SIZES) == set(epochs)
    assert max(epochs.values()) > 5 and min(epochs.values()) < 4, "the run must pass through full and open epochs"
    for stream, counts in draws.items():
        full = int(epochs[stream])
        assert sum(counts.values()) == round(epochs[stream] * SIZES[stream])
        assert set(counts) <= set(range(SIZES[stream]))
        assert {counts[index] for index in range(SIZES[stream])} <= {full, full + 1}


def test_a_step_does_not_depend_on_the_steps_asked_for_before():
    in_order = [make_sampler().batch(step) for step in range(100)]
    sampler = make_sampler()
    for step in np.random.default_rng(0).permutation(100):
        assert sampler.batch(int(step)) == in_order[step]


def test_the_order_in_which_streams_are_given_does_not_matter():
    assert make_sampler(STREAMS[::-1]).batch(17) == make_sampler().batch(17)


def test_the_order_within_a_stream_depends_on_neither_weights_nor_batch_size():
    def first_of(sampler):
        order, step = [], 0
        while len(order) < 40:
            samples = sampler.batch(step).samples
            order += sorted(s.index for s in samples if (s.source, s.bucket) == ("code", 512))
            step += 1
        return order

    ordered = first_of(make_sampler(global_batch_tokens=2048, weights={"code": 1, "prose": 0, "letters": 0}))
    other = first_of(make_sampler(global_batch_tokens=20480, weights={"code": 1, "prose": 0, "letters": 0}))
    assert sorted(ordered[:40]) == other[:40], "40 samples a batch in one, 4 in the other: the same first 40"


def test_a_billion_samples_far_into_the_run():
    streams = [Stream(source, bucket, 10**9) for source in ("a", "b") for bucket in (2048, 4096, 8192, 16384)]
    phases = [SamplerPhase(0, {"a": 0.9, "b": 0.1}, 2**20)]
    batch = BucketSampler(streams, seed=1, phases=phases).batch(10**9)
    assert batch == BucketSampler(streams, seed=1, phases=phases).batch(10**9)
    assert len(set(batch.samples)) == len(batch.samples) == 2**20 // batch.bucket
    assert all(0 <= sample.index < 10**9 for sample in batch.samples)


def test_a_stream_smaller_than_its_part_of_a_batch_is_repeated_evenly():
    sampler = make_sampler([Stream("tiny", 256, 3)], weights=None)
    counts = Counter(sample.index for sample in sampler.batch(5).samples)
    assert sum(counts.values()) == 32 and max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_ranks_of_any_data_parallel_size_share_the_same_batch(data_parallel_size):
    sampler = make_sampler()
    for data_step in range(30):
        batch = sampler.batch(data_step)
        parts = [
            sampler.samples_of_rank(batch, data_parallel_size=data_parallel_size, data_parallel_rank=rank)
            for rank in range(data_parallel_size)
        ]
        assert len({len(part) for part in parts}) == 1
        assert sorted(sample for part in parts for sample in part) == sorted(batch.samples)


def test_samples_are_dealt_back_and_forth_from_the_most_expensive_on():
    sampler = make_sampler([Stream("a", 256, 100)], weights=None, global_batch_tokens=2048)
    batch, costs = sampler.batch(0), [3, 8, 1, 6, 7, 2, 5, 4]
    cost_of = dict(zip(batch.samples, costs, strict=True))
    parts = [
        sampler.samples_of_rank(batch, data_parallel_size=2, data_parallel_rank=rank, costs=costs) for rank in range(2)
    ]
    assert [[cost_of[sample] for sample in part] for part in parts] == [[8, 5, 4, 1], [7, 6, 3, 2]]


def test_a_batch_mixes_its_sources():
    changes = 0
    for data_step in range(100):
        sources = [sample.source for sample in make_sampler(global_batch_tokens=65536).batch(data_step).samples]
        changes += sum(a != b for a, b in itertools.pairwise(sources))
    assert changes > 1000, "sources laid one after another would change at most twice a batch"


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_size_that_fits():
    sampler = make_sampler([Stream("code", 2048, 5)], weights=None)
    with pytest.raises(ConfigError, match=r"4 samples.*data_parallel_size \(3\).*multiple of 6144"):
        sampler.samples_of_rank(sampler.batch(0), data_parallel_size=3, data_parallel_rank=0)


def test_another_seed_gives_another_order_of_buckets_and_of_samples():
    one, other = make_sampler(seed=1), make_sampler(seed=2)
    assert [one.batch(s).bucket for s in range(40)] != [other.batch(s).bucket for s in range(40)]
    single = [make_sampler([Stream("a", 256, 1000)], seed=seed, weights=None).batch(0).samples for seed in (1, 2)]
    assert set(single[0]) != set(single[1])


def test_each_block_of_eight_steps_holds_the_buckets_that_the_weights_ask_for():
    sampler = make_sampler([Stream("a", 256, 8), Stream("a", 512, 2), Stream("a", 1024, 1)], weights=None)
    for block in range(20):
        buckets = Counter(sampler.batch(step).bucket for step in range(8 * block, 8 * block + 8))
        assert buckets == {256: 4, 512: 2, 1024: 2}
    orders = {tuple(sampler.batch(8 * block + place).bucket for place in range(8)) for block in range(20)}
    assert len(orders) > 10, "blocks are shuffled"


def test_phases_change_weights_and_batch_size_and_go_on_in_every_stream():
    phases = [
        SamplerPhase(0, {"code": 9, "prose": 1, "letters": 0}, 2048),
        SamplerPhase(45, {"code": 4, "prose": 1, "letters": 1}, 8192),
        SamplerPhase(70, {"code": 0, "prose": 1, "letters": 0}, 4096),
    ]
    sampler = BucketSampler(STREAMS, seed=3, phases=phases)
    assert BucketSampler(STREAMS, seed=3, phases=phases[:1]).batch(44) == sampler.batch(44)
    drawn = Counter()
    for data_step in range(120):
        expected = {stream: count * SIZES[stream] for stream, count in sampler.epochs(data_step).items()}
        counted = Counter((s.source, s.bucket) for s in drawn.elements())
        assert {stream: round(count) for stream, count in expected.items() if count} == counted
        assert sampler.consumed_samples(data_step) == drawn.total()
        drawn.update(sampler.batch(data_step).samples)
    assert sampler.consumed_tokens(120) == 45 * 2048 + 25 * 8192 + 50 * 4096
    assert sampler.consumed_tokens(50) == 45 * 2048 + 5 * 8192
    for (source, bucket), epochs in sampler.epochs(120).items():
        size = SIZES[source, bucket]
        counts = [count for sample, count in drawn.items() if (sample.source, sample.bucket) == (source, bucket)]
        counts += [0] * (size - len(counts))
        assert set(counts) <= {int(epochs), int(epochs) + 1}, "no repeat before the epoch is through"
    assert {sample.source for sample in sampler.batch(100).samples} == {"prose"}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_bijection(size):
    keys = np.random.default_rng(size).integers(0, 2**63, PERMUTATION_ROUNDS, dtype=np.uint64)
    positions = np.arange(size, dtype=np.uint64)
    shuffled = permute(positions, np.full_like(positions, size), np.tile(keys, (size, 1)))
    assert np.array_equal(np.sort(shuffled), positions)


def test_permute_gives_every_order_equally_often():
    trials, size = 24000, 4
    keys = np.random.default_rng(0).integers(0, 2**63, (trials, PERMUTATION_ROUNDS), dtype=np.uint64)
    positions = np.tile(np.arange(size, dtype=np.uint64), trials)
    shuffled = permute(positions, np.full_like(positions, size), np.repeat(keys, size, axis=0)).reshape(trials, size)
    _, counts = np.unique(shuffled, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 60, "chi-square with 23 degrees of freedom: 1 in 40,000"


def test_permute_keeps_indices_of_huge_streams_in_range_and_apart():
    positions = np.arange(10**15, 10**15 + 1000, dtype=np.uint64)
    sizes = np.full_like(positions, 10**15 + 5000)
    keys = np.tile(np.arange(PERMUTATION_ROUNDS, dtype=np.uint64), (1000, 1))
    shuffled = permute(positions, sizes, keys)
    assert len(np.unique(shuffled)) == 1000 and shuffled.max() < sizes[0] and shuffled.std() > 10**14


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"code": 1, "prose": 1, "leters": 1}, "names leters, .* did you mean letters.* known: code, letters, prose"),
        ({"code": 1, "prose": 1, "xyz": 1}, "names xyz, which the data does not have; known: code"),
        ({"code": 1}, "lacks letters, prose; .* give it 0 to leave it out"),
        ({"code": 1, "prose": -1, "letters": 1}, r"prose \(-1\) must be"),
        ({"code": 1, "prose": float("nan"), "letters": 1}, r"prose \(nan\) must be"),
        ({"code": 0, "prose": 0, "letters": 0}, "all are 0"),
    ],
)
def test_weights_that_do_not_fit_the_data_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        make_sampler(weights=weights)


def test_a_weighted_source_without_samples_is_refused_and_without_weight_is_not():
    streams = [Stream("full", 256, 10), Stream("empty", 256, 0)]
    with pytest.raises(ConfigError, match=r"empty .* has no samples"):
        make_sampler(streams, weights={"full": 1, "empty": 1})
    assert make_sampler(streams, weights={"full": 1, "empty": 0}).shares() == {("full", 256): 1.0}
    assert make_sampler(streams, weights=None).shares() == {("full", 256): 1.0}
    almost_none = make_sampler(
        [Stream("a", 256, 9), Stream("b", 256, 1), Stream("b", 512, 9)], weights={"a": 1, "b": 5e-324}
    )
    assert almost_none.shares() == {("a", 256): 1.0, ("b", 512): 5e-324}, "a part that is no number above 0 is left out"


def test_data_without_samples_is_refused():
    with pytest.raises(DataError, match="no samples"):
        make_sampler([Stream("empty", 256, 0)], weights=None)


def test_a_batch_size_that_a_bucket_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"\(5000\) must be a multiple of every bucket .* nearest: 4096, 6144"):
        make_sampler(global_batch_tokens=5000)
    with pytest.raises(ConfigError, match=r"nearest: 2048$"):
        make_sampler(global_batch_tokens=1024)


def test_phases_out_of_order_are_refused():
    with pytest.raises(ConfigError, match=r"from_iter \(5\) must be above"):
        BucketSampler(STREAMS, seed=0, phases=[SamplerPhase(start, None, 2048) for start in (0, 9, 5)])
