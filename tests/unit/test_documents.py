"""Corpus files -> documents: order, parts with true line numbers, and every bad line named."""

import gzip
import json
import os
import random
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.corpus import row_contents
from megatron_xy.data.corpus.documents import LineReport, read_part
from megatron_xy.data.corpus.inputs import find_inputs, read_documents, scan_file
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.errors import ConfigError, DataError
from tests.unit.small_corpus import write_rows


def test_order_sources_and_lines(tmp_path):
    write_rows(tmp_path / "b.jsonl", [{"text": "b1", "src": "x"}, {"text": "b2", "src": "y"}])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write('{"text": "a1", "src": "x"}\n\n{"text": "a3", "src": "x"}')
    found = [
        (d.text, d.source, d.path.rsplit("/", 1)[1], d.line) for d in read_documents([tmp_path], source_field="src")
    ]
    assert found == [
        ("a1", "x", "a.jsonl.gz", 1),
        ("a3", "x", "a.jsonl.gz", 3),
        ("b1", "x", "b.jsonl", 1),
        ("b2", "y", "b.jsonl", 2),
    ]
    assert {d.source for d in read_documents([tmp_path])} == {"default"}


def test_text_files_are_one_document_each_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n')
    assert [d.text for d in read_documents([tmp_path])] == ["one\ntwo\n", "three"]


def test_inputs_keep_the_order_given_and_refuse_what_they_cannot_read(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", ".hidden", "sub/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = [p.name for p in find_inputs([tmp_path / "c.txt", str(tmp_path / "*.jsonl"), tmp_path / "sub"])]
    assert names == ["c.txt", "a.jsonl", "b.jsonl", "d.jsonl"]
    assert [p.name for p in find_inputs([tmp_path])] == ["a.jsonl", "b.jsonl", "c.txt", "d.jsonl"]
    with pytest.raises(ConfigError, match="named twice"):
        find_inputs([tmp_path, tmp_path / "a.jsonl"])
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(ConfigError, match=r"e\.csv.*only \.jsonl"):
        find_inputs([tmp_path])
    (tmp_path / "empty").mkdir()
    for wrong in ("missing.jsonl", "none*.jsonl", "empty"):
        with pytest.raises(ConfigError, match=wrong.replace("*", r"\*")):
            find_inputs([tmp_path / wrong])


def test_links_of_a_folder_are_followed_and_nothing_is_left_out_unsaid(tmp_path):
    for name in ("in/b.jsonl", "in/z.jsonl", "out/a.jsonl", "out/deep/.hidden/x", "out/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    corpus = tmp_path / "in"
    (corpus / "more").symlink_to(tmp_path / "out")
    (corpus / ".passed").symlink_to("nothing")
    names = ["b.jsonl", "more/a.jsonl", "more/deep/c.jsonl", "z.jsonl"]
    assert [p.relative_to(corpus).as_posix() for p in find_inputs([corpus])] == names
    assert sorted(find_inputs([corpus / "**"])) == find_inputs([corpus])
    wrong = corpus / "wrong.jsonl"
    wrong.symlink_to("nothing")
    for named in (wrong, corpus, corpus / "*"):
        with pytest.raises(ConfigError, match=r"wrong\.jsonl\) is a link to what is not there; mend it"):
            find_inputs([named])
    wrong.unlink()
    os.mkfifo(wrong)
    for named in (wrong, corpus, corpus / "*"):
        with pytest.raises(ConfigError, match=r"wrong\.jsonl\) is neither a file nor a folder"):
            find_inputs([named])
    wrong.unlink()
    (tmp_path / "out" / "deep" / "circle").symlink_to(corpus)
    with pytest.raises(ConfigError, match=r"deep/circle\) is a link to a folder that it lies in"):
        find_inputs([corpus])


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    strange = tmp_path / os.fsdecode(b"bad\xff.jsonl")
    strange.write_text('{"text": "hello"}\n')
    for named in (strange, tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(ConfigError, match=r"bad\\udcff\.jsonl'\): .* rename them") as caught:
            find_inputs([named])
        caught.value.args[0].encode("utf-8")


BAD = [
    (b'{"text": "cut', "invalid JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    (b'{"body": "x"}', "no field 'text'"),
    (b'{"text": 3}', "field 'text' is a number, not a string"),
    (b'{"text": null}', "field 'text' is null"),
    (b'{"text": "a\\ud800b"}', "lone surrogate at character 1"),
    (b'["text"]', "a JSON object is wanted, not a list"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"text": ' + b"1" * 5000 + b"}", "invalid JSON"),
    (b'{"text": "x"}', "no field 'src'"),
    (b'{"text": "x", "src": "../up"}', "cannot name a folder"),
    (b'{"text": "x", "src": ".hid"}', "cannot name a folder"),
    (b'{"text": "x", "src": "manifest.json"}', "has the name of something else in a data folder"),
    (b'{"text": "x", "src": "held_out"}', "has the name of something else in a data folder"),
    (b'{"text": "x", "src": ""}', "cannot name a folder"),
    (b'{"text": "x", "src": "a\\u3000b"}', "1 to 100 letters, digits and . _ -"),
    (b'{"text": "x", "src": "a\\u202e"}', "cannot name a folder"),
    (b'{"text": "x", "src": "a\\n"}', "cannot name a folder"),
    (b'{"text": "x", "src": "\\u212b"}', "in NFC"),
    (json.dumps({"text": "x", "src": "\u91d1" * 67}).encode(), "200 bytes of UTF-8 at most"),
    (json.dumps({"text": "x", "src": "a" * 101}).encode(), "cannot name a folder"),
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    line=st.one_of(
        st.binary(max_size=40),
        st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(max_size=20)),
        st.builds(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode(), st.text(max_size=20)),
        st.text(alphabet='{}[]":,\\u0dtextNaInfy-+.eE1 \t', max_size=30).map(str.encode),
        st.sampled_from(
            [
                b'{"text": "\\ud800"}',
                b'{"text": NaN}',
                b'{"text": "a", "text": "b"}',
                b'{"text": 1e999}',
                b'{"text": ' + b"9" * 400 + b"}",
                b"[" * 2000 + b"]" * 2000,
                b' {"text": "a"} \r\n',
                b'{"text": "\t"}',
            ]
        ),
    )
)
def test_a_line_reads_the_same_with_orjson_and_without(line):
    pytest.importorskip("orjson", reason="the extra `fast` is not installed: there is one reader")

    def read():
        try:
            return row_contents.parse(line, RowFields("text", None, conversations=False))
        except row_contents.BadLine as error:
            return str(error)

    with_orjson = read()
    orjson, row_contents.orjson = row_contents.orjson, None
    try:
        assert with_orjson == read()
    finally:
        row_contents.orjson = orjson


def test_all_bad_lines_are_named_at_once_or_skipped(tmp_path):
    good = {"text": "good", "src": "a"}
    path = write_rows(tmp_path / "a.jsonl", [good, *(line for line, _ in BAD), good])
    texts = []
    with pytest.raises(DataError) as raised:
        texts.extend(document.text for document in read_documents([path], source_field="src"))
    lines = str(raised.value).splitlines()
    for number, ((_, reason), line) in enumerate(zip(BAD, lines, strict=False), start=2):
        assert line.startswith(f"{path}:{number}: ") and reason in line
    assert lines[len(BAD)].startswith(f"{len(BAD)} bad line(s)")
    assert texts == ["good", "good"]


def test_all_lines_of_a_long_list_are_named_up_to_ten_thousand(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [b"{"] * 10_050)
    with pytest.raises(DataError, match=r"a\.jsonl:10000: .*\n\.\.\. and 50 more\n10050 bad line") as raised:
        list(read_documents([path]))
    assert str(raised.value).count("\n") == 10_001


def test_one_bad_line_in_a_thousand_is_let_pass_and_one_more_is_not(tmp_path):
    good = [{"text": "x"}] * 1999
    path = write_rows(tmp_path / "a.jsonl", [b"{", b"", *good, b"{"])
    assert len(list(read_documents([path]))) == 1999  # 2 of 2001 are less than 0.1%
    write_rows(path, [b"{", b"{", *good, b"{"])
    with pytest.raises(DataError, match=r"a\.jsonl:2002: (.*\n)+3 bad line\(s\) of at most 2002, more than 0\.1%"):
        list(read_documents([path]))


def test_bad_bytes_in_a_text_file_have_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:3: invalid UTF-8"):
        list(read_documents([tmp_path / "a.txt"]))


def compress_zst(data):
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", compress_zst)])
def test_a_damaged_compressed_file_never_passes_for_a_shorter_one(tmp_path, ending, compress):
    lines = [json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(5000)]
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(compress(b"".join(lines[:2000])) + compress(b"".join(lines[2000:])))  # members, frames
    assert [(d.text, d.line) for d in read_documents([path])] == [(f"line {n}", n + 1) for n in range(5000)]
    whole = compress(b"".join(lines))
    flipped = bytearray(whole)
    flipped[-2 if ending == "zst" else -6] ^= 1  # in the checksum at the end
    for content in (whole[: len(whole) // 2], whole[:-4], whole + whole[:50], bytes(flipped), b"plain"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.jsonl\.{ending}: damaged after line"):
            list(read_documents([path]))


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", compress_zst)])
def test_a_compressed_file_without_a_byte_is_a_cut_one_and_one_of_no_data_is_not(tmp_path, ending, compress):
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"a\.jsonl\.{ending}: damaged after line 0: the file has no bytes"):
        list(read_documents([path]))
    path.write_bytes(compress(b""))
    assert list(read_documents([path])) == []


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_reading_takes_as_much_memory_for_a_large_file_as_for_a_small_one(tmp_path, ending):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": compress_zst}[ending]
    peaks = []
    for size in (4_000, 16_000):
        path = tmp_path / f"{size}.jsonl{ending}"
        noise = random.Random(0).randbytes(size * 50).hex()
        path.write_bytes(compress("".join(f'{{"text": "{noise[100 * n :][:100]}"}}\n' for n in range(size)).encode()))
        tracemalloc.start()
        assert sum(1 for _ in read_documents([path])) == size
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000


@pytest.mark.parametrize("part_bytes", [1, 7, 40, 100, 1000, 10**6])
@pytest.mark.parametrize("last_newline", [True, False])
def test_parts_give_every_document_once_with_its_line(tmp_path, part_bytes, last_newline):
    rows = [{"text": "x" * (n % 37)} for n in range(60)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    if not last_newline:
        path.write_bytes(path.read_bytes()[:-1])
    scanned = scan_file(path, part_bytes=part_bytes)
    assert [p.start for p in scanned.parts] == [0, *(p.stop for p in scanned.parts[:-1])]
    assert scanned.parts[-1].stop == scanned.size == path.stat().st_size
    assert len(scanned.parts) == 1 or max(p.stop - p.start for p in scanned.parts) <= 2 * part_bytes + 60
    assert scanned.most_lines >= len(rows)
    report, advanced = LineReport(), []
    read = [
        (d.text, d.line)
        for part in scanned.parts
        for d in read_part(part, RowFields(), report=report, advance=advanced.append)
    ]
    assert read == [(row["text"], n) for n, row in enumerate(rows, start=1) if row["text"]]
    assert report == LineReport(lines=60, skipped_empty=2) and sum(advanced) == scanned.size


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (part,) = scan_file(path, part_bytes=1000).parts
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="changed while it was read"):
        list(read_part(part, RowFields(), report=LineReport()))
