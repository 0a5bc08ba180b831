"""Each text once, and texts held out: chosen by their hash, the same for any number of workers and after any stop."""

import gzip
import json

import numpy as np
import pytest

from megatron_xy.data.building import deduplicate, workers
from megatron_xy.data.building.deduplicate import HashTask, RangeTask, hash_documents, search_range
from megatron_xy.data.building.options import Share
from megatron_xy.data.corpus.documents import Part
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.corpus.selection import LINE_BITS, is_held_out
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.indexed import IndexedWriter
from megatron_xy.data.inspection.examine import verify_dataset
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import ConfigError, DataError
from tests.building import add_document, build_dataset
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows

BUCKETS = (16, 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fox.model")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 2000)
    monkeypatch.setattr("megatron_xy.data.building.build_folder.WINDOW_DOCUMENTS", 30)


@pytest.fixture
def corpus(tmp_path):
    """(rows [(place, text)] in order, folder): every third text stands before, some of them in another file."""
    folder, rows = tmp_path / "corpus", []
    random = np.random.default_rng(0)
    for seed, name in enumerate(["a.jsonl", "b.jsonl.gz", "c.jsonl"]):
        own = texts(60, seed=seed)
        for index in range(0, 60, 3):
            own[index] = str(random.choice([text for _, text in rows] or own))
        lines = [b"", b'{"text": ""}', *(json.dumps({"text": text}).encode() for text in own)]
        write_rows(folder / name, lines)
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress((folder / name).read_bytes()))
        rows += [((str(folder / name), number), text) for number, text in enumerate(own, start=3)]
    (folder / "d.txt").write_text(rows[5][1])
    return [*rows, ((str(folder / "d.txt"), 1), rows[5][1])], folder


def first_places(rows):
    places = {}
    for place, text in rows:
        places.setdefault(text, place)
    return sorted(places.values())


def run(folder, tokenizer, output, **options):
    return build_dataset([folder], tokenizer=tokenizer, output=output, buckets=BUCKETS, **options)


def places(output):
    """Where the documents of a data folder stand, sorted."""
    dataset = PackedDataset([output])
    found = set()
    for source, entry in read_manifest(output).sources.items():
        for size, bucket in entry.buckets.items():
            for index in range(bucket.samples):
                pieces = dataset.documents(SampleId(source, int(size), index))
                found |= {(piece["file"], piece["line"]) for piece in pieces}
    return sorted(found)


def test_the_first_of_equal_texts_stays(corpus, tokenizer, tmp_path, monkeypatch):
    rows, folder = corpus
    stats = run(folder, tokenizer, tmp_path / "out", deduplicate=True)
    kept = first_places(rows)
    assert places(tmp_path / "out") == kept
    assert (stats["documents"], stats["duplicates"]) == (len(kept), len(rows) - len(kept)) and stats["duplicates"] > 50
    verify_dataset(tmp_path / "out")
    assert places_without(folder, tokenizer, tmp_path) == sorted(place for place, _ in rows)
    monkeypatch.setattr(deduplicate, "ROWS_IN_MEMORY", 10)  # in many ranges of hashes
    run(folder, tokenizer, tmp_path / "ranges", deduplicate=True)
    assert content(tmp_path / "ranges") == content(tmp_path / "out")


def places_without(folder, tokenizer, tmp_path):
    assert run(folder, tokenizer, tmp_path / "all")["duplicates"] == 0
    return places(tmp_path / "all")


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_held_out_texts_are_a_data_folder_of_their_own(corpus, tokenizer, tmp_path, fraction):
    rows, folder = corpus
    output = tmp_path / "out"
    stats = run(folder, tokenizer, output, held_out=fraction)
    held = sorted(place for place, text in rows if is_held_out(text, fraction=fraction))
    assert places(output / "held_out") == held
    assert places(output) == sorted({place for place, _ in rows} - set(held))
    assert (stats["held_out_documents"], stats["documents"]) == (len(held), len(rows) - len(held))
    assert read_manifest(output / "held_out").statistics.held_out_documents == 0
    assert abs(len(held) / len(rows) - fraction) < 0.12
    for each in (output, output / "held_out"):
        verify_dataset(each)
    assert run(folder, tokenizer, output, held_out=fraction)["reused"] is True
    with pytest.raises(ConfigError, match="finished data set of other inputs or options"):
        run(folder, tokenizer, output, held_out=fraction / 2)
    with pytest.raises(ConfigError, match="holds a held_out of a build with held_out"):
        run(folder, tokenizer, output)


def test_both_together_hold_out_each_text_once(corpus, tokenizer, tmp_path):
    rows, folder = corpus
    output = tmp_path / "out"
    stats = run(folder, tokenizer, output, held_out=0.3, deduplicate=True)
    by_place = dict(rows)
    held = [place for place in first_places(rows) if is_held_out(by_place[place], fraction=0.3)]
    assert places(output / "held_out") == held
    assert places(output) == sorted(set(first_places(rows)) - set(held))
    assert stats["held_out_documents"] == len(held)
    held_stats = read_manifest(output / "held_out").statistics
    assert stats["duplicates"] + held_stats.duplicates == len(rows) - len(first_places(rows))


def test_workers_and_shares_change_no_byte(corpus, tokenizer, tmp_path):
    _, folder = corpus
    options = {"held_out": 0.3, "deduplicate": True}
    run(folder, tokenizer, tmp_path / "one", **options)
    run(folder, tokenizer, tmp_path / "two", workers=2, **options)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    finished = [run(folder, tokenizer, tmp_path / "shares", shard=Share(i, 3), **options)["finished"] for i in range(3)]
    assert finished == [False, False, True]
    assert content(tmp_path / "shares") == content(tmp_path / "one")


class Stop(Exception):
    """Stands for a kill: nothing in the build catches it."""


@pytest.mark.parametrize(
    ("phase", "which"), [("hash", 1), ("hash", 2), ("deduplicate", 1), ("tokenize", 2), ("pack", 2)]
)
def test_a_stopped_build_goes_on(corpus, tokenizer, tmp_path, monkeypatch, phase, which):
    _, folder = corpus
    monkeypatch.setattr(workers, "PROGRESS_SECONDS", 0)
    options = {"held_out": 0.3, "deduplicate": True}
    run(folder, tokenizer, tmp_path / "unbroken", **options)
    begun = []

    def stop(now, done, total, unit):
        begun.extend([now] if done == 0 else [])
        if now == phase and begun.count(phase) == which and done:
            raise Stop

    with pytest.raises(Stop):
        run(folder, tokenizer, tmp_path / "out", progress=stop, **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(folder, tokenizer, tmp_path / "out", **options)["reused"] is False
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_hashes_are_searched_in_ranges_that_cover_all(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": str(n % 7)} for n in range(500)])
    part = Part(str(tmp_path / "a.jsonl"), 0, (tmp_path / "a.jsonl").stat().st_size, 1, 3)
    task = HashTask(tmp_path / "hashes" / "0", (part,), RowFields())
    assert hash_documents(task, lambda size: None) == 500 == hash_documents(task, lambda size: None)
    for count in (1, 2, 5, 64):
        ranges = [RangeTask(tmp_path / str(count) / str(n), (task.rows,), n, count) for n in range(count)]
        assert sum(search_range(each, lambda size: None) for each in ranges) == 493
        keys = np.concatenate([np.fromfile(each.keys, dtype="<u8") for each in ranges])
        assert sorted(keys.tolist()) == [3 << LINE_BITS | line for line in range(8, 501)]


def test_what_cannot_be_selected_from_is_refused(tokenizer, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "fox"}])
    with IndexedWriter(tmp_path / "given", dtype="u2") as writer:
        add_document(writer, [np.array([1, 2], dtype="u2")])
    for options in ({"deduplicate": True}, {"held_out": 0.5}):
        with pytest.raises(ConfigError, match=r"given\.bin\) holds tokens"):
            run(tmp_path / "given", tokenizer, tmp_path / "out", **options)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"held_out \(.*\) must be a fraction"):
            run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", held_out=wrong)
    with pytest.raises(DataError, match="no document with text is left"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", held_out=1e-9)
