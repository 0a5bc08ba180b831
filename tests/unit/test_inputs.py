"""Parquet and Megatron's own datasets as input: the same documents as from text, cut into parts or not."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_xy.data.corpus.documents import LineReport, read_part
from megatron_xy.data.corpus.inputs import find_inputs, read_documents, scan_file
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.indexed import IndexedReader, IndexedWriter
from megatron_xy.data.inspection.examine import verify_dataset
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import ConfigError, DataError
from tests.building import add_document, build_dataset, pieces_of
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows

BUCKETS = (16, 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fox.model")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 2000)


def build(inputs, tokenizer, output, **options):
    return build_dataset(inputs, tokenizer=tokenizer, output=output, buckets=BUCKETS, **options)


def packed(folder):
    return {name: data for name, data in content(folder).items() if name.endswith((".bin", ".idx"))}


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), "str")],
)
def test_parquet_gives_the_documents_of_jsonl(tmp_path, tokenizer, kind):
    rows = texts(200)
    sources = ["a" if n % 3 else "b" for n in range(200)]
    table = {"id": list(range(200)), "src": sources, "text": pyarrow.array(rows).cast(kind)}
    path = write_parquet(tmp_path / "a.parquet", table, row_group_size=30)
    read = [(d.text, d.source, d.line) for d in read_documents([path], source_field="src")]
    assert read == [(text, source, n) for n, (text, source) in enumerate(zip(rows, sources, strict=True), start=1)]
    write_rows(tmp_path / "b.jsonl", [{"text": text, "src": s} for text, s in zip(rows, sources, strict=True)])
    build([path], tokenizer, tmp_path / "one", source_field="src")
    build([tmp_path / "b.jsonl"], tokenizer, tmp_path / "two", source_field="src")
    assert packed(tmp_path / "one") == packed(tmp_path / "two")


@pytest.mark.parametrize("part_bytes", [1, 500, 2000, 10**6])
def test_parts_of_a_parquet_file_give_every_row_once(tmp_path, part_bytes):
    rows = texts(100)
    path = write_parquet(tmp_path / "a.parquet", {"text": rows}, row_group_size=7)
    advanced = []
    scanned = scan_file(path, part_bytes=part_bytes)
    assert scanned.most_lines == 100 and (part_bytes > 1 or len(scanned.parts) == 15)
    read = [
        (d.text, d.line)
        for part in scanned.parts
        for d in read_part(part, RowFields(), report=LineReport(), advance=advanced.append)
    ]
    assert read == list(zip(rows, range(1, 101), strict=True))
    assert sum(advanced) == scanned.size == path.stat().st_size


def test_bad_rows_of_parquet_are_listed_and_bad_files_refused(tmp_path):
    broken = pyarrow.StringArray.from_buffers(
        4, pyarrow.array([0, 1, 2, 3, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ab\xffd")
    )
    path = write_parquet(tmp_path / "a.parquet", {"text": broken, "n": [1, 2, 3, 4]})
    read = []
    with pytest.raises(DataError, match=r"a\.parquet:3: field 'text': invalid UTF-8 at byte 0"):
        read.extend(d.text for d in read_documents([path]))
    assert read == ["a", "b", "d"]
    with pytest.raises(DataError, match="no column 'body'; it has text, n"):
        list(read_documents([path], text_field="body"))
    with pytest.raises(DataError, match="column 'n' holds int64, not strings"):
        list(read_documents([path], text_field="n"))
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "two.parquet")
    with pytest.raises(DataError, match=r"two\.parquet has 2 columns 'text'; rename all but one"):
        list(read_documents([tmp_path / "two.parquet"]))
    write_parquet(path, {"text": ["a", None, ""]})
    report = LineReport()
    part = scan_file(path, part_bytes=1000).parts[0]
    assert [d.text for d in read_part(part, RowFields(), report=report)] == ["a"]
    assert report == LineReport(
        lines=3, skipped_empty=1, bad_lines=1, listed=[f"{path}:2: field 'text' is null, not a string"]
    )
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"plain", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet is damaged or no Parquet file"):
            scan_file(path, part_bytes=1000)


def write_prefix(prefix, documents, *, pieces=1, dtype="u2"):
    with IndexedWriter(prefix, dtype=dtype) as writer:
        for document in documents:
            add_document(writer, np.array_split(np.asarray(document, dtype=dtype), pieces))
    return prefix


@pytest.mark.parametrize(("pieces", "dtype"), [(1, "u2"), (3, "i4"), (2, "i8")])
def test_a_megatron_dataset_gives_the_samples_of_its_text(tmp_path, tokenizer, pieces, dtype):
    rows = texts(150)
    encode = load_tokenizer(tokenizer).encode
    write_prefix(tmp_path / "given", [[], *(encode(text) for text in rows), [], []], pieces=pieces, dtype=dtype)
    write_rows(tmp_path / "text.jsonl", [{"text": text} for text in rows])
    stats = build([tmp_path / "given"], tokenizer, tmp_path / "one")
    build([tmp_path / "text.jsonl"], tokenizer, tmp_path / "two")
    assert (stats["documents"], stats["skipped_empty"], stats["lines"]) == (150, 3, 153)
    assert packed(tmp_path / "one") == packed(tmp_path / "two")
    verify_dataset(tmp_path / "one")


def test_a_megatron_dataset_is_found_by_prefix_file_or_folder_and_joins_text(tmp_path, tokenizer):
    folder = tmp_path / "corpus"
    write_rows(folder / "b.jsonl", [{"text": "fox"}])
    encode = load_tokenizer(tokenizer).encode
    write_prefix(folder / "a.v1", [encode("dog")])
    write_rows(folder / "c.jsonl", [{"text": "quick"}])
    for given in (folder / "a.v1", folder / "a.v1.bin", folder / "a.v1.idx"):
        assert find_inputs([given]) == [folder / "a.v1.bin"]
    assert [path.name for path in find_inputs([folder])] == ["a.v1.bin", "b.jsonl", "c.jsonl"]
    build([folder], tokenizer, tmp_path / "out")
    shard = read_manifest(tmp_path / "out").sources["default"].buckets["16"].shards[0].name
    words = [load_tokenizer(tokenizer).decode(piece) for piece in pieces_of(IndexedReader(tmp_path / "out" / shard), 0)]
    assert sorted(words) == ["dog", "fox", "quick"]
    with pytest.raises(ConfigError, match="named twice"):
        find_inputs([folder / "a.v1", folder])
    (folder / "a.v1.idx").unlink()
    with pytest.raises(ConfigError, match=r"a\.v1\.idx is missing beside it"):
        find_inputs([folder])


def test_a_megatron_dataset_of_another_tokenizer_is_refused(tmp_path, tokenizer):
    write_prefix(tmp_path / "given", [[1, 2]] * 700 + [[5, 300]] + [[1, 2]] * 500)
    with pytest.raises(DataError, match=r"given\.bin:701: token id 300 is outside the vocabulary of 300"):
        build([tmp_path / "given"], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_megatron_dataset_refuses_what_it_cannot_have(tmp_path, tokenizer):
    write_prefix(tmp_path / "given", [[5, 6]])
    write_rows(tmp_path / "b.jsonl", [{"text": "fox", "src": "b"}])
    inputs = [tmp_path / "b.jsonl", tmp_path / "given"]
    with pytest.raises(ConfigError, match=r"append_eod \(true\) cannot be given with token inputs"):
        build(inputs, tokenizer, tmp_path / "out", append_eod=True)
    with pytest.raises(ConfigError, match=r"source_field \(src\) names a field of rows, and no input has rows"):
        build(inputs[1:], tokenizer, tmp_path / "out", source_field="src")
    assert not (tmp_path / "out").exists()
    assert list(build(inputs, tokenizer, tmp_path / "out", source_field="src")["sources"]) == ["b", "default"]
