"""tools/preferences.py: blinded pairs for annotators, and their grades back."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_xy.config import RunConfig
from megatron_xy.errors import ConfigError, DataError, StorageError, UsageError
from megatron_xy.reward.pairs import load_pairs

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import preferences
from toy_preferences import COLOURS, make, write_rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What two models answered to 40 prompts, two answers each, exported."""
    for model in ("small", "large"):
        write_rows(
            tmp_path / f"{model}.jsonl",
            [
                {
                    "prompt": f"red prompt {number}",
                    "index": index,
                    "response": f"{COLOURS[(number + index) % 4]} {'red' if model == 'large' else 'blue'}",
                }
                for number in range(40)
                for index in range(2)
            ],
        )
    files = [(model, tmp_path / f"{model}.jsonl") for model in ("small", "large")]
    prompts = [{"prompt": f"red prompt {number}", "source": ("a", "b")[number % 2]} for number in range(40)]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    sources = preferences.sources_in(tmp_path / "prompts.jsonl")
    assert preferences.export_pairs(files, tmp_path / "out", sources=sources, per_prompt=2, seed=0) == (80, False)
    return tmp_path


def test_annotators_do_not_see_which_model_said_what(folder: Path) -> None:
    pairs, key = rows_of(folder / "out" / "pairs.jsonl"), rows_of(folder / "out" / "key.jsonl")
    assert all(set(pair) == {"id", "prompt", "A", "B", "grade"} for pair in pairs)
    assert [pair["id"] for pair in pairs] == [row["id"] for row in key]
    for row in key:
        for side in "AB":
            assert row[side].split()[1] == ("red" if row["model"][side] == "large" else "blue")
        assert row["A"] != row["B"]
    mixed = [row for row in key if set(row["model"].values()) == {"small", "large"}]
    assert 0.25 < sum(row["model"]["A"] == "large" for row in mixed) / len(mixed) < 0.75, "places are drawn"
    with (folder / "out" / "pairs.csv").open(encoding="utf-8-sig", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["A"] for row in table] == [pair["A"] for pair in pairs] and set(table[0]) == set(pairs[0])


def graded(folder: Path, name: str, grades: dict[str, str]) -> Path:
    path = folder / name
    pairs = rows_of(folder / "out" / "pairs.jsonl")
    rows = [{"id": pair["id"], "grade": grades.get(pair["id"])} for pair in pairs]
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ("id", "grade"))
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)
    return path


def test_grades_come_back_as_pairs_to_train_on(folder: Path) -> None:
    key = {row["id"]: row for row in rows_of(folder / "out" / "key.jsonl")}
    one = graded(
        folder, "one.jsonl", {"p000001": "A3", "p000002": "B1", "p000003": "A0", "p000004": "A2", "p000005": "b2"}
    )
    two = graded(folder, "two.csv", {"p000001": "A2", "p000002": "B2", "p000003": "B0", "p000004": "B1"})
    found = preferences.import_grades(folder / "out" / "key.jsonl", [one, two], folder / "pairs.jsonl")
    assert [pair.strength for pair in found] == [3, -2, 0, 0, -2], "2.5 and 1.5 are rounded up; sides differ in 4"
    written = rows_of(folder / "pairs.jsonl")
    assert [row["grade"] for row in written] == ["A3", "B2", "B2"]
    first, second = key["p000001"], key["p000002"]
    assert written[0]["chosen"] == first["A"] and written[0]["model"]["chosen"] == first["model"]["A"]
    assert written[1]["chosen"] == second["B"] and written[1]["model"]["rejected"] == second["model"]["A"]
    assert written[0]["source"] == first["source"]
    # Sides: (A, A), (B, B), (none, none), (A, B); chance: A 3/8, B 3/8, none 2/8.
    share, beyond = preferences.agreement(found) or (0.0, 0.0)
    chance = (3 / 8) ** 2 * 2 + (2 / 8) ** 2
    assert share == 0.75 and beyond == pytest.approx((0.75 - chance) / (1 - chance))
    lines = preferences.told(found)
    assert lines[1].split() == ["all", "5", "40.0%", "75.0%", f"{beyond:.2f}"]
    assert any(line.startswith("source a") for line in lines) and any(line.startswith("model ") for line in lines)

    make(folder / "toy", num_pairs=1, num_test_pairs=1)
    config = {"data": {"path": str(folder / "pairs.jsonl"), "tokenizer": str(folder / "toy" / "tokenizer.json")}}
    pairs = load_pairs(RunConfig.model_validate({"task": "reward", "reward": {"test_fraction": 0.0}, **config}))
    assert [pair.strength for pair in pairs.training] == [3, 2, 2]


def test_bad_grades_are_named(folder: Path) -> None:
    key = folder / "out" / "key.jsonl"
    for name in ("bad.jsonl", "bad.csv"):
        path = graded(folder, name, {"p000002": "A4"})
        with pytest.raises(DataError, match=rf"{name}:\d+: grade \(A4\) must be one of"):
            preferences.import_grades(key, [path], folder / "pairs.jsonl")
    write_rows(folder / "ids.jsonl", [{"id": "7", "grade": "A1"}, *[{"id": "p000001", "grade": "A1"}] * 2])
    with pytest.raises(DataError) as caught:
        preferences.import_grades(key, [folder / "ids.jsonl"], folder / "pairs.jsonl")
    first, second = str(caught.value).splitlines()
    assert "ids.jsonl:1: id (7) is none of the key's" in first and "ids.jsonl:3: id (p000001) has been graded" in second
    with pytest.raises(DataError, match="no pair has a grade"):
        preferences.import_grades(key, [graded(folder, "none.jsonl", {})], folder / "pairs.jsonl")
    assert not (folder / "pairs.jsonl").exists()


def test_grades_of_another_export_are_named(folder: Path) -> None:
    files = [(model, folder / f"{model}.jsonl") for model in ("small", "large")]
    preferences.export_pairs(files, folder / "other", sources={}, per_prompt=2, seed=1)
    filled = [{**row, "grade": "A2"} for row in rows_of(folder / "other" / "pairs.jsonl")]
    write_rows(folder / "anna.jsonl", filled)
    with pytest.raises(
        DataError, match=r"anna\.jsonl:1: prompt.* of p000001 is not the key's: the sheet is of another"
    ):
        preferences.import_grades(folder / "out" / "key.jsonl", [folder / "anna.jsonl"], folder / "pairs.jsonl")
    write_rows(folder / "bo.jsonl", [{name: row[name] for name in ("id", "grade")} for row in filled])  # at its word
    preferences.import_grades(folder / "out" / "key.jsonl", [folder / "bo.jsonl"], folder / "pairs.jsonl")


def test_nothing_is_overwritten_and_a_file_of_grades_counts_once(folder: Path) -> None:
    files = [(model, folder / f"{model}.jsonl") for model in ("small", "large")]
    out, sources = folder / "out", preferences.sources_in(folder / "prompts.jsonl")
    write_rows(out / "pairs.jsonl", [{**row, "grade": "A2"} for row in rows_of(out / "pairs.jsonl")])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert preferences.export_pairs(files, out, sources=sources, per_prompt=2, seed=0) == (80, True)
    with pytest.raises(ConfigError, match=r"holds something else than this export, such as key\.jsonl, pairs\.csv"):
        preferences.export_pairs(files, out, sources=sources, per_prompt=2, seed=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UsageError, match=r"--grades names .*pairs\.jsonl twice"):
        preferences.import_grades(out / "key.jsonl", [out / "pairs.jsonl", out / ".." / "out" / "pairs.jsonl"], folder)


def test_one_answer_makes_no_pair(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "x", "response": "same"}] * 2)
    with pytest.raises(DataError, match="no prompt has two different answers"):
        preferences.export_pairs([("m", tmp_path / "a.jsonl")], tmp_path / "out", sources={}, per_prompt=1, seed=0)
    write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "x", "response": ""}])
    with pytest.raises(DataError) as caught:
        preferences.export_pairs([("m", tmp_path / "a.jsonl")], tmp_path / "out", sources={}, per_prompt=1, seed=0)
    assert len(str(caught.value).splitlines()) == 2


def test_tables_survive_spreadsheets(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "=1+1", "response": text} for text in ("-2", "二")])
    preferences.export_pairs([("m", tmp_path / "a.jsonl")], tmp_path / "sums", sources={}, per_prompt=1, seed=0)
    with (tmp_path / "sums" / "pairs.csv").open(encoding="utf-8-sig", newline="") as stream:
        row = next(csv.DictReader(stream))
    assert row["prompt"] == "'=1+1" and {row["A"], row["B"]} == {"'-2", "二"}, "no formulas"
    assert not row["id"].isdigit(), "a spreadsheet takes the zeros off numbers"
    (tmp_path / "grades.csv").write_bytes(f"id,prompt,A,B,grade\n{row['id']},二,三,四,a2\n".encode("gbk"))
    found = preferences.import_grades(tmp_path / "sums" / "key.jsonl", [tmp_path / "grades.csv"], tmp_path / "p.jsonl")
    assert [pair.strength for pair in found] == [2]
    (tmp_path / "semicolons.csv").write_text("id;grade\np000001;A1\n")
    with pytest.raises(DataError, match="no column id, grade"):
        preferences.import_grades(folder / "out" / "key.jsonl", [tmp_path / "semicolons.csv"], tmp_path / "p.jsonl")


def test_wrong_options_and_full_disks_are_errors(folder: Path) -> None:
    files = [("small", folder / "small.jsonl")]
    with pytest.raises(UsageError, match=r"--pairs-per-prompt \(-1\) must be 1 or more"):
        preferences.export_pairs(files, folder / "new", sources={}, per_prompt=-1, seed=0)
    with pytest.raises(StorageError, match=r"below cannot be written"):
        preferences.export_pairs(files, folder / "small.jsonl" / "below", sources={}, per_prompt=1, seed=0)
