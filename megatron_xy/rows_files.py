"""What a file of rows is called; told by the name alone, for configs and builds alike."""

from __future__ import annotations

from pathlib import Path

FILES_OF_ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def is_file_of_rows(path: Path) -> bool:
    """Whether a path names a file of rows, such as conversations or pairs, and not a folder."""
    return path.name.endswith(FILES_OF_ROWS)
