"""Which documents of a corpus are taken, by the hash of their text: held out or not, and each text once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.indexed import mapped

HASH_BYTES = 16
LINE_BITS = 40  # of a key; the bits above are the number of the file
MOST_FILES = 1 << 23


@dataclass(frozen=True)
class Selection:
    """held_out: take the `held_out_fraction` of the texts that are held out, else take the others.

    duplicates: a folder of sorted keys of the documents whose text stands earlier in the corpus; they are left out.
    """

    held_out_fraction: float = 0.0
    held_out: bool = False
    duplicates: str | None = None


EVERY_DOCUMENT = Selection()


def text_hash(text: str) -> bytes:
    """HASH_BYTES bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest()


def is_held_out(text: str, *, fraction: float) -> bool:
    """Whether a text is one of the `fraction` of all texts that are held out."""
    return int.from_bytes(text_hash(text)[:8], "big") < int(fraction * 2**64)


def document_key(file: int, line: int) -> int:
    """A number that orders documents as they stand in the corpus."""
    return file << LINE_BITS | line


class Duplicates:
    """The lines of one part that are left out, asked for in ascending order. Memory: 8 bytes each."""

    def __init__(self, folder: Path, *, file: int, first_line: int, most_lines: int | None) -> None:
        first = document_key(file, first_line)
        end = document_key(file + 1, 0) if most_lines is None else first + most_lines
        found = [_between(path, first, end) for path in sorted(folder.glob("*.keys"))]
        keys = np.sort(np.concatenate([np.zeros(0, dtype="<u8"), *found]))
        self._lines: NDArray[np.int64] = (keys & np.uint64((1 << LINE_BITS) - 1)).astype(np.int64)
        self._next = 0

    def has(self, line: int) -> bool:
        """Whether `line`, above the last one asked for, is to be left out."""
        while self._next < len(self._lines) and self._lines[self._next] < line:
            self._next += 1
        return self._next < len(self._lines) and int(self._lines[self._next]) == line


def _between(path: Path, first: int, end: int) -> NDArray[Any]:
    keys = mapped(path, "<u8")
    low, high = np.searchsorted(keys, np.array([first, end], dtype="<u8"))
    return np.array(keys[low:high])
