"""Grades unblinded: key.jsonl and filled-in sheets -> what each annotator said of the judged model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotation import edited_texts, pair_shown, read_sheet

from megatron_xy.data.corpus.rows import SHOWN_PROBLEMS, BadRow, read_rows
from megatron_xy.errors import DataError

GRADES = ("good", "same", "bad")


@dataclass(frozen=True)
class Question:
    """A row of the key, and each annotator's grade of the judged model's answer beside the other one's."""

    row: dict[str, Any]
    grades: dict[str, str]

    @property
    def counts(self) -> list[int]:
        """How many annotators said good, same, bad."""
        given = list(self.grades.values())
        return [given.count(grade) for grade in GRADES]

    @property
    def group(self) -> tuple[str, str]:
        """Domain and category."""
        return self.row["domain"], self.row["category"]


def read_questions(key: Path, sheets: Sequence[Path]) -> list[Question]:
    """All questions of the key with all their grades.

    Raises DataError that names grades which are missing, doubled, contradictory, of another export, or none at all.
    """
    rows = {row.value["id"]: row.value for row in read_rows(key, option="--key", parse=_key_row)}
    given: dict[tuple[str, str], tuple[str, Path]] = {}
    graded: set[tuple[str, str]] = set()  # also where it does not count
    problems = []
    for path in sheets:
        try:
            read_sheet(
                path, _taker(rows, given, graded, path), columns=("id", "annotator", "grade"), optional=("pair",)
            )
        except DataError as error:
            problems.append(str(error))
    for annotator in sorted({name for row in rows.values() for name in row["A"]}):
        asked = [(number, annotator) for number, row in rows.items() if annotator in row["A"]]
        missing = [pair[0] for pair in asked if pair not in graded]
        if missing:
            shown = ", ".join(missing[:SHOWN_PROBLEMS]) + (", ..." if len(missing) > SHOWN_PROBLEMS else "")
            problems.append(f"{len(missing):,} grades of annotator {annotator} are missing: {shown}")
    if problems:
        raise DataError("\n".join(problems))

    def unblinded(number: str, annotator: str, grade: str) -> str:
        is_turned = rows[number]["A"][annotator] == "baseline"
        return GRADES[2 - GRADES.index(grade)] if is_turned else grade

    return [
        Question(row, {name: unblinded(number, name, given[number, name][0]) for name in row["A"]})
        for number, row in rows.items()
    ]


def _taker(
    rows: dict[str, dict[str, Any]],
    given: dict[tuple[str, str], tuple[str, Path]],
    graded: set[tuple[str, str]],
    path: Path,
) -> Callable[[dict[str, Any]], None]:
    """What notes in `graded` that a sheet's row has a grade, and in `given` one that counts, with the sheet."""

    def take(row: dict[str, Any]) -> None:
        number, annotator = (str(row.get(name) or "").strip() for name in ("id", "annotator"))
        grade = str(row.get("grade") or "").strip().lower()
        if not grade:
            return
        graded.add((number, annotator))
        if number not in rows:
            raise BadRow(f"id ({number[:20]}) is none of the key's")
        if annotator not in rows[number]["A"]:
            raise BadRow(f"annotator ({annotator[:20]}) was not asked question {number}")
        shown = pair_shown(rows[number], annotator)
        if "pair" in row and str(row["pair"]).strip() != shown["pair"]:
            raise BadRow(f"pair of {number} is not the key's: the grade is of another export; name that one's key")
        if edited := edited_texts(row, shown, sheet=path):
            raise BadRow(f"{' and '.join(edited)} of {number} is not what was exported; take the sheet as it was")
        if grade not in GRADES:
            raise BadRow(f"grade ({grade[:20]}) must be one of {', '.join(GRADES)}")
        if (number, annotator) in given:
            before, where = given[number, annotator]
            told = "as well" if before == grade else f"but {before}"
            raise BadRow(f"annotator {annotator} has graded {number} {grade} here, {told} before in {where}")
        given[number, annotator] = grade, path

    return take


def _key_row(row: dict[str, Any]) -> dict[str, Any]:
    if not {"id", "domain", "category", "prompt", "candidate", "baseline", "A"} <= row.keys():
        raise BadRow("is no row of a key.jsonl that `export` wrote")
    return row
