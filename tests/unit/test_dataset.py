"""Packed folders on disk, read back sample by sample, laid into micro-batches, and prepared ahead of the steps."""

import hashlib
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data import dataset as data_set
from megatron_xy.data.dataset import PackedDataset, Sample, collate, samples_of_rank
from megatron_xy.data.draws.phase_draws import SamplerPhase
from megatron_xy.data.draws.sampler import BucketSampler, SampleId, Stream
from megatron_xy.data.indexed import IndexedWriter
from megatron_xy.data.manifest import (
    BucketEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    Statistics,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from megatron_xy.data.prefetcher import Prefetcher
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import file_sha256
from tests.building import add_document

VOCAB_SIZE = 1000


def write_folder(folder, contents, *, buckets=(8, 16), tokenizer="a", vocab_size=VOCAB_SIZE):
    """contents: {source: {bucket: [shard: [sample: [piece: [token]]]]}}"""
    sources = {}
    for source, of_bucket in contents.items():
        entries = {}
        for bucket, shards in of_bucket.items():
            written = [
                write_shard(folder, f"{source}/bucket_{bucket:05d}/shard_{number:05d}", samples)
                for number, samples in enumerate(shards)
            ]
            counts = {"samples": sum(s.samples for s in written), "tokens": sum(s.tokens for s in written)}
            entries[str(bucket)] = BucketEntry(**counts, shards=written)
        tokens = sum(entry.tokens for entry in entries.values())
        sources[source] = SourceEntry(documents=1, truncated_documents=0, tokens=tokens, buckets=entries)
    manifest = Manifest(
        fingerprint="0",
        buckets=list(buckets),
        append_eod=False,
        text_field="text",
        source_field=None,
        tokenizer=TokenizerEntry(
            file="tokenizer.model",
            sha256=hashlib.sha256(tokenizer.encode()).hexdigest(),
            vocab_size=vocab_size,
            bos_id=1,
            eos_id=2,
        ),
        dtype="uint16",
        inputs=[],
        sources=sources,
        statistics=Statistics(
            documents=len(sources),
            tokens=sum(source.tokens for source in sources.values()),
            samples=sum(source.samples for source in sources.values()),
            padding_ratio=0,
            truncation_ratio=0,
            concatenation_ratio=1,
            skipped_empty=0,
            bad_lines=0,
        ),
    )
    write_manifest(folder, manifest)
    return folder


def write_shard(folder, name, samples):
    prefix = folder / name
    with IndexedWriter(prefix, dtype=np.uint16) as writer:
        for pieces in samples:
            add_document(writer, [np.array(piece) for piece in pieces])
    files = {kind: prefix.with_name(prefix.name + f".{kind}") for kind in ("bin", "idx")}
    return ShardEntry(
        name=name,
        samples=len(samples),
        tokens=sum(len(piece) for pieces in samples for piece in pieces),
        **{f"{kind}_bytes": path.stat().st_size for kind, path in files.items()},
        **{f"{kind}_sha256": file_sha256(path) for kind, path in files.items()},
    )


CONTENTS = {
    "code": {8: [[[[1, 2], [3]], [[4, 5, 6, 7, 8, 9, 10, 11]]], [[[12] * 5]]], 16: [[[[20] * 9, [21] * 7]]]},
    "prose": {16: [[[[30] * 16]]]},
}


def test_samples_come_back_as_they_were_packed_over_shards(tmp_path):
    dataset = PackedDataset([write_folder(tmp_path / "data", CONTENTS)])
    assert dataset.streams == [Stream("code", 8, 3), Stream("code", 16, 1), Stream("prose", 16, 1)]
    assert (dataset.buckets, dataset.vocab_size, dataset.sources) == ([8, 16], VOCAB_SIZE, ["code", "prose"])
    for source, of_bucket in CONTENTS.items():
        for bucket, shards in of_bucket.items():
            for index, pieces in enumerate(pieces for shard in shards for pieces in shard):
                sample = dataset.sample(SampleId(source, bucket, index))
                assert sample.tokens.dtype == np.int64
                assert sample.tokens.tolist() == [token for piece in pieces for token in piece]
                assert sample.piece_lengths.tolist() == [len(piece) for piece in pieces]
    with pytest.raises(IndexError):
        dataset.sample(SampleId("code", 8, 3))


def test_folders_join_in_the_order_given(tmp_path):
    one = write_folder(tmp_path / "one", {"code": {8: [[[[1]], [[2]]]]}})
    two = write_folder(tmp_path / "two", {"code": {8: [[[[3]]]]}, "law": {16: [[[[4]]]]}})
    dataset = PackedDataset([two, one])
    assert dataset.streams == [Stream("code", 8, 3), Stream("law", 16, 1)]
    assert [dataset.sample(SampleId("code", 8, index)).tokens.tolist() for index in range(3)] == [[3], [1], [2]]


def test_folders_that_do_not_fit_together_are_refused(tmp_path):
    one = write_folder(tmp_path / "one", CONTENTS)
    with pytest.raises(DataError, match=r"another tokenizer .* same --tokenizer"):
        PackedDataset([one, write_folder(tmp_path / "tokenizer", CONTENTS, tokenizer="b")])
    with pytest.raises(DataError, match=r"has buckets \[8, 16, 32\], .* has \[8, 16\]"):
        PackedDataset([one, write_folder(tmp_path / "buckets", CONTENTS, buckets=(8, 16, 32))])
    with pytest.raises(ConfigError, match="twice"):
        PackedDataset([one, tmp_path / "one" / ".." / "one"])


def test_a_folder_that_is_not_there_is_a_config_error_and_one_without_manifest_a_data_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path \(.*nowhere\): there is no such folder"):
        PackedDataset([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        PackedDataset([tmp_path])
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        PackedDataset([])


@pytest.mark.parametrize("kind", ["bin", "idx"])
@pytest.mark.parametrize("damage", ["cut", "grown", "missing"])
def test_a_shard_of_another_size_is_refused_at_open(tmp_path, kind, damage):
    folder = write_folder(tmp_path / "data", CONTENTS)
    path = folder / f"code/bucket_00008/shard_00001.{kind}"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2] if damage == "cut" else path.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match=rf"shard_00001\.{kind} (is missing|has \d+ bytes where the manifest lists)"):
        PackedDataset([folder])


def test_shards_beyond_those_that_stay_open_are_closed_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data_set, "most_open_shards", lambda: 3)
    shards = [[[[number] * 5]] for number in range(40)]
    dataset = PackedDataset([write_folder(tmp_path / "data", {"code": {8: shards}})])
    for _ in range(2):
        assert [dataset.sample(SampleId("code", 8, index)).tokens[0] for index in range(40)] == list(range(40))
        descriptors = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()]
        assert 0 < sum(str(tmp_path) in path for path in descriptors) <= 3 * 2, descriptors


@pytest.mark.parametrize(("limit", "most"), [(1024, 128), (10, 1), (2**30, 8192), (resource.RLIM_INFINITY, 8192)])
def test_how_many_shards_stay_open_follows_from_the_limit_of_open_files(monkeypatch, limit, most):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert data_set.most_open_shards() == most


def test_ranks_share_out_the_look_at_the_shards(tmp_path):
    folder = write_folder(tmp_path / "data", CONTENTS)
    (folder / "code/bucket_00008/shard_00001.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard_00001\.bin has 0 bytes"):
        PackedDataset([folder], looked_at=slice(1, None, 2))
    dataset = PackedDataset([folder], looked_at=slice(0, None, 2))
    with pytest.raises(DataError, match=r"shard_00001\.bin has 0 bytes"):
        dataset.sample(SampleId("code", 8, 2))


def test_an_index_of_the_right_size_with_a_wrong_header_is_refused_at_once(tmp_path):
    folder = write_folder(tmp_path / "data", CONTENTS)
    path = folder / "code/bucket_00008/shard_00000.idx"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"shard_00000\.idx is no Megatron index"):
        PackedDataset([folder])


def test_an_index_of_the_right_size_with_wrong_contents_is_refused_when_it_is_read(tmp_path):
    folder = write_folder(tmp_path / "data", CONTENTS)
    path = folder / "code/bucket_00008/shard_00000.idx"
    whole = path.read_bytes()
    path.write_bytes(whole[:34] + bytes(len(whole) - 34))
    dataset = PackedDataset([folder])
    assert len(dataset.sample(SampleId("code", 8, 2)).tokens) == 5, "the other shard is sound"
    with pytest.raises(DataError, match=r"shard_00000\."):
        dataset.sample(SampleId("code", 8, 0))


def test_a_token_outside_the_vocabulary_is_named_with_file_sample_and_offset(tmp_path):
    dataset = PackedDataset([write_folder(tmp_path / "data", {"code": {8: [[[[1]], [[5, 6], [999, 1000]]]]}})])
    with pytest.raises(DataError, match=r"shard_00000\.bin: sample 1, offset 3: token id 1000 .* vocabulary of 1000"):
        dataset.sample(SampleId("code", 8, 1))


@pytest.mark.parametrize(("pieces", "length"), [([[1] * 5, [1] * 4], 9), ([], 0)])
def test_a_sample_that_does_not_fit_its_bucket_is_refused(tmp_path, pieces, length):
    dataset = PackedDataset([write_folder(tmp_path / "data", {"code": {8: [[[[1]], pieces]]}})])
    with pytest.raises(DataError, match=rf"sample 1 has {length} tokens, must have 1 to 8"):
        dataset.sample(SampleId("code", 8, 1))


def make_sample(*pieces):
    return Sample(np.concatenate([np.array(piece) for piece in pieces]), np.array([len(piece) for piece in pieces]))


def collate_two(split_documents):
    samples = [make_sample([11, 12, 13], [21, 22]), make_sample([31, 32, 33, 34], [41], [51, 52, 53])]
    options = {"bucket": 8, "micro_batch_tokens": 16, "split_documents": split_documents}
    return collate(samples, source_indices=[2, 0], **options)


@pytest.mark.parametrize("split_documents", [True, False])
def test_collate_lays_samples_in_a_row_and_masks_the_ends_of_pieces_and_the_padding(split_documents):
    batch = collate_two(split_documents)
    assert batch.tokens.tolist() == [11, 12, 13, 21, 22, 0, 0, 0, 31, 32, 33, 34, 41, 51, 52, 53]
    assert batch.labels.tolist() == [12, 13, 0, 22, 0, 0, 0, 0, 32, 33, 34, 0, 0, 52, 53, 0]
    assert batch.loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0]
    assert batch.source_ids.tolist() == [2] * 8 + [0] * 8
    assert batch.num_padding_tokens == 3


def test_collate_ends_attention_and_positions_at_documents_or_at_samples():
    split = collate_two(True)
    assert split.cu_seqlens.tolist() == [0, 3, 5, 8, 12, 13, 16]
    assert split.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2]
    joined = collate_two(False)
    assert joined.cu_seqlens.tolist() == [0, 8, 16]
    assert joined.position_ids.tolist() == [*range(8), *range(8)]
    assert {array.dtype for array in (split.tokens, split.labels, split.position_ids)} == {np.dtype(np.int64)}
    assert {array.dtype for array in (split.cu_seqlens, split.source_ids)} == {np.dtype(np.int32)}
    assert split.loss_mask.dtype == np.float32


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(0, 6), max_size=5).filter(lambda p: 0 < sum(p) <= 12), min_size=1),
    split_documents=st.booleans(),
)
def test_collate_against_a_loop_over_tokens(lengths, split_documents):
    token = iter(range(1, 10**6))
    samples = [make_sample(*[[next(token) for _ in range(n)] for n in pieces]) for pieces in lengths]
    batch = collate(
        samples,
        source_indices=[0] * len(samples),
        bucket=12,
        micro_batch_tokens=12 * len(samples),
        split_documents=split_documents,
    )
    expected = []  # (token, label, mask, position)
    for pieces, sample in zip(lengths, samples, strict=True):
        position, tokens = 0, iter(sample.tokens.tolist())
        for length in pieces:
            piece = [next(tokens) for _ in range(length)]
            for place, value in enumerate(piece):
                last = place + 1 == length
                where = place if split_documents else position
                expected.append((value, 0 if last else piece[place + 1], 0.0 if last else 1.0, where))
                position += 1
        padding = 12 - position
        expected += [(0, 0, 0.0, place if split_documents else position + place) for place in range(padding)]
    found = zip(*(a.tolist() for a in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)), strict=True)
    assert list(found) == expected
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == 12 * len(samples)
    assert np.diff(batch.cu_seqlens).min() > 0
    assert batch.num_padding_tokens == sum(12 - sum(pieces) for pieces in lengths)


def test_from_folder_to_micro_batches_every_token_of_an_epoch_is_seen_once(tmp_path):
    token = iter(range(1, VOCAB_SIZE))
    samples = {
        bucket: [[[next(token) for _ in range(bucket - 1 - number % 3)]] for number in range(8)] for bucket in (8, 16)
    }
    folder = write_folder(tmp_path / "data", {"code": {b: [of[:5], of[5:]] for b, of in samples.items()}})
    dataset = PackedDataset([folder])
    sampler = BucketSampler(dataset.streams, seed=1, phases=[SamplerPhase(0, None, 32)])
    seen = []
    for data_step in range(3 * 8):
        if max(sampler.epochs(data_step + 1).values()) > 1:
            break
        batch = sampler.batch(data_step)
        for first in range(0, len(batch.samples), 16 // batch.bucket):
            row = [dataset.sample(sample) for sample in batch.samples[first : first + 16 // batch.bucket]]
            options = {"bucket": batch.bucket, "micro_batch_tokens": 16, "split_documents": True}
            micro_batch = collate(row, source_indices=[0] * len(row), **options)
            seen += micro_batch.tokens[micro_batch.tokens > 0].tolist()
    assert len(seen) == len(set(seen)) > 100
    assert data_step >= 5 and set(seen) <= set(range(1, next(token)))


def test_the_manifest_that_these_tests_write_is_one_that_a_build_could_write(tmp_path):
    assert read_manifest(write_folder(tmp_path / "data", CONTENTS)).statistics.samples == 5


def test_prefetch_prepares_the_next_steps_in_one_other_thread():
    prepared, threads, third = [], set(), threading.Event()

    def prepare(step):
        prepared.append(step)
        threads.add(threading.get_ident())
        if step == 12:
            third.set()
        return [SimpleNamespace(step=step)]

    with Prefetcher(prepare, depth=2) as prefetcher:
        batches, _ = prefetcher.get(10)
        assert batches[0].step == 10
        assert third.wait(timeout=5), "two steps more are prepared without being asked for"
        assert [prefetcher.get(step)[0][0].step for step in range(11, 15)] == [11, 12, 13, 14]
    assert prepared[:5] == [10, 11, 12, 13, 14] and max(prepared) <= 16, "in order, each once, no further than depth"
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_prefetch_measures_waiting():
    def prepare(step):
        time.sleep(0.05)
        return []

    with Prefetcher(prepare, depth=1) as prefetcher:
        assert prefetcher.get(0)[1] > 0.03
        time.sleep(0.2)
        assert prefetcher.get(1)[1] < 0.03


def test_prefetch_follows_jumps_over_steps_and_back():
    with Prefetcher(lambda step: [SimpleNamespace(step=step)]) as prefetcher:
        assert [prefetcher.get(step)[0][0].step for step in (0, 1, 50, 52, 3, 4, 3)] == [0, 1, 50, 52, 3, 4, 3]


def test_prefetch_raises_an_error_at_the_step_that_it_belongs_to():
    def prepare(step):
        if step == 2:
            raise DataError("sample 7 is damaged")
        return []

    with Prefetcher(prepare, depth=2) as prefetcher:
        prefetcher.get(0)
        prefetcher.get(1)
        with pytest.raises(DataError, match="sample 7 is damaged"):
            prefetcher.get(2)


def test_close_ends_the_thread_and_drops_what_is_queued():
    started, release, prepared = threading.Event(), threading.Event(), []

    def prepare(step):
        prepared.append(step)
        if step == 1:
            started.set()
            release.wait(timeout=5)
        return []

    prefetcher = Prefetcher(prepare, depth=3)
    prefetcher.get(0)
    assert started.wait(timeout=5)
    threading.Timer(0.05, release.set).start()
    prefetcher.close()
    assert prepared == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_ranks_get_about_the_same_attention_work(tmp_path):
    generator = np.random.default_rng(5)
    samples = []
    for _ in range(64):  # from one long document to many short ones: costs differ by far
        cuts = np.sort(generator.choice(np.arange(1, 64), size=int(generator.integers(0, 12)), replace=False))
        lengths = np.diff([0, *cuts.tolist(), 64]).tolist()
        samples.append([[1] * length for length in lengths])
    dataset = PackedDataset([write_folder(tmp_path / "data", {"code": {64: [samples]}}, buckets=(64,))])
    phase = SamplerPhase(0, None, 64 * 16)
    sampler = BucketSampler(dataset.streams, seed=1, phases=[phase])
    for step in range(4):
        work, drawn = [], []
        for rank in range(4):
            batch, mine = samples_of_rank(
                dataset, sampler, step, data_parallel_size=4, data_parallel_rank=rank, split_documents=True
            )
            assert len(mine) == 4
            work.append(sum(dataset.attention_cost(sample, split_documents=True) for sample in mine))
            drawn += mine
        assert sorted(drawn) == sorted(batch.samples)
        costs = [dataset.attention_cost(sample, split_documents=True) for sample in batch.samples]
        assert max(work) - min(work) <= max(costs), "back and forth, ranks differ by less than the dearest sample"
        assert costs == [int((dataset.sample(sample).piece_lengths ** 2).sum()) for sample in batch.samples]
