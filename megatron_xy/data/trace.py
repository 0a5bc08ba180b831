"""`data trace`: the source lines of any data step or sample, in time proportional to the batch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.config import load_config
from megatron_xy.data.indexed import IndexedReader
from megatron_xy.data.manifest import read_manifest
from megatron_xy.data.origins import Rows, read_rows
from megatron_xy.data.plan_steps import planned_steps, run_folders


def trace_steps(
    directory: Path, *, config_path: Path, overrides: Sequence[str], steps: range
) -> Iterator[dict[str, Any]]:
    """One row a sample drawn in `steps`: {data_step, bucket, source, sample: index within (source, bucket), documents}.

    documents: [{file, line, start, length}], the pieces of the sample in order: `length` tokens from token `start` on
    of the document at FILE:LINE. Raises ConfigError, DataError as `plan_steps`, and DataError where a trace is damaged.
    """
    config = load_config(config_path, overrides=overrides)
    folders = run_folders(config, directory)
    tracer = Tracer(folders)
    rows = planned_steps(config, folders, steps=steps, data_parallel_size=1, data_parallel_rank=0)
    for row in rows:
        place = {"data_step": row["data_step"], "bucket": row["bucket"], "source": row["source"]}
        for index in row["samples"]:
            documents = tracer.documents(source=row["source"], bucket=row["bucket"], index=index)
            yield {**place, "sample": index, "documents": documents}


class Tracer:
    """Names the documents of samples of data folders, joined as a run's are; a shard is opened when its first sample is
    asked for.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises ConfigError, DataError as `read_manifest`."""
        self._shards: dict[tuple[str, int], list[_Shard]] = {}
        for folder in folders:
            manifest = read_manifest(folder)
            files = [entry.path for entry in manifest.inputs]
            for source, entry in manifest.sources.items():
                for size, bucket in entry.buckets.items():
                    shards = [_Shard(folder / shard.name, shard.samples, files) for shard in bucket.shards]
                    self._shards.setdefault((source, int(size)), []).extend(shards)
        self._starts = {
            stream: list(itertools.accumulate((shard.num_samples for shard in shards), initial=0))
            for stream, shards in self._shards.items()
        }
        self._opened: dict[Path, tuple[IndexedReader, Rows]] = {}

    def documents(self, *, source: str, bucket: int, index: int) -> list[dict[str, Any]]:
        """[{file, line, start, length}] of the pieces of one sample. Raises IndexError where there is none such."""
        starts = self._starts.get((source, bucket), [0])
        if not 0 <= index < starts[-1]:
            raise IndexError(f"sample {index} of {starts[-1]} in source {source}, bucket {bucket}")
        number = bisect.bisect_right(starts, index) - 1
        shard = self._shards[source, bucket][number]
        reader, rows = self._open(shard.prefix)
        first, last = reader.document_indices[index - starts[number] :][:2].tolist()
        pieces = zip(rows[first:last].tolist(), reader.sequence_lengths[first:last].tolist(), strict=True)
        return [
            {"file": shard.files[file], "line": line, "start": start, "length": length}
            for (line, file, start), length in pieces
        ]

    def _open(self, prefix: Path) -> tuple[IndexedReader, Rows]:
        if prefix not in self._opened:
            reader = IndexedReader(prefix)
            self._opened[prefix] = reader, read_rows(reader.prefix, num_sequences=reader.num_sequences)
        return self._opened[prefix]


@dataclass(frozen=True)
class _Shard:
    """Where a shard lies, and the corpus files that its rows number."""

    prefix: Path
    num_samples: int
    files: list[str]
