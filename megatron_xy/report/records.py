"""The records of a run as columns of numbers: from metrics.jsonl, eval.jsonl and events.jsonl to arrays with gaps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_xy.errors import ConfigError, DataError
from megatron_xy.record_files import read_records
from megatron_xy.report.numbers import number


@dataclass(frozen=True)
class Metrics:
    """The records of a run, in the order of their steps. A number that is absent, null or not finite reads as NaN."""

    records: list[dict[str, Any]]

    def column(self, name: str) -> NDArray[numpy.float64]:
        """One number a record: float64 [records]."""
        return numpy.array([number(record.get(name)) for record in self.records])

    def parts(self, name: str) -> dict[str, NDArray[numpy.float64]]:
        """Of a field that holds {part: number}, such as a loss by source: float64 [records] for every part."""
        fields = [field if isinstance(field := record.get(name), dict) else {} for record in self.records]
        names = sorted({part for field in fields for part in field}, key=_by_first_number)
        return {part: numpy.array([number(field.get(part)) for field in fields]) for part in names}

    def buckets(self) -> dict[int, NDArray[numpy.bool_]]:
        """{bucket: which steps drew it}, bool [records]."""
        column = self.column("bucket")
        return {int(bucket): column == bucket for bucket in numpy.unique(column[numpy.isfinite(column)])}

    def holds(self, name: str) -> bool:
        """Whether any record has this field, with something in it."""
        return any(record.get(name) for record in self.records)


def read_metrics(path: Path) -> Metrics:
    """The records of a metrics.jsonl; an unfinished last line, of a run that is still writing, is left out."""
    if not path.exists():
        raise ConfigError(f"{path} is not there; name a run's folder, after its first step")
    records = read_records(path)
    if not records:
        raise DataError(f"{path} holds no step yet; wait for the first step, or look into {path.parent / 'logs'}")
    return Metrics(records)


def _by_first_number(name: str) -> tuple[int, str]:
    """256 before 1024 and 2-4k before 16k-; other names by the alphabet."""
    found = re.match(r"\d+", name)
    return (int(found[0]) if found else 0, name)
