"""`data trace`: the source lines of any data step or sample, in time proportional to the batch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.data.indexed import IndexedReader
from megatron_xy.data.manifest import ShardEntry, read_manifest
from megatron_xy.data.origins import Rows, read_rows
from megatron_xy.data.plan_steps import plan_steps


def trace_steps(
    directory: Path, *, config_path: Path, overrides: Sequence[str], steps: range
) -> Iterator[dict[str, Any]]:
    """One row a sample drawn in `steps`: {data_step, bucket, source, sample: index within (source, bucket), documents}.

    documents: [{file, line, start, length}], the pieces of the sample in order: `length` tokens from token `start` on
    of the document at FILE:LINE. Raises ConfigError, DataError as `plan_steps`, and DataError where a trace is damaged.
    """
    tracer = Tracer(directory)
    rows = plan_steps(
        directory,
        config_path=config_path,
        overrides=overrides,
        steps=steps,
        data_parallel_size=1,
        data_parallel_rank=0,
    )
    for row in rows:
        place = {"data_step": row["data_step"], "bucket": row["bucket"], "source": row["source"]}
        for index in row["samples"]:
            documents = tracer.documents(source=row["source"], bucket=row["bucket"], index=index)
            yield {**place, "sample": index, "documents": documents}


class Tracer:
    """Names the documents of samples of one data folder; a shard is opened when its first sample is asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError, DataError as `read_manifest`."""
        self._directory = directory
        manifest = read_manifest(directory)
        self._files = [entry.path for entry in manifest.inputs]
        self._shards: dict[tuple[str, int], list[ShardEntry]] = {
            (source, int(size)): bucket.shards
            for source, entry in manifest.sources.items()
            for size, bucket in entry.buckets.items()
        }
        self._starts = {
            stream: list(itertools.accumulate((shard.samples for shard in shards), initial=0))
            for stream, shards in self._shards.items()
        }
        self._opened: dict[str, tuple[IndexedReader, Rows]] = {}

    def documents(self, *, source: str, bucket: int, index: int) -> list[dict[str, Any]]:
        """[{file, line, start, length}] of the pieces of one sample. Raises IndexError where there is none such."""
        starts = self._starts.get((source, bucket), [0])
        if not 0 <= index < starts[-1]:
            raise IndexError(f"sample {index} of {starts[-1]} in source {source}, bucket {bucket}")
        number = bisect.bisect_right(starts, index) - 1
        reader, rows = self._open(self._shards[source, bucket][number].name)
        first, last = reader.document_indices[index - starts[number] :][:2].tolist()
        pieces = zip(rows[first:last].tolist(), reader.sequence_lengths[first:last].tolist(), strict=True)
        return [
            {"file": self._files[file], "line": line, "start": start, "length": length}
            for (line, file, start), length in pieces
        ]

    def _open(self, name: str) -> tuple[IndexedReader, Rows]:
        if name not in self._opened:
            reader = IndexedReader(self._directory / name)
            self._opened[name] = reader, read_rows(reader.prefix, num_sequences=reader.num_sequences)
        return self._opened[name]
