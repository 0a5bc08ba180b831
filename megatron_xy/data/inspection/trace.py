"""`data trace`: the source lines of any data step or sample, in time proportional to the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.config import load_config
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.inspection.plan_steps import planned_steps, run_folders


def trace_steps(
    directory: Path, *, config_path: Path, overrides: Sequence[str], steps: range
) -> Iterator[dict[str, Any]]:
    """One row a sample drawn in `steps`: {data_step, bucket, source, sample: index within (source, bucket), documents}.

    documents: [{file, line, start, length}], the pieces of the sample in order: `length` tokens from token `start` on
    of the document at FILE:LINE. Raises ConfigError, DataError as `plan_steps`, and DataError where a trace is damaged.
    """
    config = load_config(config_path, overrides=overrides)
    dataset = PackedDataset(run_folders(config, directory))
    rows = planned_steps(config, dataset, steps=steps, data_parallel_size=1, data_parallel_rank=0)
    for row in rows:
        place = {"data_step": row["data_step"], "bucket": row["bucket"], "source": row["source"]}
        for index in row["samples"]:
            documents = dataset.documents(SampleId(row["source"], row["bucket"], index))
            yield {**place, "sample": index, "documents": documents}
