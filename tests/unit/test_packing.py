"""Packing: nothing lost or twice, only the longest cut, best fit as a naive search finds it, both engines alike."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import megatron_xy
from megatron_xy.data.building.pack_shards import (
    MOST_SHARDS,
    SHARD_TOKENS,
    PackTask,
    Range,
    Window,
    group_windows,
    pack_shard,
    task_tokens_for,
    windows_of,
)
from megatron_xy.data.indexed import IndexedReader
from megatron_xy.data.origins import TracedWriter, document_rows
from megatron_xy.data.packing.best_fit import best_fit, start_engine
from megatron_xy.data.packing.pack import WINDOW_DOCUMENTS, check_buckets, check_policy, pack
from megatron_xy.errors import ConfigError, UsageError
from tools.bench_packing import judge

ENGINES = ("auto", "python")
buckets_lists = st.lists(st.integers(1, 90), min_size=1, max_size=5, unique=True).map(sorted)
documents = st.lists(st.integers(0, 300), max_size=60)
policies = st.sampled_from([("best_fit", "split"), ("best_fit", "drop"), ("best_fit", "truncate")])


def samples_of(plan):
    """[(bucket size, [(document, start, length)])] of a plan."""
    pieces = list(zip(plan.piece_document.tolist(), plan.piece_start.tolist(), plan.piece_length.tolist(), strict=True))
    return [
        (plan.buckets[plan.sample_bucket[s]], pieces[plan.sample_ptr[s] : plan.sample_ptr[s + 1]])
        for s in range(plan.num_samples)
    ]


def times_each_token_stands(plan, lengths):
    """Of every document how often each of its tokens stands in the samples, which are checked to be within bounds."""
    stands = [np.zeros(length, dtype=int) for length in lengths]
    for size, pieces in samples_of(plan):
        assert 0 < sum(length for _, _, length in pieces) <= size
        for document, start, length in pieces:
            assert length > 0 and start + length <= lengths[document]
            stands[document][start : start + length] += 1
    return stands


def check_counts(plan, lengths):
    """The plan's own figures against its samples; returns how often each token stands."""
    stands = times_each_token_stands(plan, lengths)
    num_pieces = np.bincount(plan.piece_document, minlength=len(lengths))
    packed = [counts.sum() for counts in stands]
    truncated = [
        bool(times > 1 or 0 < there < length) for times, there, length in zip(num_pieces, packed, lengths, strict=True)
    ]
    assert plan.num_documents == sum(there > 0 for there in packed)
    assert plan.dropped_documents == sum(length > 0 for length in lengths) - plan.num_documents
    assert plan.truncated_documents == sum(truncated)
    assert plan.num_tokens == sum(packed)
    assert plan.tokens_lost == sum(lengths) - sum(packed)
    capacity = sum(size for size, _ in samples_of(plan))
    ratios = judge([plan])
    assert ratios["padding_ratio"] == pytest.approx(1 - sum(packed) / capacity if capacity else 0)
    assert ratios["truncation_ratio"] == pytest.approx(sum(truncated) / plan.num_documents if plan.num_documents else 0)
    assert ratios["concatenation_ratio"] == pytest.approx(plan.num_documents / plan.num_samples if capacity else 0)
    return stands


def naive_best_fit(lengths, buckets):
    """The samples that a search through all open ones gives, in the order of a plan."""
    largest = buckets[-1]
    full = [(length // largest if length > largest else 0) for length in lengths]
    rests = [length - times * largest for length, times in zip(lengths, full, strict=True)]
    room, moved, samples = [], [], []
    for step, document in enumerate(sorted(range(len(lengths)), key=lambda document: -rests[document])):
        rest = rests[document]
        if rest == 0:
            break
        fitting = [sample for sample in range(len(room)) if room[sample] >= rest]
        if fitting:  # the least room; of several, the one that came to this room last
            chosen = min(fitting, key=lambda sample: (room[sample], -moved[sample]))
        else:
            chosen = len(room)
            size = next(bucket for bucket in buckets if bucket >= rest)
            room.append(size)
            moved.append(step)
            samples.append((size, []))
        room[chosen] -= rest
        moved[chosen] = step
        samples[chosen][1].append((document, full[document] * largest, rest))
    return samples + [
        (largest, [(document, number * largest, largest)])
        for document in range(len(lengths))
        for number in range(full[document])
    ]


@settings(deadline=None, derandomize=True, max_examples=120)
@given(lengths=documents, buckets=buckets_lists)
@example(lengths=[0, 1, 64, 65, 63, 128, 129], buckets=[1, 64])
@example(lengths=[0, 0], buckets=[5])
@example(lengths=[], buckets=[5])
@example(lengths=[33, 32, 31, 1025, 1024, 1023, 1, 1, 0], buckets=[32, 1024])
def test_every_token_of_every_document_stands_exactly_once(lengths, buckets):
    plan = pack(np.array(lengths, dtype=np.int32), buckets=buckets)
    assert all((counts == 1).all() for counts in check_counts(plan, lengths))
    num_pieces = np.bincount(plan.piece_document, minlength=len(lengths))
    assert (num_pieces > 1).tolist() == [length > buckets[-1] for length in lengths]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=documents, buckets=buckets_lists)
@example(lengths=[5, 6, 0, 10, 11], buckets=[5])
def test_dropped_and_truncated_documents_are_counted_with_what_is_lost(lengths, buckets):
    dropped = pack(np.array(lengths, dtype=np.int64), buckets=buckets, overflow="drop")
    for length, counts in zip(lengths, check_counts(dropped, lengths), strict=True):
        assert (counts == (length <= buckets[-1])).all()
    truncated = pack(np.array(lengths, dtype=np.int64), buckets=buckets, overflow="truncate")
    for counts in check_counts(truncated, lengths):
        assert (counts[: buckets[-1]] == 1).all() and not counts[buckets[-1] :].any()
    assert np.bincount(truncated.piece_document, minlength=1).max() <= 1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=documents, size=st.integers(1, 90))
@example(lengths=[0, 4, 0, 8, 1], size=4)
@example(lengths=[], size=4)
def test_concatenated_documents_lie_end_to_end_in_full_samples(lengths, size):
    plan = pack(np.array(lengths, dtype=np.int64), buckets=[size], packing="concatenate")
    assert all((counts == 1).all() for counts in check_counts(plan, lengths))
    samples = [pieces for _, pieces in samples_of(plan)]
    assert all(sum(length for _, _, length in pieces) == size for pieces in samples[:-1])
    # read in order, each document stands in one place from its first token to its last
    reached, order = {}, []
    for document, start, length in (piece for pieces in samples for piece in pieces):
        order += [document] if not order or order[-1] != document else []
        assert reached.get(document, 0) == start
        reached[document] = start + length
    assert sorted(order) == [document for document, length in enumerate(lengths) if length]


def test_the_order_of_concatenation_is_shuffled_and_stays():
    lengths = np.full(1000, 3)
    order = pack(lengths, buckets=[3], packing="concatenate").piece_document
    assert (order != np.arange(1000)).mean() > 0.9
    # of the raw stream of Philox, which no numpy may change: data built anew must come out the same
    assert order[:8].tolist() == [998, 162, 670, 664, 185, 322, 431, 318]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(lengths=documents, buckets=buckets_lists)
@example(lengths=[7, 7, 7, 7, 3, 3, 3, 2, 2, 1], buckets=[10, 11])
def test_same_samples_as_a_naive_best_fit(lengths, buckets):
    assert samples_of(pack(np.array(lengths, dtype=np.int64), buckets=buckets)) == naive_best_fit(lengths, buckets)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 1 << 32),
    num_documents=st.integers(0, 3000),
    sigma=st.sampled_from([0.0, 0.3, 1.3, 3.0]),
    buckets=st.lists(st.integers(1, 40_000), min_size=1, max_size=6, unique=True).map(sorted),
    policy=policies,
)
def test_both_engines_give_the_same_plan(seed, num_documents, sigma, buckets, policy):
    pytest.importorskip("numba", reason="the extra `fast` is not installed: there is one engine")
    drawn = np.random.default_rng(seed).lognormal(np.log(500), sigma, num_documents)
    lengths = np.minimum(drawn, 4 * buckets[-1]).astype(np.int32)
    packing, overflow = policy
    compiled, plain = (
        pack(lengths, buckets=buckets, packing=packing, overflow=overflow, engine=engine)
        for engine in ("numba", "python")
    )
    assert vars(compiled).keys() == vars(plain).keys()
    for name, value in vars(compiled).items():
        other = getattr(plain, name)
        assert np.array_equal(value, other) and np.asarray(value).dtype == np.asarray(other).dtype, name


@pytest.mark.parametrize("engine", ENGINES)
def test_buckets_beyond_two_to_the_sixteen(engine):  # the sort takes two passes, the bitmap another level
    lengths = np.array([200_000, 131_072, 70_000, 61_072, 1, 65_536, 40_000, 500], dtype=np.int64)
    plan = pack(lengths, buckets=[65_536, 131_072], engine=engine)
    assert samples_of(plan) == naive_best_fit(lengths.tolist(), [65_536, 131_072])


def test_more_samples_than_two_to_the_sixteen():  # the second sort takes two passes as well
    lengths = np.tile(np.array([3, 2, 1], dtype=np.int32), 70_000)
    plan = pack(lengths, buckets=[3, 4])
    assert plan.num_samples == 140_000 and plan.num_tokens == plan.packed_length
    assert np.array_equal(np.bincount(plan.piece_document, weights=plan.piece_length), lengths)
    assert (np.add.reduceat(plan.piece_length, plan.sample_ptr[:-1]) == 3).all()


@pytest.mark.parametrize(
    ("buckets", "most_documents"), [([1024, 2048, 4096, 8192, 16384], 2.2), ([2048, 4096, 8192, 16384], 3.02)]
)
def test_ratios_on_lengths_like_a_real_corpus(buckets, most_documents):
    """One window of the paper's corpus, fitted (mixture of log-normals); the paper's own best: 0.12%, 0.28%, 2.81."""
    random = np.random.default_rng(0)
    long = random.random(WINDOW_DOCUMENTS) < 0.1117
    mixed = [
        random.lognormal(mean, sigma, WINDOW_DOCUMENTS) for mean, sigma in ((7.18232, 1.28874), (6.34324, 0.76967))
    ]
    lengths = np.clip(np.where(long, *mixed), 1, 300_000).astype(np.int32)
    plan = pack(lengths, buckets=buckets)
    ratios = judge([plan])
    assert ratios["padding_ratio"] <= 0.0005
    assert ratios["truncation_ratio"] == (lengths > 16384).mean()
    assert ratios["concatenation_ratio"] <= most_documents
    assert plan.tokens_lost == 0 and plan.num_tokens == lengths.sum()


@pytest.mark.parametrize("buckets", [[], [0], [-1, 4], [4, 4], [8, 4], [1 << 21]])
def test_bad_buckets_are_refused(buckets):
    with pytest.raises(UsageError, match="ascending"):
        check_buckets(buckets)


@pytest.mark.parametrize(
    ("packing", "overflow", "buckets", "message"),
    [
        ("first_fit", "split", [8], "packing .first_fit. must be one of best_fit, concatenate"),
        ("best_fit", "cut", [8], "overflow .cut. must be one of split, drop, truncate"),
        ("concatenate", "split", [8, 16], "one size, not of 8,16"),
        ("concatenate", "drop", [8], "overflow .drop. can only be split"),
    ],
)
def test_bad_policies_are_refused(packing, overflow, buckets, message):
    with pytest.raises(ConfigError, match=message):
        check_policy(packing, overflow, buckets=buckets)


@pytest.mark.parametrize(
    ("packing", "overflow", "kept"),
    [
        ("best_fit", "split", [3, 8, 20, 1, 9, 16]),
        ("best_fit", "drop", [3, 8, 1]),
        ("best_fit", "truncate", [3, 8, 8, 1, 8, 8]),
        ("concatenate", "split", [3, 8, 20, 1, 9, 16]),
    ],
)
def test_shards_hold_what_the_policy_keeps(tmp_path, packing, overflow, kept):
    lengths = [3, 8, 20, 1, 9, 16]
    texts = [np.arange(length) + 100 * number for number, length in enumerate(lengths)]
    with TracedWriter(tmp_path / "tokens", dtype=np.dtype(np.uint16)) as writer:
        writer.add_documents(np.concatenate(texts).astype(np.uint16), lengths=np.array(lengths))
        writer.add_rows(document_rows([0] * len(lengths), range(1, len(lengths) + 1)))
    groups = group_windows(windows_of([tmp_path / "tokens"], window_documents=4), task_tokens=10)
    tasks = [PackTask(tmp_path, "wiki", index, (8,), group, packing, overflow) for index, group in enumerate(groups)]
    advanced = []
    receipts = [pack_shard(task, advanced.append) for task in tasks]
    again = [pack_shard(task, advanced.append) for task in tasks]
    assert again == receipts and sum(advanced) == 2 * len(lengths)
    stored = [IndexedReader(tmp_path / shard.name).tokens for receipt in receipts for shard in receipt.shards.values()]
    expected = [text[:8] if overflow == "truncate" else text for text in texts if overflow != "drop" or len(text) <= 8]
    assert sorted(np.concatenate(stored)) == sorted(np.concatenate(expected))
    assert sum(receipt.tokens for receipt in receipts) == sum(kept)
    assert sum(receipt.tokens_lost for receipt in receipts) == sum(lengths) - sum(kept)
    assert sum(receipt.documents for receipt in receipts) == len(kept)
    assert sum(receipt.dropped_documents for receipt in receipts) == len(lengths) - len(kept)


def test_a_large_corpus_gets_larger_shards_and_not_more_of_them_than_a_run_keeps_open(tmp_path):
    sizes = {f"source{number}": 10**number for number in range(13)}  # tokens, in windows of 10 M
    task_tokens = task_tokens_for(sum(sizes.values()))
    most = 10**7
    tasks = {
        name: group_windows(
            [Window((Range(tmp_path, 0, 1),), tokens=min(most, size))] * math.ceil(size / most),
            task_tokens=task_tokens,
        )
        for name, size in sizes.items()
    }
    assert sum(map(len, tasks.values())) <= MOST_SHARDS + len(sizes)
    assert [len(of_source) for of_source in tasks.values()][:10] == [1] * 10
    assert sum(map(len, tasks["source12"])) == 10**5
    assert task_tokens_for(10**9) == SHARD_TOKENS, "a small one has shards of one size"


def run_python(code, **environment):
    """What `code` prints in a Python of its own, which knows the package that this test imports."""
    home = {"PYTHONPATH": str(Path(megatron_xy.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | home | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_numba_python_packs_and_says_so():
    code = """
import sys
sys.modules["numba"] = None  # as Python marks what is not there
import numpy
from megatron_xy.data.packing.best_fit import start_engine
from megatron_xy.data.packing.pack import pack
from megatron_xy.errors import ConfigError
print(pack(numpy.array([5, 3, 2, 9]), buckets=[4, 8]).piece_document.tolist())
print(start_engine())
try:
    start_engine("numba")
except ConfigError as error:
    print(error)
"""
    plan, automatic, named = run_python(code).splitlines()
    assert plan == str(pack(np.array([5, 3, 2, 9]), buckets=[4, 8]).piece_document.tolist())
    assert automatic.startswith("python ") and "megatron-xy[fast]" in automatic
    assert "engine (numba)" in named and "megatron-xy[fast]" in named


def test_importing_packing_does_not_import_numba():
    print_it = "import sys, megatron_xy.data.packing.pack; print('numba' in sys.modules)"
    assert run_python(print_it) == "False\n"


def test_an_unknown_length_is_our_mistake():
    with pytest.raises(AssertionError, match="a count for every length"):
        best_fit(np.zeros(5, dtype=np.int64), sizes=[8])


@pytest.mark.slow
def test_the_compiled_core_is_kept_where_it_can_be_written_and_does_without(tmp_path):
    pytest.importorskip("numba", reason="the extra `fast` is not installed: there is nothing to keep")
    package = tmp_path / "installed" / "megatron_xy"
    shutil.copytree(
        Path(megatron_xy.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "model", "hf")
    )
    (package / "data" / "packing" / "__pycache__").write_text("a file, where numba would like a folder")
    start = "from megatron_xy.data.packing.best_fit import start_engine as s; print(s('numba'))"
    where = {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": ""}
    nowhere = where | {"XDG_CACHE_HOME": "/dev/null", "HOME": "/dev/null"}
    home = where | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}

    assert "compiled anew in every process" in run_python(start, **nowhere)
    assert f"kept in {tmp_path / 'cache'}" in run_python(start, **home)
    assert "compiled" not in run_python(start, **home)
    for index in (tmp_path / "cache").rglob("*.nbi"):
        index.write_bytes(index.read_bytes()[:50])
    assert "compiled anew in every process" in run_python(start, **home)
    named = where | {"NUMBA_CACHE_DIR": str(tmp_path / "named")}
    assert f"kept in {tmp_path / 'named'}" in run_python(start, **named)


def test_the_engine_is_started_once():
    assert start_engine("auto") is start_engine("auto")
