"""megatron_xy/data/corpus/rows.py: the rows of a jsonl file, and what is said of bad ones."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_xy.data.corpus.rows import SHOWN_PROBLEMS, BadRow, check_json, read_rows
from megatron_xy.errors import ConfigError, DataError


def test_rows_come_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": "\\ud83e\\udd8a \\\\ud800"}\n')
    assert [(row.line, row.value) for row in read_rows(path, option="--rows", parse=lambda row: row["a"])] == [
        (1, 1),
        (4, "\U0001f98a \\ud800"),  # a whole pair, and one that is only spelt out
    ]


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_rows_of_compressed_files_are_the_same(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    def read() -> list[tuple[int, int]]:
        return [(row.line, row.value) for row in read_rows(path, option="--rows", parse=lambda row: row["a"])]

    path = tmp_path / f"rows.jsonl{ending}"
    whole = compress(b'\xef\xbb\xbf{"a": 1}\n' + b'{"a": 2}\n' * 9)
    path.write_bytes(whole)
    assert read() == [(1, 1), *((line, 2) for line in range(2, 11))]
    if ending:
        for damaged in (whole[:-6], whole[:12], b"", b"{}\n"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"rows\.jsonl.*: damaged after line .*; copy it again"):
                read()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "no JSON"),
        (b'{"a": "\xff"}', "no JSON"),
        (b'{"a": "\xed\xa0\x80"}', "no JSON"),
        (b'{"a": ["x\\uD800"]}', "lone surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "no JSON object"),
        (b'{"a": 7}', "a is 7"),
        (b'{"a": 1e400}', "a number is NaN or infinite, or too large"),
        (b'{"a": 1, "b": [NaN]}', "a number is NaN or infinite, or too large"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: bytes, reason: str) -> None:
    def parse(row: dict[str, int]) -> None:
        if row["a"] == 7:
            raise BadRow("a is 7")
        check_json(row)

    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{reason}"):
        read_rows(tmp_path / "rows.jsonl", option="--rows", parse=parse)


def test_of_many_bad_rows_the_first_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("no\n" * (SHOWN_PROBLEMS + 5))
    with pytest.raises(DataError, match="and 5 more") as caught:
        read_rows(tmp_path / "rows.jsonl", option="--rows", parse=lambda row: row)
    assert len(str(caught.value).splitlines()) == SHOWN_PROBLEMS + 1


def test_no_file_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rows .* there is no such file"):
        read_rows(tmp_path / "none.jsonl", option="--rows", parse=lambda row: row)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "rows.jsonl", option="--rows", parse=lambda row: row)
