"""What annotators are given and give back: answers that `generate` wrote -> sheets (jsonl, csv) -> filled-in rows.

Shared by preferences.py, whose grades become training pairs, and side_by_side.py, whose grades compare two models.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.data.chat.conversations import BadConversation, parse_prompt
from megatron_xy.data.corpus.rows import SHOWN_PROBLEMS, BadRow, read_rows
from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.storage import TEMPORARY_PREFIX, storage_errors, write_text

KEY = "key"
SHOWN_NAMES = 3
_NO_LETTER = re.compile(r"[\W\d_]")
KEPT_LETTERS = 10_000  # a spreadsheet's cell ends after 32,767 characters
FEWEST_LETTERS = 12  # of a text that no spreadsheet takes for a date


def named_file(text: str) -> tuple[str, Path]:
    """(model, path) of an option MODEL=FILE. Raises UsageError."""
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise UsageError(f"--answers ({text}): must be MODEL=FILE, such as small=runs/answers.jsonl")
    return name, Path(path)


def prompt_of(row: dict[str, Any]) -> str:
    """What a row asks, as the JSON of a row, by which it is known: its prompt, a system's text in it, and its tools.

    Raises BadRow.
    """
    asked = {"prompt": row.get("prompt")}
    if isinstance(asked["prompt"], list):
        try:
            conversation = parse_prompt(row)
        except BadConversation as problem:
            raise BadRow(f"prompt: {problem}") from None
        asked = {"prompt": conversation.messages} | ({"tools": conversation.tools} if conversation.tools else {})
    elif not isinstance(asked["prompt"], str):
        raise BadRow("prompt is missing, or neither a string nor messages")
    return json.dumps(asked, ensure_ascii=False, sort_keys=True)


def response_of(row: dict[str, Any]) -> str:
    """The answer of a row that `generate` wrote. Raises BadRow."""
    response = row.get("response")
    if not isinstance(response, str):
        raise BadRow("response is missing or no string")
    return response


def asked_in(row: dict[str, Any]) -> dict[str, Any]:
    """What a key's or a sheet's row asks: prompt, and tools if there are any."""
    return {name: row[name] for name in ("prompt", "tools") if name in row}


def shown_prompt(row: dict[str, Any]) -> str:
    """What a row asks, a string or messages and the tools beside them, as annotators read it."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    tools = [f"tools: {json.dumps(row['tools'], ensure_ascii=False)}"] if "tools" in row else []
    return "\n".join([*tools, *(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])])


def pair_shown(row: dict[str, Any], annotator: str) -> dict[str, Any]:
    """What an annotator sees of a row of a side by side's key: what it asks, A, B, and pair, a digest to know it by.

    Every export counts its questions from q000001 on; by the digest a grade is told from one of another export.
    """
    a = row["A"][annotator]
    b = "baseline" if a == "candidate" else "candidate"
    texts = {"A": row[a]["response"], "B": row[b]["response"]}
    digest = hashlib.sha256(json.dumps([shown_prompt(row), *texts.values()]).encode()).hexdigest()
    return {"pair": f"p{digest[:16]}", **asked_in(row), **texts}  # a letter first: no number to a spreadsheet


def lines_of(rows: Iterable[dict[str, Any]]) -> str:
    """The text of a jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_folder(folder: Path) -> None:
    """Makes --output. Raises ConfigError where it is a file, StorageError where it cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output ({folder}) is a file; name a folder")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def begin_export(folder: Path, key: str) -> None:
    """Writes the key to --output, first, as by it the same export is known; leaves it where it is there already.

    Raises ConfigError for a folder that holds anything else, or as `make_folder`.
    """
    path = folder / f"{KEY}.jsonl"
    if path.is_file() and path.read_bytes() == key.encode():
        return
    if there := sorted(path.name for path in folder.glob("*") if not path.name.startswith(TEMPORARY_PREFIX)):
        raise ConfigError(
            f"--output ({folder}) holds something else than this export, such as {', '.join(there[:SHOWN_NAMES])}, and "
            "nothing is overwritten, which may be graded; name another folder, or remove this one"
        )
    make_folder(folder)
    write_text(path, key)


def write_sheet(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows, all with the same keys but tools, and with a `grade` to be filled in, as NAME.jsonl and NAME.csv.

    In the csv tools stand in the prompt, and a ' before a text that a spreadsheet would take for a formula.
    """
    write_text(folder / f"{name}.jsonl", lines_of(rows))
    table = io.StringIO(newline="")
    columns = [name for name in rows[0] if name != "tools"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        shown = {**row, "prompt": shown_prompt(row)}
        writer.writerow({key: _cell(value) if isinstance(value, str) else value for key, value in shown.items()})
    write_text(folder / f"{name}.csv", "\ufeff" + table.getvalue())  # the mark by which spreadsheets know UTF-8


def edited_texts(row: dict[str, Any], shown: dict[str, Any], *, sheet: Path) -> list[str]:
    """Which of prompt, tools, A and B a filled-in row has otherwise than was shown; what it leaves out is not asked.

    Of a csv letters are compared, as far as they go: a spreadsheet changes numbers and dates and cuts long texts.
    """
    is_table = sheet.suffix == ".csv"
    is_same = _has_the_letters_of if is_table else operator.eq
    texts = {"prompt": shown_prompt(shown)} if is_table else asked_in(shown)
    texts |= {name: shown[name] for name in "AB"}
    return [name for name in texts if name in row and not is_same(row[name], texts[name])]


def _has_the_letters_of(given: str | None, text: str) -> bool:
    letters, told = (_NO_LETTER.sub("", it)[:KEPT_LETTERS] for it in (text, given or ""))
    return len(letters) < FEWEST_LETTERS or letters == told


def read_sheet(
    path: Path, take: Callable[[dict[str, Any]], None], *, columns: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Hands each row of a filled-in sheet, jsonl or csv, to `take`, which raises BadRow.

    columns: without which a csv is none; optional: others of plain letters. Of a csv that is not UTF-8 only these are
    handed over, what else it says may be garbled. Raises ConfigError where there is no file, DataError with FILE:LINE
    of every bad row (the first 20).
    """
    if path.suffix != ".csv":
        read_rows(path, option="--grades", parse=take)
        return
    if not path.is_file():
        raise ConfigError(f"--grades ({path}): there is no such file")
    content, problems, is_garbled = path.read_bytes(), list[str](), False
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text, is_garbled = content.decode("gb18030", errors="replace"), True  # of a Chinese spreadsheet
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path} has no column {', '.join(missing)}; fill in the exported csv, with commas between")
        for row in reader:
            try:
                take({name: row[name] for name in (*columns, *optional) if name in row} if is_garbled else row)
            except BadRow as problem:
                problems.append(f"{path}:{reader.line_num}: {problem}")
    except csv.Error as error:
        raise DataError(f"{path} is no table: {error}; save it as CSV") from error
    if problems:
        raise DataError("\n".join(problems[:SHOWN_PROBLEMS]))


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
