"""What a file of rows is called, told by the name alone, and what it may begin with; for configs and builds alike."""

from __future__ import annotations

from pathlib import Path

FILES_OF_ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # what some editors write in front; no part of the text


def is_file_of_rows(path: Path) -> bool:
    """Whether a path names a file of rows, such as conversations or pairs, and not a folder."""
    return path.name.endswith(FILES_OF_ROWS)
