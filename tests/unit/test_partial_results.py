"""Results in the making: kept whole, put in order at the end; rows with their lines; the replicas' shares."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_xy.data.corpus.rows import BadRow, read_rows
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.inference.partial_results import PartialResults
from megatron_xy.model.generate import Request, share_of


def test_results_of_several_writers_end_in_order(tmp_path: Path) -> None:
    results = PartialResults(tmp_path / "out.jsonl")
    results.begin({"seed": 1})
    for writer, numbers in ((0, (4, 0)), (1, (3, 1))):
        stream = results.writer(writer)
        for number in numbers:
            stream.add(number, {"number": number, "text": "é\t\n"})
        stream.close()
    with (results.folder / "results-00001").open("ab") as file:
        file.write(b'2\t0badf00d\t{"number": 2')  # cut off by a kill
    assert results.done() == {0, 1, 3, 4}
    assert not results.output.exists()
    stream = results.writer(1)
    stream.add(2, {"number": 2})
    stream.close()
    with (results.folder / "results-00000").open("ab") as file:
        file.write(b'0\t{"no": "checksum"}\n0\t0badf00d\t{"another": "line\'s"}\nno line\n')
    again = PartialResults(tmp_path / "out.jsonl")
    again.begin({"seed": 1})
    assert again.done() == {0, 1, 2, 3, 4}
    again.finish(5)
    assert [json.loads(line)["number"] for line in results.output.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [results.output]


def test_another_request_does_not_go_on_with_them(tmp_path: Path) -> None:
    PartialResults(tmp_path / "out.jsonl").begin({"seed": 1, "top_p": 0.5})
    with pytest.raises(ConfigError, match="differs in top_p"):
        PartialResults(tmp_path / "out.jsonl").begin({"seed": 1, "top_p": 0.6})
    with pytest.raises(ConfigError, match="make it first"):
        PartialResults(tmp_path / "nowhere" / "out.jsonl").begin({})


def test_a_disk_that_is_full_at_once_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(StorageError, match=r"facts\.json cannot be written"):
            PartialResults(tmp_path / "out.jsonl").begin({"seed": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\nno json\n[1]\n{"a": "\xff"}\n')

    def parse(row: dict[str, object]) -> object:
        if row["a"] == 2:
            raise BadRow("two")
        return row["a"]

    with pytest.raises(DataError) as caught:
        read_rows(path, option="--rows", parse=parse)
    named = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert named == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    path.write_text('{"a": 1}\n\n{"a": 3}')
    assert [(row.line, row.value) for row in read_rows(path, option="--rows", parse=parse)] == [(1, 1), (3, 3)]
    with pytest.raises(ConfigError, match="--rows"):
        read_rows(tmp_path / "none", option="--rows", parse=parse)


def test_replicas_share_the_work() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 101).tolist()
    requests = [Request([1] * length, row=row, index=index) for row, length in enumerate(lengths) for index in range(3)]
    shares = [share_of(requests, dp_size=4, dp_rank=rank) for rank in range(4)]
    assert sorted(place for share in shares for place in share) == list(range(len(requests)))
    tokens = [sum(len(requests[place].prompt) for place in share) for share in shares]
    assert max(tokens) < 1.02 * min(tokens)
