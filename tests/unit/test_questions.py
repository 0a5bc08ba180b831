"""Questions in CSV files: found in a folder or in an archive in it, whole or refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from megatron_xy.benchmarks.questions import find_category, read_questions
from megatron_xy.errors import DataError

ROWS = ",Question,A,B,C,D,Answer\n0,1 + 1?,1,2,3,4, B\n"


def test_a_category_lies_in_a_folder_or_in_an_archive_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "law.csv").write_text(ROWS, encoding="utf-8-sig")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("val/law_val.csv", ROWS)
    for split in ("dev", "val"):
        file = find_category(tmp_path, "law", split=split)
        assert file is not None
        (row,) = read_questions(file, question="Question", answer="Answer")
        assert row == {"Question": "1 + 1?", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B"}
    assert find_category(tmp_path, "law", split="test") is None
    assert find_category(tmp_path / "none", "law", split="test") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Question,A,B,C,Answer\n", "has no column D; must have Question, A, B, C, D, Answer"),
        (ROWS + "1,what,a,b,c,d,E\n", r"law.csv:3: must have a question, four choices and an answer A, B, C or D"),
        (ROWS + "1,what,a\n", r"law.csv:3: must have"),
        ("Question,A,B,C,D,Answer\n", "holds no questions"),
    ],
)
def test_rows_that_are_not_whole_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "law.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read_questions(tmp_path / "law.csv", question="Question", answer="Answer")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "all.zip").write_bytes(b"PK no more")
    with pytest.raises(DataError, match=r"all.zip is damaged.*copy it again"):
        find_category(tmp_path, "law", split="dev")
