"""CSV files of questions with four choices, a file a category, in a folder or in the archive that came with it."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

from megatron_xy.errors import DataError

CHOICES = ("A", "B", "C", "D")
File = Path | zipfile.Path


def read_questions(path: File, *, question: str, answer: str) -> list[dict[str, str]]:
    """Its rows, of the columns A to D, `question` and `answer`. Raises DataError for any that are not whole."""
    columns = (question, *CHOICES, answer)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path} has no column {', '.join(missing)}; must have {', '.join(columns)}")
        rows = []
        for row in reader:
            if any(row[name] is None for name in columns) or row[answer].strip() not in CHOICES:
                raise DataError(
                    f"{path}:{reader.line_num}: must have a question, four choices and an answer A, B, C or D"
                )
            rows.append({name: row[name].strip() for name in columns})
    if not rows:
        raise DataError(f"{path} holds no questions; copy it again, or remove it")
    return rows


def find_category(folder: Path, category: str, *, split: str) -> File | None:
    """SPLIT/CATEGORY.csv or SPLIT/CATEGORY_SPLIT.csv in the folder or in an archive in it. Raises DataError."""
    for root in (folder, *sorted(folder.glob("*.zip"))):
        try:
            inside = zipfile.Path(root) if root.suffix == ".zip" else root
        except zipfile.BadZipFile as error:
            raise DataError(f"{root} is damaged: {error}; copy it again") from None
        for name in (f"{category}.csv", f"{category}_{split}.csv"):
            if (path := inside / split / name).is_file():
                return path
    return None
