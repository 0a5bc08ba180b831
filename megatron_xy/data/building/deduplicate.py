"""Texts that stand more than once in a corpus -> the keys of all but the first, on disk, in bounded memory.

token shards' parts -> FOLDER/hashes/000000.rows (sorted by hash) -> FOLDER/duplicates/00000.keys (a range of hashes)
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.building.claims import CLAIMS_FOLDER
from megatron_xy.data.building.workers import Advance, Workers
from megatron_xy.data.corpus.documents import LineReport, Part, read_part
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.corpus.selection import document_key, text_hash
from megatron_xy.data.indexed import mapped
from megatron_xy.storage import storage_errors, write_bytes

# A document: its hash as two numbers, and its key.
ROW = np.dtype([("high", ">u8"), ("low", ">u8"), ("key", "<u8")])
ROWS_IN_MEMORY = 1 << 21
DUPLICATES_FOLDER = "duplicates"


@dataclass(frozen=True)
class HashTask:
    """Hash the documents of `parts` into the file `rows`."""

    rows: Path
    parts: tuple[Part, ...]
    fields: RowFields


@dataclass(frozen=True)
class RangeTask:
    """Find the duplicates among the hashes `index`/`count` of all, in files of rows, into the file `keys`."""

    keys: Path
    rows: tuple[Path, ...]
    index: int
    count: int


def find_duplicates(
    pool: Workers,
    groups: Sequence[tuple[Part, ...]],
    *,
    work: Path,
    fields: RowFields,
) -> None:
    """Write into WORK/DUPLICATES_FOLDER the keys of all documents of `groups` whose text stands earlier in them.

    What was hashed and found before is kept. Builds that run at the same time share the work.
    """
    claims = work / CLAIMS_FOLDER
    hashing = [HashTask(work / "hashes" / f"{index:06d}.rows", parts, fields) for index, parts in enumerate(groups)]
    total = sum(part.stop - part.start for parts in groups for part in parts)
    claimed = [claims / f"hash-{task.rows.stem}" for task in hashing]
    num_documents = sum(pool.run("hash", hash_documents, hashing, total=total, unit="bytes", claims=claimed))
    ranges = max(1, -(-num_documents // ROWS_IN_MEMORY))
    rows = tuple(task.rows for task in hashing)
    searching = [
        RangeTask(work / DUPLICATES_FOLDER / f"{index:05d}.keys", rows, index, ranges) for index in range(ranges)
    ]
    claimed = [claims / f"deduplicate-{task.keys.stem}" for task in searching]
    found = pool.run("deduplicate", search_range, searching, total=num_documents, unit="documents", claims=claimed)
    assert sum(found) < max(1, num_documents), "the first document of a corpus is no duplicate"


def hash_documents(task: HashTask, advance: Advance) -> int:
    """How many documents the task has, hashed unless they were before. Memory: 24 bytes a document of the parts."""
    if task.rows.is_file():
        advance(sum(part.stop - part.start for part in task.parts))
        return task.rows.stat().st_size // ROW.itemsize
    hashes, keys = bytearray(), []
    for part in task.parts:
        # Bad lines are told when the corpus is encoded.
        for document in read_part(part, task.fields, report=LineReport(), advance=advance):
            hashes += text_hash(document.text)
            keys.append(document_key(document.file, document.line))
    rows = np.zeros(len(keys), dtype=ROW)
    halves = np.frombuffer(bytes(hashes), dtype=">u8").reshape(-1, 2)
    rows["high"], rows["low"], rows["key"] = halves[:, 0], halves[:, 1], keys
    _write(task.rows, rows[np.lexsort((rows["key"], rows["low"], rows["high"]))])
    return len(rows)


def search_range(task: RangeTask, advance: Advance) -> int:
    """How many duplicates the range holds, found unless they were before. Memory: about ROWS_IN_MEMORY rows."""
    if task.keys.is_file():
        return task.keys.stat().st_size // 8
    first, last = (number * 2**64 // task.count for number in (task.index, task.index + 1))
    rows = np.concatenate([_in_range(path, first, last) for path in task.rows])
    rows = rows[np.lexsort((rows["key"], rows["low"], rows["high"]))]
    same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    keys = np.sort(rows["key"][1:][same])
    _write(task.keys, keys)
    advance(len(rows))
    return len(keys)


def _in_range(path: Path, first: int, last: int) -> NDArray[Any]:
    """The rows of a file, sorted by hash, whose hash begins with a number from `first` to below `last`."""
    rows = mapped(path, ROW)
    # numpy's search would read all of them: their numbers stand neither side by side nor in its byte order.
    low, high = (bisect.bisect_left(rows["high"], number, key=int) for number in (first, last))
    return np.array(rows[low:high])


def _write(path: Path, rows: NDArray[Any]) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, rows.tobytes())
