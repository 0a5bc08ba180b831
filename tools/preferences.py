"""Preference pairs from people: generated answers -> blinded pairs for annotators; their grades -> pairs to train on.

    python tools/preferences.py export --answers small=A.jsonl large=B.jsonl --output DIR [--prompts F.jsonl]
    python tools/preferences.py import --key DIR/key.jsonl --grades ANNA.jsonl BO.csv --output pairs.jsonl

export takes what `megatron-xy generate` writes, each file under the name of its model, and writes pairs.jsonl and
pairs.csv: id, prompt, answers A and B, and an empty grade; which model said what is in key.jsonl alone, and its place
is drawn. Grades are A3 A2 A1 A0 B0 B1 B2 B3: which is better, and how clearly. Sources come from the file of prompts.
In pairs.csv a ' stands before a text that a spreadsheet would take for a formula. Nothing is overwritten: a folder that
holds anything but this very export is refused (78).

import takes a file of id and grade from each annotator (the pairs' files, filled in; rows without a grade are passed
over) and writes rows with prompt, chosen, rejected, grade, source and model. Grades of several annotators are averaged;
pairs without a clear preference (A0, B0), or on whose side annotators differ, are dropped. It prints how many of them,
and how far annotators agree, in all, by source and by models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotation import (
    asked_in,
    begin_export,
    edited_texts,
    lines_of,
    named_file,
    prompt_of,
    read_sheet,
    response_of,
    write_sheet,
)

from megatron_xy.data.corpus.rows import BadRow, read_rows
from megatron_xy.errors import DataError, UsageError, with_exit_code
from megatron_xy.storage import write_text

Answers = dict[str, list[tuple[str, str]]]  # by what is asked, as JSON: (model, response)


@with_exit_code
def main() -> None:
    """The exit code: 0, 2 (wrong option), 65 (bad rows), 74 (a file cannot be written) or 78 (no such file)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    export = verbs.add_parser("export")
    export.add_argument("--answers", nargs="+", required=True, metavar="MODEL=FILE")
    export.add_argument("--output", type=Path, required=True, metavar="DIR")
    export.add_argument("--prompts", type=Path, metavar="F.jsonl", help="rows with prompt and source")
    export.add_argument("--pairs-per-prompt", type=int, default=1)
    export.add_argument("--seed", type=int, default=0)
    take = verbs.add_parser("import")
    take.add_argument("--key", type=Path, required=True)
    take.add_argument("--grades", type=Path, nargs="+", required=True, metavar="FILE")
    take.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    if options.verb == "export":
        files = [named_file(text) for text in options.answers]
        sources = {} if options.prompts is None else sources_in(options.prompts)
        count, was_there = export_pairs(
            files, options.output, sources=sources, per_prompt=options.pairs_per_prompt, seed=options.seed
        )
        place = f"{options.output}: pairs.jsonl, pairs.csv, and key.jsonl, to be kept apart"
        print(f"these {count:,} pairs are already in {place}" if was_there else f"wrote {count:,} pairs to {place}")
    else:
        for line in told(import_grades(options.key, options.grades, options.output)):
            print(line)


def sources_in(prompts: Path) -> dict[str, str]:
    """{what a row asks, as JSON: its source} of rows with both. Raises ConfigError or DataError."""

    def parse(row: dict[str, Any]) -> tuple[str, str]:
        if not isinstance(row.get("source"), str):
            raise BadRow("source is missing or no name")
        return prompt_of(row), row["source"]

    return dict(row.value for row in read_rows(prompts, option="--prompts", parse=parse))


def export_pairs(
    files: Sequence[tuple[str, Path]], folder: Path, *, sources: dict[str, str], per_prompt: int, seed: int
) -> tuple[int, bool]:
    """Writes the pairs of (model, file of answers); returns their number, and whether this very export was there.

    Raises UsageError, ConfigError for a folder that holds something else, DataError or StorageError.
    """
    if per_prompt < 1:
        raise UsageError(f"--pairs-per-prompt ({per_prompt}) must be 1 or more")
    answers: Answers = {}
    for model, path in files:
        for answer in read_rows(path, option="--answers", parse=_answer):
            prompt, response = answer.value
            answers.setdefault(prompt, []).append((model, response))
    key: list[dict[str, Any]] = []
    for prompt, given in answers.items():
        chance = random.Random(f"{seed}/{prompt}")  # of the prompt alone: more prompts change no pair
        distinct = list({response: (model, response) for model, response in given}.values())
        pairs = list(itertools.combinations(distinct, 2))
        for first, second in chance.sample(pairs, min(per_prompt, len(pairs))):
            (one, a), (other, b) = (first, second) if chance.random() < 0.5 else (second, first)
            row = {**json.loads(prompt), "A": a, "B": b, "model": {"A": one, "B": other}}
            key.append({**row, "source": sources[prompt]} if prompt in sources else row)
    if not key:
        raise DataError("no prompt has two different answers; generate more of them (-n 2)")
    random.Random(seed).shuffle(key)
    key = [{"id": f"p{number:06d}", **row} for number, row in enumerate(key, start=1)]
    begin_export(folder, lines_of(key))
    if (folder / "pairs.csv").exists():  # what is written last
        return len(key), True
    blinded = [{"id": row["id"], **asked_in(row), "A": row["A"], "B": row["B"], "grade": None} for row in key]
    write_sheet(folder, "pairs", blinded)
    return len(key), False


@dataclass(frozen=True)
class GradedPair:
    """A pair of the key with the grades that annotators gave, signed: 3 (A3) to -3 (B3), 0 for A0 and B0."""

    row: dict[str, Any]
    grades: tuple[int, ...]

    @property
    def strength(self) -> int:
        """Of the mean grade, signed; 0 where the pair is dropped."""
        if min(self.grades) < 0 < max(self.grades):
            return 0
        mean = sum(self.grades) / len(self.grades)
        return int(abs(mean) + 0.5) * (1 if mean > 0 else -1)

    @property
    def models(self) -> str:
        """Which models the answers are of."""
        return " + ".join(sorted({self.row["model"]["A"], self.row["model"]["B"]}))


def import_grades(key: Path, grades: Sequence[Path], output: Path) -> list[GradedPair]:
    """Writes the pairs that have a clear preference; returns all that were graded.

    Raises UsageError for a file that is named twice, ConfigError or DataError.
    """
    if twice := [path for path, count in Counter(path.resolve() for path in grades).items() if count > 1]:
        raise UsageError(f"--grades names {twice[0]} twice, and an annotator counts once; name each file once")
    rows = {row.value["id"]: row.value for row in read_rows(key, option="--key", parse=_key_row)}
    given: dict[str, list[int]] = {}
    for path in grades:
        for number, grade in _grades_in(path, known=rows).items():
            given.setdefault(number, []).append(grade)
    graded = [GradedPair(row, tuple(given[number])) for number, row in rows.items() if number in given]
    if not graded:
        raise DataError("no pair has a grade; fill in the column grade with A3 to B3")
    write_text(output, lines_of(_pair_row(pair) for pair in graded if pair.strength))
    return graded


def told(graded: Sequence[GradedPair]) -> list[str]:
    """Pairs, the share dropped and agreement, in all and by group, in lines."""
    lines = [f"{'':<32} {'pairs':>7} {'dropped':>8} {'agreement':>10} {'kappa':>7}", _line_of("all", graded)]
    groups: dict[str, list[GradedPair]] = {}
    for pair in graded:
        groups.setdefault(f"source {pair.row.get('source', 'unnamed')}", []).append(pair)
        groups.setdefault(f"model {pair.models}", []).append(pair)
    return [*lines, *(_line_of(name, groups[name]) for name in sorted(groups))]


def agreement(graded: Iterable[GradedPair]) -> tuple[float, float] | None:
    """How often two annotators of a pair take the same side (A, B or none), and that beyond chance (Scott's pi).

    None where no pair has two. By chance: as often as sides are taken in all.
    """
    same = number = 0
    sides: Counter[int] = Counter()
    for pair in graded:
        taken = [(grade > 0) - (grade < 0) for grade in pair.grades]
        for one, other in itertools.combinations(taken, 2):
            same, number = same + (one == other), number + 1
            sides.update((one, other))
    if not number:
        return None
    chance = sum((count / sides.total()) ** 2 for count in sides.values())
    return same / number, (same / number - chance) / (1 - chance) if chance < 1 else 1.0


def _line_of(name: str, graded: Sequence[GradedPair]) -> str:
    dropped = sum(not pair.strength for pair in graded) / len(graded)
    found = agreement(graded)
    shown = "         -       -" if found is None else f"{found[0]:>10.1%} {found[1]:>7.2f}"
    return f"{name:<32} {len(graded):>7,} {dropped:>8.1%} {shown}"


def _pair_row(pair: GradedPair) -> dict[str, Any]:
    better, worse = ("A", "B") if pair.strength > 0 else ("B", "A")
    row, models = pair.row, pair.row["model"]
    source = {"source": row["source"]} if "source" in row else {}
    return {
        **asked_in(row),
        "chosen": row[better],
        "rejected": row[worse],
        "grade": f"{better}{abs(pair.strength)}",
        **source,
        "model": {"chosen": models[better], "rejected": models[worse]},
    }


def _grades_in(path: Path, *, known: dict[str, Any]) -> dict[str, int]:
    """One annotator's grades by pair, from a jsonl or csv file. Raises ConfigError, DataError with FILE:LINE."""
    seen: dict[str, int] = {}

    def take(row: dict[str, Any]) -> None:
        number, grade = str(row.get("id", "")).strip(), row.get("grade")
        if grade is None or not str(grade).strip():
            return
        if number not in known:
            raise BadRow(f"id ({number[:20]}) is none of the key's")
        if edited := edited_texts(row, known[number], sheet=path):
            raise BadRow(
                f"{' and '.join(edited)} of {number} is not the key's: the sheet is of another export, or was edited"
            )
        if number in seen:
            raise BadRow(f"id ({number}) has been graded before in this file")
        if not re.fullmatch("[AB][0-3]", str(grade).strip().upper()):
            raise BadRow(f"grade ({str(grade)[:20]}) must be one of A3, A2, A1, A0, B0, B1, B2, B3")
        wanted = str(grade).strip().upper()
        seen[number] = int(wanted[1]) * (1 if wanted[0] == "A" else -1)

    read_sheet(path, take, columns=("id", "grade"))
    return seen


def _answer(row: dict[str, Any]) -> tuple[str, str]:
    """(what is asked, as JSON, response) of a row that `generate` wrote."""
    prompt, response = prompt_of(row), response_of(row)
    if not response.strip():
        raise BadRow("response is an empty answer, which nobody can grade; leave the row out")
    return prompt, response


def _key_row(row: dict[str, Any]) -> dict[str, Any]:
    if not {"id", "prompt", "A", "B", "model"} <= row.keys():
        raise BadRow("is no row of a key.jsonl that `export` wrote")
    return row


if __name__ == "__main__":
    sys.exit(main())
