"""`data plan-steps` and `data trace`: what is drawn at which step, by the sampler that training uses, and whence."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.config import RunConfig, load_config
from megatron_xy.data.dataset import PackedDataset, samples_of_rank
from megatron_xy.data.draws.phases import run_sampler
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.rows_files import is_file_of_rows


def plan_steps(
    directory: Path,
    *,
    config_path: Path,
    overrides: Sequence[str],
    steps: range,
    data_parallel_size: int,
    data_parallel_rank: int,
) -> Iterator[dict[str, Any]]:
    """One row a (data step, source): {data_step, bucket, source, samples: indices within (source, bucket)}.

    Raises UsageError for a rank outside its world, ConfigError as `run_folders`, DataError for damaged folders.
    """
    if data_parallel_rank >= data_parallel_size:
        raise UsageError(
            f"--data-parallel-rank ({data_parallel_rank}) must be below --data-parallel-size ({data_parallel_size})"
        )
    config = load_config(config_path, overrides=overrides)
    dataset = PackedDataset(run_folders(config, directory))
    yield from _planned(
        config, dataset, steps=steps, data_parallel_size=data_parallel_size, data_parallel_rank=data_parallel_rank
    )


def trace_steps(
    directory: Path, *, config_path: Path, overrides: Sequence[str], steps: range
) -> Iterator[dict[str, Any]]:
    """One row a sample drawn in `steps`: {data_step, bucket, source, sample: index within (source, bucket), documents}.

    documents: [{file, line, start, length}], the pieces of the sample in order: `length` tokens from token `start` on
    of the document at FILE:LINE. In time proportional to the batch. Raises ConfigError, DataError as `plan_steps`, and
    DataError where a trace is damaged.
    """
    config = load_config(config_path, overrides=overrides)
    dataset = PackedDataset(run_folders(config, directory))
    for row in _planned(config, dataset, steps=steps, data_parallel_size=1, data_parallel_rank=0):
        for index in row.pop("samples"):
            documents = dataset.documents(SampleId(row["source"], row["bucket"], index))
            yield {**row, "sample": index, "documents": documents}


def run_folders(config: RunConfig, directory: Path) -> list[Path]:
    """The folders that the run draws from: `directory`, also in place of one that data.path names, or all of several.

    Raises ConfigError where data.path names several, and the steps cannot be told from `directory` or from all.
    """
    paths = config.data.paths
    is_named = directory.resolve() in [path.resolve() for path in paths]
    if len(paths) < 2:
        if paths and not is_named and not is_file_of_rows(paths[0]):  # of that, the run builds a folder
            print(f"data.path ({paths[0]}) is another folder; these are the steps over {directory}", file=sys.stderr)
        return [directory]
    names = ", ".join(map(str, paths))
    if not is_named:
        raise ConfigError(
            f"DIR ({directory}) is none of data.path ({names}), and a run draws from all of them together; name one of "
            f"them, or add data.path={directory} for the steps over it alone"
        )
    if rows := [str(path) for path in paths if is_file_of_rows(path)]:
        raise ConfigError(
            f"DIR ({directory}) is drawn from with all of data.path ({names}), and {', '.join(rows)} is no folder; "
            f"put what the run built of it, in {config.run_dir / 'data'}, into data.path in its place"
        )
    return paths


def _planned(
    config: RunConfig, dataset: PackedDataset, *, steps: range, data_parallel_size: int, data_parallel_rank: int
) -> Iterator[dict[str, Any]]:
    sampler = run_sampler(config, dataset.streams)
    for step in steps:
        batch, mine = samples_of_rank(
            dataset,
            sampler,
            step,
            data_parallel_size=data_parallel_size,
            data_parallel_rank=data_parallel_rank,
            split_documents=config.data.split_documents,
        )
        for source in sorted({sample.source for sample in mine}):
            indices = [sample.index for sample in mine if sample.source == source]
            yield {"data_step": step, "bucket": batch.bucket, "source": source, "samples": indices}
