"""tools/build_prompts.py: one file of prompts, nothing twice, in the asked ratio, with a report that adds up."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.ppo.prompts import PromptFile

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from build_prompts import build, table_of


def words(number: int) -> str:
    """A text like no other."""
    return " ".join(f"{random.Random(number).getrandbits(60):x}" for _ in range(1))


def write(path: Path, prompts: list[Any], **fields: Any) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, **fields}) + "\n" for prompt in prompts))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_and_the_nearly_same_stand_once_and_the_preferences_go_first(tmp_path: Path) -> None:
    texts = [words(number) for number in range(20)]
    long = "What is the interest on ten thousand yuan at three percent over two years, compounded yearly"
    pairs = write(tmp_path / "pairs.jsonl", [*texts[:10], texts[0], long], source="old")
    new = write(tmp_path / "new.jsonl", [*texts[5:], texts[7].upper(), f"{long}?", f"{long} please"])
    report = build([pairs], [new], tmp_path / "out" / "prompts.jsonl", ratio=1.0, most=None, seed=0)
    assert report["preference"]["old"] == {"read": 12, "same": 1, "alike": 0, "left": 1, "written": 10}
    assert report["new"]["new"] == {"read": 18, "same": 5, "alike": 3, "left": 0, "written": 10}
    rows = written(tmp_path / "out" / "prompts.jsonl")
    assert [row["kind"] for row in rows] == ["preference"] * 10 + ["new"] * 10
    assert [row["prompt"] for row in rows[10:]] == texts[10:]
    assert json.loads((tmp_path / "out" / "prompts.report.json").read_text()) == report
    assert table_of(report).row_count == 3
    assert len(PromptFile(tmp_path / "out" / "prompts.jsonl", seed=0)) == 20


@pytest.mark.parametrize(
    ("ratio", "most", "numbers"),
    [(1.0, None, (30, 30)), (0.5, None, (40, 20)), (2.0, None, (15, 30)), (0.0, None, (40, 0)), (1.0, 20, (10, 10))],
)
def test_the_ratio_holds(tmp_path: Path, ratio: float, most: int | None, numbers: tuple[int, int]) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [words(number) for number in range(40)])
    new = write(tmp_path / "new.jsonl", [words(number) for number in range(40, 70)])
    for seed in (0, 1):
        build([pairs], [new], tmp_path / f"{seed}.jsonl", ratio=ratio, most=most, seed=seed)
    kinds = [row["kind"] for row in written(tmp_path / "0.jsonl")]
    assert (kinds.count("preference"), kinds.count("new")) == numbers
    is_everything = sum(numbers) == 70 or numbers == (40, 0)
    assert ((tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()) == is_everything or most is None


def test_one_kind_alone_is_written_whole_and_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    beside = {"system": "Be long.", "tools": [{"name": "look"}]}
    new = write(tmp_path / "new.jsonl", [messages, "hello there!", "Good morning"])
    more = write(tmp_path / "more.jsonl", [[{"role": "user", "content": "And the weather today"}]], **beside)
    build([], [new, more], tmp_path / "prompts.jsonl", ratio=1.0, most=None, seed=0)
    rows = written(tmp_path / "prompts.jsonl")
    assert [row["prompt"] for row in rows[:2]] == [messages, "Good morning"] and "system" not in rows[0]
    assert len(rows) == 3 and {name: rows[2][name] for name in beside} == beside


def test_bad_rows_and_options_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", ["fine", "  ", [{"role": "nobody", "content": "x"}], 3])
    output = tmp_path / "prompts.jsonl"
    with pytest.raises(DataError) as raised:
        build([bad], [], output, ratio=1.0, most=None, seed=0)
    assert [f"{bad}:{line}:" in str(raised.value) for line in (1, 2, 3, 4)] == [False, True, True, True]
    for preferences, ratio, most, error, words_of_it in (
        ([], 1.0, None, UsageError, "no files"),
        ([bad], -1.0, None, UsageError, "--ratio (-1.0)"),
        ([bad], 1.0, 0, UsageError, "--most (0)"),
        ([tmp_path / "none.jsonl"], 1.0, None, ConfigError, "there is no such file"),
    ):
        with pytest.raises(error, match=words_of_it.replace("(", r"\(").replace(")", r"\)")):
            build(preferences, [], output, ratio=ratio, most=most, seed=0)
    assert not output.exists()
