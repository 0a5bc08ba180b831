"""A run's jsonl files, metrics.jsonl and the like: objects with an `iteration`, the last line perhaps half-written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_xy.errors import DataError
from megatron_xy.storage import storage_errors

BLOCK_BYTES = 1 << 20  # read at a time from a file's end


def read_records(path: Path) -> list[dict[str, Any]]:
    """Its whole lines; none where there is no file. Raises DataError for a damaged line."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=_with_shared_names)
            except ValueError:
                if not line.endswith(b"\n"):  # the last
                    break
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
                raise DataError(
                    f"{path}:{number}: not a record of a step (an object with its iteration); unless a run is at "
                    "work there, delete the line"
                )
            records.append(record)
    return records


def cut_records(path: Path, *, iteration: int) -> None:
    """Drops records beyond `iteration`, and a half-written last line. Raises StorageError.

    The file is cut off behind the last record to keep: their iterations never fall, as each start cuts first.
    """
    if not path.exists():
        return
    with storage_errors(path), path.open("r+b") as stream:
        kept = next((end for end, line in lines_backwards(stream) if _is_within(line, iteration)), 0)
        stream.seek(kept)
        if kept:
            stream.write(b"\n")  # is there already, unless a kill left the last line without it
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())


def lines_backwards(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line of a file ends, and the line, from the last to the first: what follows the last newline."""
    end = position = stream.seek(0, os.SEEK_END)
    begun = b""  # of the line that the block before it begins
    while position:
        size = min(BLOCK_BYTES, position)
        position -= size
        stream.seek(position)
        begun, *lines = (stream.read(size) + begun).split(b"\n")
        for line in reversed(lines):
            yield end, line
            end -= len(line) + 1
    yield end, begun


def _is_within(line: bytes, iteration: int) -> bool:
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except ValueError:  # what a kill left half-written, or nothing behind the last line's end
        return False


def _with_shared_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One string for a name in all records: of a long run they would take more memory than the numbers."""
    return {sys.intern(name): value for name, value in pairs}
