"""A run's jsonl files, metrics.jsonl and the like: objects with an `iteration`, the last line perhaps half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_xy.errors import DataError
from megatron_xy.storage import write_text


def read_records(path: Path) -> list[dict[str, Any]]:
    """Its whole lines; none where there is no file. Raises DataError for a damaged line."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline yet
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise DataError(f"{path}:{number}: not a record of a step (an object with its iteration); delete the line")
        records.append(record)
    return records


def cut_records(path: Path, *, iteration: int) -> None:
    """Drops records beyond `iteration`, and a half-written last line, by rewriting the file whole."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # only the last line can be cut, by a kill while it was written
        if record["iteration"] <= iteration:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
