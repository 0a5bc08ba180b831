"""Parquet files -> their rows and the row groups that can be read apart. Needs pyarrow, the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_xy.errors import DataError

BATCH_ROWS = 1024  # in memory at a time
STRINGS = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def row_groups(path: Path) -> list[tuple[int, int]]:
    """(rows, compressed bytes) of each row group. Raises DataError where the file is damaged or no Parquet."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            return [
                (group.num_rows, sum(group.column(index).total_compressed_size for index in range(group.num_columns)))
                for group in groups
            ]
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def read_rows(path: Path, *, columns: Sequence[str], groups: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The values of `columns` in each row of the row groups; None where null, an exception where not valid UTF-8.

    Raises DataError where the file is damaged, lacks a column or has it twice, or a column holds no strings.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, columns)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=list(dict.fromkeys(columns))):
                yield from zip(*(_values(batch.column(name)) for name in columns), strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _check_columns(path: Path, schema: Any, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}: name the right field")
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has {schema.names.count(name)} columns {name!r}; rename all but one")
        kind = schema.field(name).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in STRINGS:
            raise DataError(f"{path}: column {name!r} holds {kind}, not strings; name the right field")


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged or no Parquet file: {error}; copy it again")
