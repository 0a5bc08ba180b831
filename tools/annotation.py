"""What annotators are given and give back: answers that `generate` wrote -> sheets (jsonl, csv) -> filled-in rows.

Shared by preferences.py, whose grades become training pairs, and side_by_side.py, whose grades compare two models.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.data.rows import SHOWN_PROBLEMS, BadRow, read_rows
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import storage_errors, write_text


def named_file(text: str) -> tuple[str, Path]:
    """(model, path) of an option MODEL=FILE. Raises ConfigError."""
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise ConfigError(f"--answers ({text}): must be MODEL=FILE, such as small=runs/answers.jsonl")
    return name, Path(path)


def prompt_of(row: dict[str, Any]) -> str:
    """A row's prompt as JSON, by which it is known. Raises BadRow."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str | list):
        raise BadRow("prompt is missing, or neither a string nor messages")
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def response_of(row: dict[str, Any]) -> str:
    """The answer of a row that `generate` wrote. Raises BadRow."""
    response = row.get("response")
    if not isinstance(response, str):
        raise BadRow("response is missing or no string")
    return response


def shown_prompt(prompt: Any) -> str:
    """A prompt, given as a string or messages, as annotators read it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def lines_of(rows: Iterable[dict[str, Any]]) -> str:
    """The text of a jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_sheet(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows, all with the same keys and a `grade` to be filled in, as NAME.jsonl and NAME.csv."""
    write_text(folder / f"{name}.jsonl", lines_of(rows))
    path = folder / f"{name}.csv"
    with storage_errors(path), path.open("w", encoding="utf-8-sig", newline="") as stream:  # as spreadsheets know UTF-8
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "prompt": shown_prompt(row["prompt"])} for row in rows)


def read_sheet(path: Path, take: Callable[[dict[str, Any]], None], *, columns: Sequence[str]) -> None:
    """Hands each row of a filled-in sheet, jsonl or csv, to `take`, which raises BadRow.

    Raises ConfigError where there is no file, DataError with FILE:LINE of every bad row (the first 20).
    """
    if path.suffix != ".csv":
        read_rows(path, option="--grades", parse=take)
        return
    if not path.is_file():
        raise ConfigError(f"--grades ({path}): there is no such file")
    problems = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path} has no column {', '.join(missing)}; fill in the exported csv as it is")
        for row in reader:
            try:
                take(row)
            except BadRow as problem:
                problems.append(f"{path}:{reader.line_num}: {problem}")
    if problems:
        raise DataError("\n".join(problems[:SHOWN_PROBLEMS]))
