"""Rows of a jsonl file, plain or compressed, each with its line; all bad ones are named before anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_xy.data.corpus.compressed import numbered_lines
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.rows_files import BYTE_ORDER_MARK

Parsed = TypeVar("Parsed")
SHOWN_PROBLEMS = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """Why a row is not of the wanted kind."""


@dataclass(frozen=True)
class Row(Generic[Parsed]):
    """What was made of a row, and the line that it stands on, from 1."""

    line: int
    value: Parsed


def read_rows(path: Path, *, option: str, parse: Callable[[dict[str, Any]], Parsed]) -> list[Row[Parsed]]:
    """What `parse` makes of each row, in order; lines of blanks are passed over.

    option: how the user names the file. `parse` raises BadRow. Raises ConfigError where there is no file, DataError
    that names FILE:LINE of every bad row (the first 20), and where there are no rows or a compressed file is damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{option} ({path}): there is no such file; name a jsonl file, one object a line")
    rows: list[Row[Parsed]] = []
    problems: list[str] = []
    with path.open("rb") as stream:
        for line, raw in numbered_lines(path, stream):
            text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
            if not text.strip():
                continue
            try:
                rows.append(Row(line, parse(_object(text))))
            except BadRow as problem:
                problems.append(f"{path}:{line}: {problem}")
    if problems:
        more = f"\n... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise DataError("\n".join(problems[:SHOWN_PROBLEMS]) + more)
    if not rows:
        raise DataError(f"{path} holds no rows; write one object a line")
    return rows


def check_json(value: Any) -> None:
    """Raises BadRow where a value that will be written as it was read holds what Python reads and JSON has not."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise BadRow("a number is NaN or infinite, or too large for 64 bits, such as 1e400; write another") from None


def _object(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except ValueError as error:  # bad UTF-8 is one as well
        raise BadRow(f"no JSON: {error}") from None
    except RecursionError:
        raise BadRow("JSON is nested too deeply") from None
    if not isinstance(row, dict):
        raise BadRow("no JSON object")
    if b"\\ud" in raw.lower() and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise BadRow("a string has a lone surrogate, which no text file can hold")
    return row
