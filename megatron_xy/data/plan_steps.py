"""`data plan-steps`: which samples a data parallel rank draws at which step, by the sampler that training uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.config import load_config
from megatron_xy.data.dataset import PackedDataset, samples_of_rank
from megatron_xy.data.phases import run_sampler
from megatron_xy.errors import UsageError


def plan_steps(
    directory: Path,
    *,
    config_path: Path,
    overrides: Sequence[str],
    steps: range,
    data_parallel_size: int,
    data_parallel_rank: int,
) -> Iterator[dict[str, Any]]:
    """One row a (data step, source): {data_step, bucket, source, samples: indices within (source, bucket)}."""
    if data_parallel_rank >= data_parallel_size:
        raise UsageError(
            f"--data-parallel-rank ({data_parallel_rank}) must be below --data-parallel-size ({data_parallel_size})"
        )
    config = load_config(config_path, overrides=overrides)
    dataset = PackedDataset([directory])
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
