"""What other builders answer with a partial result, a hang or silence: here each ends in an error, or is counted."""

import gzip
import hashlib
import json
import os
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_xy.data.building import build, workers
from megatron_xy.data.building.options import Share
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.indexed import HEADER, MAGIC, IndexedReader, IndexedWriter, bin_path, idx_path
from megatron_xy.data.inspection.examine import verify_dataset
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import DataError
from tests.building import build_dataset, pieces_of
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows

BUCKETS = (64, 128)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fox.model")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 5000)


def run(corpus, tokenizer, output, **options):
    return build_dataset([corpus], tokenizer=tokenizer, output=output, buckets=BUCKETS, **options)


def rows_with(bad, *, at, count=300):
    rows = [{"text": text} for text in texts(count)]
    return [*rows[:at], bad, *rows[at:]]


def all_tokens(output):
    """Every document's tokens; no document here is longer than the largest bucket."""
    return sorted(
        piece.tolist()
        for source in read_manifest(output).sources.values()
        for bucket in source.buckets.values()
        for shard in bucket.shards
        for reader in [IndexedReader(output / shard.name)]
        for index in range(reader.num_documents)
        for piece in pieces_of(reader, index)
    )


@pytest.mark.parametrize("bad", [b'{"text": "cut', b'{"text": "a bad \xff byte"}'], ids=["json", "utf-8"])
@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_line_of_301_stops_the_build_or_costs_itself_alone(tmp_path, tokenizer, bad, workers):
    corpus = write_rows(tmp_path / "a.jsonl", rows_with(bad, at=97))
    output = tmp_path / "out"
    for policy in ("fail", "limit"):  # one of 301 is more than one in a thousand
        with pytest.raises(DataError, match=rf"{corpus}:98: invalid (JSON|UTF-8)"):
            run(corpus, tokenizer, output, bad_lines=policy, workers=workers)
        assert not (output / "manifest.json").exists()
    stats = run(corpus, tokenizer, output, bad_lines="skip", workers=workers)
    assert (stats["documents"], stats["bad_lines"], stats["lines"]) == (300, 1, 301)
    assert (output / "bad_lines.txt").read_text().startswith(f"{corpus}:98: invalid ")
    verify_dataset(output)
    write_rows(tmp_path / "b.jsonl", [{"text": text} for text in texts(300)])
    run(tmp_path / "b.jsonl", tokenizer, tmp_path / "good")
    assert all_tokens(output) == all_tokens(tmp_path / "good")


def test_every_bad_line_of_the_file_is_named_wherever_its_shards_lie(tmp_path, tokenizer):
    rows = [{"text": text} for text in texts(300)]
    bad = [1, 150, 299]
    for number in bad:
        rows[number - 1] = b"{"
    corpus = write_rows(tmp_path / "corpus/a.jsonl", rows).parent
    write_rows(corpus / "b.jsonl", [b"{"])
    with pytest.raises(DataError) as raised:
        run(corpus, tokenizer, tmp_path / "out", bad_lines="fail")
    for number in bad:
        assert f"{corpus / 'a.jsonl'}:{number}: invalid JSON" in str(raised.value)
    assert len(list((tmp_path / "out").glob(".tmp-tokens/tokens/*.json"))) > 1  # good shards are kept
    assert run(corpus, tokenizer, tmp_path / "out", bad_lines="skip")["bad_lines"] == 4
    listed = (tmp_path / "out" / "bad_lines.txt").read_text().splitlines()
    places = [f"{corpus / 'a.jsonl'}:{number}" for number in bad] + [f"{corpus / 'b.jsonl'}:1"]
    assert [line.split(": ")[0] for line in listed] == places


def test_few_bad_lines_are_left_out_and_a_stricter_call_does_not_take_the_result_for_whole(tmp_path, tokenizer):
    corpus = write_rows(tmp_path / "a.jsonl", [b"{", *({"text": "fox"} for _ in range(2000))])
    output = tmp_path / "out"
    assert run(corpus, tokenizer, output)["bad_lines"] == 1
    assert run(corpus, tokenizer, output)["reused"] is True
    assert run(corpus, tokenizer, output, bad_lines="skip")["reused"] is True
    with pytest.raises(DataError, match=r"built without 1 bad line\(s\) of 2001, listed in bad_lines.txt"):
        run(corpus, tokenizer, output, bad_lines="fail")
    (output / "bad_lines.txt").write_text("")
    with pytest.raises(DataError, match=r"bad_lines\.txt has 0 bytes"):
        verify_dataset(output)


def test_bad_lines_are_judged_by_all_lines_whatever_a_share_has_seen(tmp_path, tokenizer):
    corpus = write_rows(tmp_path / "corpus/a.jsonl", [b"{", {"text": "fox"}]).parent
    write_rows(corpus / "b.jsonl", [{"text": "fox"}] * 1000)
    finished = [run(corpus, tokenizer, tmp_path / "out", shard=Share(index, 2)) for index in range(2)]
    assert not finished[0]["finished"] and finished[1]["bad_lines"] == 1
    write_rows(corpus / "c.jsonl", [b"{"])
    with gzip.open(corpus / "d.jsonl.gz", "w") as stream:  # how many lines it has is known once it is read
        stream.write(b'{"text": "fox"}\n' * 100)
    assert not run(corpus, tokenizer, tmp_path / "bad", shard=Share(0, 2))["finished"]
    with pytest.raises(DataError, match=r"2 bad line\(s\) of at most 1103"):
        run(corpus, tokenizer, tmp_path / "bad", shard=Share(1, 2))


def test_a_wrong_field_is_found_at_the_end_of_the_first_file(tmp_path, tokenizer):
    for name in "abc":
        write_rows(tmp_path / f"corpus/{name}.jsonl", [{"body": text} for text in texts(200)])
    with pytest.raises(DataError, match=r"corpus/a\.jsonl:200: no field 'text'") as raised:
        run(tmp_path / "corpus", tokenizer, tmp_path / "out")
    assert "c.jsonl" not in str(raised.value)


def test_the_text_of_a_control_token_is_text(tmp_path, tokenizer):
    corpus = write_rows(tmp_path / "a.jsonl", [{"text": "<s>fox</s><unk><pad><0x00>"}, {"text": "</s>"}] * 20)
    run(corpus, tokenizer, tmp_path / "out")
    loaded = load_tokenizer(tokenizer)
    pieces = all_tokens(tmp_path / "out")
    assert len(pieces) == 40
    assert not {loaded.bos_id, loaded.eos_id, 0} & {token for piece in pieces for token in piece}
    assert {loaded.decode(piece) for piece in pieces} == {"<s>fox</s><unk><pad><0x00>", "</s>"}


def test_leavings_of_another_build_are_never_taken_for_this_ones(tmp_path, tokenizer):
    def stop(phase, done, total, unit):
        if phase == "pack":
            raise KeyboardInterrupt

    corpus, output = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts(300)]), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tokenizer, output, progress=stop)
    assert list(output.glob(f"{build.WORK_FOLDER}/tokens/*.json"))
    write_rows(corpus, [{"text": text} for text in texts(300, seed=1)])
    run(corpus, tokenizer, output)
    run(corpus, tokenizer, tmp_path / "fresh")
    assert content(output) == content(tmp_path / "fresh")


def as_parquet(path, some):
    pyarrow.parquet.write_table(pyarrow.table({"text": some}), path)


def as_prefix(path, some):
    with IndexedWriter(path.with_suffix(""), dtype=np.uint16) as writer:
        for text in some:
            writer.add_documents(np.full(len(text), 5, dtype=np.uint16), lengths=np.array([len(text)]))


WRITTEN = {
    "a.txt": lambda path, some: path.write_text(" ".join(some)),
    "a.jsonl.gz": lambda path, some: path.write_bytes(gzip.compress(json.dumps({"text": some[0]}).encode())),
    "a.jsonl": lambda path, some: write_rows(path, [{"text": text} for text in some]),
    "a.parquet": as_parquet,
    "a.bin": as_prefix,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("text", ["the fox", "a much longer text"])  # the same size, and another
def test_a_corpus_that_changes_after_the_scan_is_refused(tmp_path, tokenizer, name, text):
    def change(phase, done, total, unit):
        if phase == "tokenize":
            WRITTEN[name](tmp_path / name, [text] * 50)

    WRITTEN[name](tmp_path / name, ["fox the"] * 50)
    with pytest.raises(DataError, match=rf"{name} changed while it was read"):
        run(tmp_path / name, tokenizer, tmp_path / "out", progress=change)
    assert not (tmp_path / "out/manifest.json").exists()
    stats = run(tmp_path / name, tokenizer, tmp_path / "out")
    sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert stats["finished"] and (name == "a.bin" or read_manifest(tmp_path / "out").inputs[0].sha256 == sha256)


def test_a_corpus_that_changes_while_a_part_is_read_is_refused_and_its_date_alone_makes_no_other_data(
    tmp_path, tokenizer, monkeypatch
):
    def change(phase, done, total, unit):
        if phase == "tokenize" and done:
            os.utime(corpus)

    monkeypatch.setattr(workers, "PROGRESS_SECONDS", 0)
    corpus = write_rows(tmp_path / "a.jsonl", [{"text": "fox"}] * 50)
    with pytest.raises(DataError, match="changed while it was read"):
        run(corpus, tokenizer, tmp_path / "out", progress=change)
    assert not run(corpus, tokenizer, tmp_path / "out")["reused"]
    os.utime(corpus)
    assert run(corpus, tokenizer, tmp_path / "out")["reused"]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def grow(path, change):
    os.truncate(path, change(path.stat().st_size))


def randomise(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


DAMAGE = {
    "cut in half": lambda prefix: grow(bin_path(prefix), lambda size: size // 2),
    "grown": lambda prefix: grow(bin_path(prefix), lambda size: size + 64),
    "index cut": lambda prefix: grow(idx_path(prefix), lambda size: size - 8),
}
HIDDEN_DAMAGE = {
    "bit flipped": lambda prefix: flip(bin_path(prefix), 100),
    "random": lambda prefix: randomise(bin_path(prefix)),
    "offset damaged": lambda prefix: flip(idx_path(prefix), HEADER.size + 4 * IndexedReader(prefix).num_sequences + 9),
}


@pytest.mark.parametrize("kind", [*DAMAGE, *HIDDEN_DAMAGE])
def test_a_damaged_shard_is_refused_when_opened_or_when_verified(tmp_path, tokenizer, kind):
    output = tmp_path / "out"
    run(write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts(100)]), tokenizer, output)
    shard = read_manifest(output).sources["default"].buckets["128"].shards[0]
    {**DAMAGE, **HIDDEN_DAMAGE}[kind](output / shard.name)
    if kind in DAMAGE:
        with pytest.raises(DataError, match=r"has \d+ bytes where the manifest lists"):
            PackedDataset([output])
    with pytest.raises(DataError, match=shard.name):
        verify_dataset(output)


def test_tokens_beyond_two_to_the_31_are_found(tmp_path):
    length, count = 1 << 30, 5
    with (tmp_path / "large.bin").open("wb") as stream:  # sparse: takes no room
        stream.seek(2 * length * count - 2)
        stream.write(struct.pack("<H", 7))
    offsets = np.arange(count, dtype="<i8") * 2 * length
    documents = np.arange(count + 1, dtype="<i8")
    index = HEADER.pack(MAGIC, 1, 8, count, count + 1) + np.full(count, length, dtype="<i4").tobytes()
    (tmp_path / "large.idx").write_bytes(index + offsets.tobytes() + documents.tobytes())
    reader = IndexedReader(tmp_path / "large")
    tokens, _ = reader.document_tokens(count - 1)
    assert (len(tokens), tokens[-1], tokens[0], reader.num_tokens) == (length, 7, 0, count * length)


def test_rows_of_any_json_type_are_listed_not_raised(tmp_path, tokenizer):
    bad = [3, "text", None, [1], {"text": 3}, {"text": None}, {"text": ["a"]}, {"text": {"a": 1}}, {"t": "x"}]
    corpus = write_rows(tmp_path / "a.jsonl", [*bad, {"text": "fox"}])
    with pytest.raises(DataError) as raised:
        run(corpus, tokenizer, tmp_path / "out", bad_lines="fail")
    assert [line.split(":")[1] for line in str(raised.value).splitlines()[:-1]] == [str(n) for n in range(1, 10)]
    write_rows(tmp_path / "b.jsonl", bad)
    with pytest.raises(DataError, match="no document with text"):
        run(tmp_path / "b.jsonl", tokenizer, tmp_path / "none", bad_lines="skip")
